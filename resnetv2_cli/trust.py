"""Whose code may run: a file can name a class of its author's, but only the command line allows it.

Importing a module runs it. A checkpoint or a config from a stranger, in a folder with a module of
that stranger's, must not decide that.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping

from resnetv2_cli.errors import UserError
from resnetv2_cli.ownname import named

FLAGS = ("--unit", "--shortcut", "--allow-code")  # whose value is such a name
SETTING = re.compile(r"(^|[\s,=]|--)(unit|shortcut|allow-code)\s*=")  # and words that hold some
GIVEN = re.compile(r"^(--)?(unit|shortcut|allow-code)=")

_admitted: set[str] = set()


def admit(words: Iterable[str]) -> None:
    """Allow the code that the command line gives as a unit, as a shortcut or as code to allow: the
    value of such a flag, or an entry of a grid's axis or a list of settings. These names replace
    those of an earlier command in the same process. The name of a file or a folder allows nothing.
    """
    _admitted.clear()
    flag = ""
    for word in words:
        if flag in FLAGS or (SETTING.search(word) and not os.path.lexists(word)):
            for piece in re.split(r"[,\s]", re.sub(r"\s*=\s*", "=", word)):
                if found := named(GIVEN.sub("", piece)):
                    _admitted.add(found[1])
        flag = word


def some() -> bool:
    """Whether the command line allows any code."""
    return bool(_admitted)


def refuse_strange(name: str) -> None:
    """Refuse to import ``module:Class``, unless it is allowed, or imported already.

    Raises:
        UserError: only a file asks for it.
    """
    if name not in _admitted and name.partition(":")[0] not in sys.modules:
        raise UserError(
            f"{name} is code that a file asks for, not the command line",
            f"importing it runs it; if you trust it, add --allow-code {name}",
        )


def flags(names: Iterable[str]) -> list[str]:
    """The flags by which another command line allows the user's own code.

    A command that is suggested for continuing a run, or that an ablation starts, may run what this
    one may.
    """
    return [word for name in names for word in ("--allow-code", name)]


def command(*words: object, own: Mapping[str, str]) -> str:
    """A command of this tool as one would type it, with the flags that allow the user's ``own``
    code."""
    return shlex.join(["resnetv2", *map(str, words), *flags(own.values())])
