"""Files that are there whole or not at all, whenever the process or the machine stops; seals, which
show whether a file was damaged later; and the cache folder.

A seal is the SHA-256 of a file, written at its end: as the comment of a zip file, which any zip
reader accepts, or after a shared library, whose loader ignores what follows.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

MARK = b"resnetv2 sha256 "
SEAL = 2 + len(MARK) + 64  # bytes at the end: the comment's length and the comment
CHUNK = 2**20  # bytes read at a time
PARTIAL = ".tmp"  # suffix of a file that is not complete yet


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, where its filesystem can."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network filesystems do this themselves, and refuse
            os.fsync(opened)
    finally:
        os.close(opened)


def flush(file: BinaryIO) -> None:
    """Flush a file to disk, and drop it from the page cache, so that it is read back from disk."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def partial(path: Path) -> Path:
    """The path that a file is written to until it is complete."""
    return path.with_name(path.name + PARTIAL)


def expanded(path: Path | str) -> Path:
    """A path with ``~`` expanded; unchanged if there is no such user, where ``Path.expanduser``
    would raise."""
    return Path(os.path.expanduser(path))


def cache() -> Path | None:
    """The user's cache folder, whose contents can all be made again. None for a user without a
    home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnetv2"
    return None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces ``path`` once it is complete and on disk.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    beside = partial(path)
    try:
        with beside.open("wb") as file:
            yield file
            flush(file)
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def name_too(path: Path, other: Path) -> None:
    """Give the file at ``path`` the name ``other`` too, which it keeps when ``path`` is replaced: a
    hard link, or a copy where the filesystem has none."""
    beside = partial(other)
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        with path.open("rb") as source, replacing(other) as copy:
            shutil.copyfileobj(source, copy, CHUNK)
    else:
        os.replace(beside, other)


class Sealing:
    """A file object for ``torch.save``: writes the zip file through, and computes its digest.

    A disk error is kept until ``seal``, because PyTorch's zip writer does not survive one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.held = b""  # the last two bytes: at the end of a zip, the length of its comment
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        body = memoryview(data)
        if len(body) < 2:
            body = memoryview(self.held + bytes(body))
        else:
            self._pass(memoryview(self.held))
        self._pass(body[:-2])
        self.held = bytes(body[-2:])
        return len(data)

    def _pass(self, data: memoryview) -> None:
        self.digest.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error

    def flush(self) -> None:
        """Do nothing: the file is flushed once it is sealed."""

    def seal(self) -> str:
        """Write the digest, and return it.

        Raises:
            OSError: something could not be written.
        """
        if self.error is not None:
            raise self.error
        assert self.held == b"\0\0", "not the end of a zip file"
        self.file.write(_sealed(self.digest.hexdigest()))
        return self.digest.hexdigest()


def _sealed(digest: str) -> bytes:
    comment = MARK + digest.encode()
    return len(comment).to_bytes(2, "little") + comment


def seal(path: Path) -> None:
    """Seal a file that is no zip, and flush it to disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("rb+") as file:
        file.write(_sealed(hashlib.file_digest(file, "sha256").hexdigest()))
        flush(file)


def seal_of(path: Path) -> tuple[str | None, str]:
    """The digest that a file is sealed with, None without a seal, and the digest of its content.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - SEAL
        while left > 0 and (data := file.read(min(CHUNK, left))):
            digest.update(data)
            left -= len(data)
        end = file.read()
    expected = (SEAL - 2).to_bytes(2, "little") + MARK
    sealed = end[len(expected) :].decode("ascii", "replace") if end.startswith(expected) else None
    return sealed, digest.hexdigest()


def whole(path: Path) -> bool:
    """Whether a file is there, sealed, and unchanged since."""
    try:
        sealed, digest = seal_of(path)
    except OSError:
        return False
    return sealed == digest
