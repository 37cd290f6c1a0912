"""How threads wait for one another: asleep if other work uses processors, or as the user sets."""

import os
import re
import subprocess
import sys

import pytest

from resnetv2_cli import threads

SHOWN = {"OMP_DISPLAY_ENV": "verbose"}  # OpenMP reports how long threads spin


@pytest.fixture
def busy():
    """Other work: as many busy processes as processors."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    yield
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Fake a machine: its processors, running threads, and the processors this process may use."""

    def of(processors: int, running: int, affinity: int | None = None) -> None:
        (tmp_path / "loadavg").write_text(f"9.00 9.00 9.00 {running}/321 4711\n")
        monkeypatch.setattr(threads, "LOADAVG", tmp_path / "loadavg")
        monkeypatch.setattr(os, "cpu_count", lambda: processors)
        ours = set(range(affinity or processors))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: ours, raising=False)
        for name in (*threads.SETTINGS, "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)

    return of


def spins(resnetv2, **given: str) -> int:
    """How often a waiting thread spins before it sleeps: 300,000 by default."""
    done = resnetv2("describe", "--depth", 8, env=SHOWN | given)
    return int(re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[1])


def test_beside_other_work_they_sleep(busy, resnetv2):
    assert spins(resnetv2) == 0


def test_training_tells_what_may_be_faster(busy, resnetv2, tmp_path):
    given = ("train", "--dataset", "digits", "--depth", 8, "--steps", 1, "--output")
    said = resnetv2(*given, tmp_path / "two", env={"OMP_NUM_THREADS": "2"}).stderr
    assert "each of 2 threads waits for the slowest: OMP_NUM_THREADS=1 may be faster" in said
    one = resnetv2(*given, tmp_path / "one", env={"OMP_NUM_THREADS": "1"})
    assert "OMP_NUM_THREADS" not in one.stderr + one.stdout


@pytest.mark.parametrize("processors, running, left", [(2, 2, 1), (2, 9, 1), (64, 17, 48)])
def test_so_many_threads_as_have_a_processor(machine, monkeypatch, processors, running, left):
    machine(processors, running)
    monkeypatch.setattr(threads, "begun_with", threads.running())
    assert f"OMP_NUM_THREADS={left} may" in threads.advice()
    monkeypatch.setattr(threads, "begun_with", None)
    assert not threads.advice()


def test_what_the_user_says_stays(busy, resnetv2):
    assert spins(resnetv2, OMP_WAIT_POLICY="active") > 10**6
    assert spins(resnetv2, GOMP_SPINCOUNT="77") == 77


@pytest.mark.parametrize(
    "processors, running, affinity, crowded",
    [
        (2, 1, None, False),  # this process alone; the load average does not count
        (2, 2, None, True),
        (64, 1, None, False),
        (64, 3, None, True),
        (64, 50, 8, False),  # eight are ours, and seven are left over
        (64, 60, 8, True),
    ],
)
def test_where_threads_are_more_than_processors(machine, processors, running, affinity, crowded):
    machine(processors, running, affinity)
    assert threads.crowded(threads.running()) is crowded


def test_a_share_of_the_processors_leaves_the_rest_to_others(machine, monkeypatch):
    machine(8, 5)
    assert threads.crowded(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert not threads.crowded(4)


def test_where_the_system_does_not_say_none_is_crowded(machine, tmp_path):
    machine(2, 9)
    (tmp_path / "loadavg").unlink()
    assert threads.running() is None and not threads.crowded(None)
