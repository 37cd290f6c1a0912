"""Locks, which keep other processes from working in a folder. A lock is released when its holder
ends, however it ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from resnetv2_cli.errors import UserError

TRIES = 10  # a lock may vanish just when it is opened, or be held for a moment by ``taken``
PAUSE = 0.02  # seconds

_held: set[TextIO] = set()  # the locks of this process, open


def _let_go() -> None:
    """Close the locks in a forked child: the workers of a process that was killed live on for some
    seconds, and would still hold its locks."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(lock: Path, hint: str) -> Iterator[None]:
    """Hold a lock in a folder, so that no other process works in the folder meanwhile.

    The folder is created if it is missing. On leaving, the lock is removed. Folders that were
    created for it and are empty are removed too, even if the lock was refused.

    Raises:
        UserError: another process holds it (``hint``: what to do then), or it cannot be written.
    """
    with left_as_it_was(lock.parent), _locked(lock, hint) as file:
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
            with suppress(OSError):
                lock.unlink()


@contextmanager
def left_as_it_was(folder: Path) -> Iterator[None]:
    """Remove ``folder``, and those above it, if they are created meanwhile and end up empty."""
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _locked(lock: Path, hint: str) -> TextIO:
    for left in reversed(range(TRIES)):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+", encoding="utf-8")
        except OSError as error:
            hint = "that folder must be writable; --output names another for new files"
            raise UserError(f"cannot write {lock.parent}: {error.strerror}", hint) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if not left:
                raise UserError(f"{lock.parent} is in use by {holder}", hint) from None
            time.sleep(PAUSE)
            continue
        except OSError:  # a filesystem without locks
            pass
        if _is(lock, file):
            break
        file.close()  # its holder removed it in between, and there may be a new one by now
    else:
        raise UserError(f"{lock.parent} is in use by one process after another", hint)
    with suppress(OSError):  # on a full disk it is held all the same, and closes without an error
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def _is(path: Path, file: TextIO) -> bool:
    """Whether a path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def taken(lock: Path) -> bool | None:
    """Whether a process holds a lock; None if the filesystem has no locks, and nobody can tell."""
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def inherited(lock: Path) -> int | None:
    """A file descriptor of a lock, for processes to inherit: it is released when all of them have
    ended. None if another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:  # a filesystem without locks
        pass
    return file


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Take turns in a folder: another process that asks for it waits until this one is done."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
