"""The user's own classes, ``module:Class``: imported, and tried on something small before they
become part of a network."""

import ast
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnetv2_cli.errors import UserError

HERE = Path(__file__).resolve().parent  # the tool itself, whose commit and digest are kept
Class = TypeVar("Class")
_mine: set[str] = set()  # files of the classes that were imported


def imported(kind: str, name: str, base: type[Class]) -> type[Class]:
    """Import the class ``module:Class``, which may be in the current folder.

    Raises:
        UserError: there is no such module or class, or the class is not derived from ``base``.
    """
    module, _, cls = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), cls)
    except SystemExit:
        hint = 'put what it runs as a script under: if __name__ == "__main__":'
        raise UserError(f"cannot import {kind} {name!r}: it ends the program", hint) from None
    except Exception as error:  # importing runs the user's file, which may fail in any way
        refuse_hidden(module.partition(".")[0])
        hint = "write it as module:Class, importable from here"
        raise UserError(f"cannot import {kind} {name!r}: {error}", hint) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        article = "an" if base.__name__[0] in "AEIOU" else "a"
        hint = f"derive it from {base.__module__}.{base.__name__}"
        raise UserError(f"{name!r} is not {article} {base.__name__}", hint)
    with suppress(TypeError, OSError):  # a class without a source file
        _mine.add(inspect.getfile(found))
    return found


def refuse_hidden(module: str) -> None:
    """Refuse a module of the current folder that another module of the same name hides.

    Raises:
        UserError: there is such a module, of Python or of a package.
    """
    if not (found := sys.modules.get(module)):
        return
    file = getattr(found, "__file__", None)
    there = [*([file] if file else []), *getattr(found, "__path__", [])]
    known = {Path(path).resolve() for path in there}
    for place in (Path.cwd() / f"{module}.py", Path.cwd() / module):
        if place.exists() and place.resolve() not in known:
            first = there[0] if there else "Python itself"
            said = f"{place.name} is not what is imported: {first} has the same name"
            raise UserError(said, "give yours another name")


def blamed(error: BaseException) -> UserError | None:
    """The message for an error that came through a file of the user's own, and where in it; None
    for any other. Code that passed the trial on something small may still fail in a network."""
    places = placed(error, _mine)
    return UserError(f"code of your own fails: {first_line(error)}", places[-1]) if places else None


def first_line(error: BaseException) -> str:
    """The type of an error, and the first line of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def placed(error: BaseException, files: Container[str]) -> list[str]:
    """Where an error came through one of the files, the innermost place last."""
    calls = traceback.extract_tb(error.__traceback__)
    return [f"{c.filename}, line {c.lineno}: {c.line}" for c in calls if c.filename in files]


Gives = Callable[[Any, Tensor, str, str], None]


def refuse_rewritten(kind: str, name: str, x: Tensor) -> None:
    """Refuse a class that changed its input x in place: F needs x in backward.

    Raises:
        UserError: x was changed.
    """
    if x._version:
        hint = "make a new tensor: y = x + ..., not x += ..."
        raise UserError(f"{kind} {name!r} rewrites x in place", hint)


@contextmanager
def tried(kind: str, name: str, cls: type, made: str) -> Iterator[Gives]:
    """Build something small of the class and run it, without changing the random state.

    ``made``: how the class is built and called, as a hint for one with another signature. Yields a
    function that checks an output; it takes the output, a tensor of the shape that it must have,
    what that tensor is, and a hint.

    Raises:
        UserError: the class fails, with the place in the user's file; or it gives another shape.
    """

    def gives(y: Any, wanted: Tensor, what: str, hint: str) -> None:
        shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        if shape != tuple(wanted.shape):
            if not isinstance(y, Tensor):
                hint = "its forward returns what the next unit takes"
            said = f"{shape} where {what} is {tuple(wanted.shape)}"
            raise UserError(f"{kind} {name!r} gives {said}", hint)

    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        try:
            yield gives
        except UserError:
            raise
        except Exception as error:  # it is the user's code
            hint = [made, *placed(error, [inspect.getfile(cls)])][-1]
            raise UserError(f"{kind} {name!r} fails: {first_line(error)}", hint) from error


def files(cls: type) -> list[Path]:
    """The file of a class, then those in its folder or package that it depends on: the ones that it
    imports, directly or through others, whether or not that has happened yet."""
    module = sys.modules[cls.__module__]
    first = Path(inspect.getfile(cls)).resolve()
    root = first.parents[module.__name__.count(".") + (first.stem == "__init__")]
    found = [first]
    packages = {first: module.__package__ or ""}
    for path in found:
        for name in _imports(path, packages[path]):
            spec = _beside(name, root)
            if spec and (place := Path(str(spec.origin)).resolve()) not in found:
                packages[place] = spec.parent or ""
                found.append(place)
    return [first, *sorted(found[1:])]


def _beside(name: str, root: Path) -> ModuleSpec | None:
    """Where a module is, if it lies under a folder and is neither installed nor of this tool. No
    package outside that folder is imported to find it."""
    with suppress(Exception):  # a package may do anything as it is imported
        for part in dict.fromkeys((name.partition(".")[0], name)):
            spec = find_spec(part)
            places = Path(str(spec.origin)).resolve().parents if spec and spec.has_location else []
            if root not in places or HERE in places or "site-packages" in [p.name for p in places]:
                return None
        return spec
    return None


def _imports(path: Path, package: str) -> Iterator[str]:
    """The modules that a file of a package may import, by their full names, and the package."""
    yield package
    if path.suffix != ".py":
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # it may never be imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = resolve_name(base, package) if node.level else base
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
