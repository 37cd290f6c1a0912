"""The file that a run starts from: where it is, and what it is, by its bytes."""

import hashlib
from functools import cache
from pathlib import Path

from resnetv2_cli.errors import UserError


def located(name: str) -> Path:
    """A file of weights, or the last checkpoint of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(name).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        hint = "--weights takes a checkpoint, the folder of a run, or a .safetensors file"
        raise UserError(f"there are no weights {path}", hint)
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; of one that did not change it is kept."""
    stat = path.stat()
    return _sha256(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
