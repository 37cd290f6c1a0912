"""An ablation killed at random moments and continued ends with the results of one never killed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SCRIPT, THREADS

KILLS = 5
TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--steps", 40, "--log-every", 4]
SWEEP = ["ablate", "--shortcut", "conv1x1", *TINY, "--eval-every", 0.5, "--jobs", 2]


def start(root: Path) -> subprocess.Popen:
    command = [SCRIPT, *SWEEP, "--output", root, "--format", "csv"]
    return subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **THREADS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(sweep: subprocess.Popen) -> str:
    out, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, said
    return out


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(sweep: subprocess.Popen, runs_too: bool) -> None:
    """SIGKILL, to the ablation alone or to its runs as well."""
    below = children(sweep.pid) if runs_too else []
    sweep.kill()
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    sweep.communicate(timeout=60)


def results(root: Path) -> dict[Path, int]:
    """When each result was written."""
    return {p.relative_to(root): p.stat().st_mtime_ns for p in root.rglob("result.json")}


def metrics(root: Path) -> dict[Path, str]:
    return {p.relative_to(root): p.read_text() for p in root.rglob("metrics.csv")}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_sweep_killed_five_times_ends_in_the_same_table_and_runs_nothing_twice(tmp_path):
    began = time.monotonic()
    whole = end(start(tmp_path / "whole"))
    lasts = time.monotonic() - began

    seed = random.randrange(10**6)
    moments, root = random.Random(seed), tmp_path / "killed"
    written: dict[Path, int] = {}
    for i in range(KILLS):
        sweep = start(root)
        try:  # each kill falls later in the runs; the ablation may finish first
            sweep.wait(moments.uniform(0.3, 0.9) * lasts)
        except subprocess.TimeoutExpired:
            kill(sweep, runs_too=i % 2 == 1)
        now = results(root)
        assert written.items() <= now.items(), f"a run was run twice; moments of seed {seed}"
        written = now
    assert end(start(root)) == whole, f"moments of seed {seed}"
    assert written.items() <= results(root).items()
    assert metrics(root) == metrics(tmp_path / "whole"), f"moments of seed {seed}"
