"""Folders in use: which process holds one, which is refused, and whose turn it is."""

import fcntl
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from multiprocessing.pool import ThreadPool

import pytest
from torch.utils.data import DataLoader

from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import in_turn, inherited, taken
from resnetv2_cli.runfolder import RunFolder


def test_a_run_in_use_says_by_whom(tmp_path):
    with RunFolder(tmp_path).claimed():
        message = f"is in use by process {os.getpid()} on"
        with pytest.raises(UserError, match=message), RunFolder(tmp_path).claimed():
            pass
    with RunFolder(tmp_path).claimed():
        pass


def test_who_is_refused_in_a_folder_leaves_what_was_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("new/run", "mine"):
        with pytest.raises(UserError, match="precision"), RunFolder(tmp_path / folder).claimed():
            raise UserError("no such precision")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(UserError), RunFolder(tmp_path / "new" / "run").claimed():
        (tmp_path / "new" / "other").touch()
        raise UserError("and meanwhile another came")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "new", "other"]


def test_the_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    """They live on for some seconds, until they notice that it is gone."""

    def hold() -> None:
        with RunFolder(tmp_path / "run").claimed():
            batches = iter(DataLoader(range(9), num_workers=1))
            next(batches)
            says.send(batches._workers[0].pid)
            time.sleep(60)

    forking = multiprocessing.get_context("fork")
    hears, says = forking.Pipe(duplex=False)
    holder = forking.Process(target=hold)
    holder.start()
    worker = hears.recv()
    assert taken(RunFolder(tmp_path / "run").lock)
    holder.kill()
    holder.join()
    os.kill(worker, 0)  # it is still alive
    folder = RunFolder(tmp_path / "run")
    assert not taken(folder.lock)
    with folder.claimed():  # and it no longer names the killed process
        [line] = folder.lock.read_text().splitlines()
        assert f"process {os.getpid()} on" in line


def test_a_lock_that_goes_with_its_holder_holds(tmp_path):
    """A process that opened it just before it was removed does not hold the removed file."""
    folder, inside, most = RunFolder(tmp_path / "run"), [], []

    def work(n: int) -> int:
        held = 0
        while held < 50:
            with suppress(UserError), folder.claimed():
                inside.append(n)
                most.append(len(inside))
                time.sleep(0)
                inside.remove(n)
                held += 1
        return held

    with ThreadPool(3) as pool:
        assert pool.map(work, range(3)) == [50] * 3
    assert set(most) == {1} and not folder.lock.exists()


def test_who_looks_at_a_lock_does_not_hold_it(tmp_path):
    lock = tmp_path / "run.lock"
    lock.touch()
    with lock.open() as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)
        assert taken(lock) is False


def test_where_there_are_no_locks_nobody_says_that_one_is_free(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("no locks available")

    lock = tmp_path / "run.lock"
    lock.touch()
    monkeypatch.setattr(fcntl, "flock", none)
    assert taken(lock) is None
    os.close(inherited(lock))  # but a process that wants it goes on


def test_a_turn_begins_when_that_before_it_ends(tmp_path):
    def turn() -> None:
        with in_turn(tmp_path):
            pass

    waits = threading.Thread(target=turn)
    with in_turn(tmp_path):
        waits.start()
        waits.join(0.2)
        assert waits.is_alive()
    waits.join(60)
    assert not waits.is_alive()
