"""The file that a run starts from: its path and its SHA-256."""

import hashlib
from functools import cache
from pathlib import Path

from resnetv2_cli.errors import UserError
from resnetv2_cli.files import expanded


def find(path: Path) -> Path:
    """The checkpoint at ``path``: a file, or the best or else last of a run's folder
    or its ``checkpoints``; expands ``~``.

    Raises:
        UserError: there is none.
    """
    path = expanded(path)
    if path.is_dir():
        places = [path / "checkpoints", path]
        files = [place / f"{name}.ckpt" for place in places for name in ("best", "last")]
        path = next((file for file in files if file.is_file()), files[1])
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}", "name a .ckpt file or a run folder")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; computed again only if the file has changed."""
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
