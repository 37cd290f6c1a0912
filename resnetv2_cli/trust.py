"""Whose code may run: a file can name a class of its writer's, but only the command line admits it.

Importing a module runs it. A checkpoint or a config from a stranger, in a folder with a module of
that stranger's, must not decide that.
"""

import re
import sys
from collections.abc import Iterable

from resnetv2_cli.errors import UserError

_admitted: set[str] = set()


def admit(words: Iterable[str]) -> None:
    """Take the command line's words, and what stands in them between ``=`` and commas: the names
    that the user knows of. They replace those of an earlier command in the same process."""
    _admitted.clear()
    _admitted.update(part for word in words for part in re.split(r"[=,\s]", word))


def refuse_strange(name: str) -> None:
    """Refuse to import ``module:Class``, unless it is admitted, or imported already.

    Raises:
        UserError: only a file asks for it.
    """
    if name not in _admitted and name.partition(":")[0] not in sys.modules:
        raise UserError(
            f"{name} is code that a file asks for, not the command line",
            f"to import it would run it; if you trust it, add --allow-code {name}",
        )


def flags(names: Iterable[str]) -> list[str]:
    """What another command line needs to be given for code of one's own.

    The command that is told to continue a run, or that an ablation starts, runs what this may.
    """
    return [word for name in names for word in ("--allow-code", name)]
