"""Errors the user can fix, with how their messages show values; and how a run exits early.

Everything else is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_brief = Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother = 2, 80, 80


class UserError(Exception):
    """One line that says what is wrong, and a hint that says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Damaged(UserError):
    """A file that was intact once and is not any more."""


LAUNCHED = "RESNETV2_LAUNCHED"  # set in processes that another one of their run launched


class OfAll(UserError):
    """An error that ends all processes of a run; the one that launched the others reports it."""


class Gone(OfAll):
    """Another process of the run no longer responds."""


class NotSaved(OfAll):
    """A checkpoint could not be written; earlier ones are as they were."""


class Diverged(OfAll):
    """The loss is no longer finite; in a table such a run is a ``fail``.

    ``iteration``: the first that was not. ``where``: the part of the network where it began.
    """

    def __init__(self, message: str, hint: str, iteration: int, where: str) -> None:
        super().__init__(message, hint)
        self.iteration, self.where = iteration, where


class Stopped(Exception):
    """The run saved its state and exited before its last step: a signal, or its time was up.

    ``status`` is the exit status of the command: 130 for Ctrl-C, 128 + n for signal n, 0 for time.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


def last_error(said: str) -> str:
    """The last error in the output of a command; empty if there is none."""
    lines = [line.rstrip() for line in said.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else ""


def shown(value: object) -> str:
    """A value as a message shows it: cut short, because a few lines of YAML can hold a value whose
    whole text would not fit into memory."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the longest
        return f"a number of {value.bit_length()} bits"
    return _brief.repr(value)


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> UserError:
    """``unknown key 'depht'``, with the closest known name as the hint."""
    known = list(known)
    close = get_close_matches(name[:80], known, n=1) if isinstance(name, str) else []
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return UserError(f"{where}unknown {kind} {shown(name)}", hint)
