"""Whose code may run: a file can name a class of its writer's, but only the command line admits it.

Importing a module runs it. A checkpoint or a config from a stranger, in a folder with a module of
that stranger's, must not decide that.
"""

import os
import re
import sys
from collections.abc import Iterable

from resnetv2_cli.errors import UserError
from resnetv2_cli.ownname import named

FLAGS = ("--unit", "--shortcut", "--allow-code")  # whose value is such a name
SETTING = re.compile(r"(^|[\s,=]|--)(unit|shortcut|allow-code)\s*=")  # and words that hold some
GIVEN = re.compile(r"^(--)?(unit|shortcut|allow-code)=")

_admitted: set[str] = set()


def admit(words: Iterable[str]) -> None:
    """Take what the command line gives as a unit, as a shortcut or as code to allow: the value of
    such a flag, and what is in an axis or a list of settings. These names replace those of an
    earlier command in the same process. The name of a file or a folder admits nothing."""
    _admitted.clear()
    flag = ""
    for word in words:
        if flag in FLAGS or (SETTING.search(word) and not os.path.lexists(word)):
            for piece in re.split(r"[,\s]", re.sub(r"\s*=\s*", "=", word)):
                if found := named(GIVEN.sub("", piece)):
                    _admitted.add(found[1])
        flag = word


def some() -> bool:
    """Whether the command line admits any code."""
    return bool(_admitted)


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
