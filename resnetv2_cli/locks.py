"""Locks, by which no other process works in a folder meanwhile. They are free again when who holds
them has gone, however it went."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from resnetv2_cli.errors import UserError

TRIES = 10  # a lock may go just when it is opened, or be ``taken`` for the moment of a look
PAUSE = 0.02  # seconds

_held: set[TextIO] = set()  # the locks of this process, open


def _let_go() -> None:
    """In a process that was forked: the workers of one that is killed live on for some seconds, and
    would hold its locks."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(lock: Path, hint: str) -> Iterator[None]:
    """Hold a folder by a lock in it, so that no other process works in it meanwhile.

    The folder is made where there is none. The lock goes with its holder, and with it whatever was
    made for it and has nothing else in it: who is refused in between leaves what was there before.

    Raises:
        UserError: another process has it (``hint``: what to do then), or it cannot be written.
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
    """A folder that is made meanwhile, and those above it, go again if nothing stays in them."""
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
            hint = "it must be possible to write there; what is new goes where --output says"
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
        file.close()  # who held it took it away in between, and there may be another by now
    else:
        raise UserError(f"{lock.parent} is in use by others, one after the other", hint)
    with suppress(OSError):  # on a full disk it is held all the same, and closes without an error
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def _is(path: Path, file: TextIO) -> bool:
    """Whether a path names the file that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def taken(lock: Path) -> bool | None:
    """Whether a process holds a lock; None where the filesystem has none, and nobody can say."""
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
    """A lock, open as a file, for processes to inherit: it is free again when all of them have
    gone. None while another has it."""
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
    """Have a folder's turn: another process that wants it waits until this one is done."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a filesystem without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
