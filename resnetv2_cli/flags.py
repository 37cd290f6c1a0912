"""The fields of an experiment as command-line flags, and the parsing of their values."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import cache
from inspect import Parameter
from shlex import quote
from typing import Annotated, Any

import typer
from rich.markup import escape

from resnetv2_cli import plans
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.settings import checked, flag_name, kinds

# Known names of settings that also take code of the user's own, or several names.
NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "unit": lambda: plans.UNITS,
    "shortcut": plans.shortcuts,
    "protocol": lambda: PROTOCOLS,
}


@cache
def flag(f: Field) -> Parameter:
    """A field of Experiment as a flag, None unless given."""
    kind, choices, _ = kinds(f)
    help_ = f.metadata["doc"]
    if f.name in NAMES:
        choices = tuple(NAMES[f.name]())
    if choices:
        help_ += f" One of {', '.join(choices)}."
    default = "" if f.default in (None, "") else f" [dim](default: {f.default})[/]"
    name = flag_name(f.name)
    option = typer.Option(
        f"{name}/--no-{name[2:]}" if kind is bool else name,
        help=escape(help_) + default,
        metavar=None if kind is bool else "NAME" if kind is str else "NUMBER",
        rich_help_panel=f.metadata["panel"],
        show_default=False,
    )
    annotation: Any = Annotated[kind | None, option]  # type: ignore[valid-type]
    return Parameter(f.name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


LAYOUT = Parameter(
    "layout",
    Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="Build what the paper leaves open as a code base does: sets --stride-on, --pad, "
            f"--option and --first-act, which override it. One of {', '.join(plans.LAYOUTS)}.",
            metavar="NAME",
            rich_help_panel="Network",
            show_default=False,
        ),
    ],
)


def with_flags(*without: str) -> Callable:
    """Give a command a flag for each field of Experiment except ``without``, and ``--layout`` if it
    has the flags that this sets; the command receives only what is given."""

    def wrap(command: Callable) -> Callable:
        own = [
            p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        flags = [flag(f) for f in fields(Experiment) if f.name not in without]
        if "stride_on" not in without:
            flags.insert(0, LAYOUT)

        def run(**given: Any) -> None:
            names = {p.name for p in own}
            chosen = {k: v for k, v in given.items() if k in names or v is not None}
            command(**plans.laid_out(chosen))

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__signature__ = inspect.Signature(own + flags)  # type: ignore[attr-defined]
        return run

    return wrap


def of_panels(*panels: str) -> list[str]:
    """The fields of Experiment that the help shows in these panels."""
    return [f.name for f in fields(Experiment) if f.metadata["panel"] in panels]


def parsed(name: str, text: str) -> Any:
    """The value of a setting, from its text on the command line; ``none`` where it may be unset.

    Raises:
        UserError: there is no such setting, or it does not take this value.
    """
    known = {f.name: f for f in fields(Experiment)}
    if name not in known:
        raise unknown("setting", name, known)
    kind, _, optional = kinds(known[name])
    words: dict[str, Any] = {"true": True, "false": False} if kind is bool else {}
    words |= {"none": None} if optional else {}
    return checked(known[name], words.get(text, text))


def typed(name: str, value: Any) -> str:
    """A setting as a flag on the command line."""
    flag = flag_name(name)
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    return f"{flag} {quote(str(value))}"


def seconds(text: str, flag: str = "--time") -> float:
    """Seconds in ``90``, ``90s``, ``25m``, ``2h``, ``1h30m``, or ``1h30``, which is the same.

    Raises:
        UserError: it is none of these.
    """
    whole = re.sub(r"h(\d+)$", r"h\1m", text.strip())
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", whole)
    if not match or not any(match.groups()):
        raise UserError(f"{flag} {text!r} is no duration", "for instance 25m, 2h or 1h30m")
    hours, minutes, rest = (int(g or 0) for g in match.groups())
    return 3600 * hours + 60 * minutes + rest
