"""The file that a run starts from: where it is, and what it is, by its bytes."""

import hashlib
from functools import cache
from pathlib import Path

from resnetv2_cli.errors import UserError
from resnetv2_cli.files import expanded


def find(path: Path) -> Path:
    """The checkpoint that is meant: a file, or a run folder's, chosen or last; ``~`` begins a home.

    Raises:
        UserError: there is none.
    """
    path = expanded(path)
    if path.is_dir():
        names = ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "last.ckpt"]
        path = next((path / n for n in names if (path / n).is_file()), path / names[1])
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "name a .ckpt file or a run folder")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; computed once, unless the file changes."""
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
