"""Run arms of an ablation, and trainings within one process, for a given time; watch memory.

    python tests/stress/soak.py --minutes 180 --output soak.json

The sweep of ``ablate`` lives as long as its study does, and starts one process for each run: its
memory must not grow. Trainings one after the other in one process must not leave anything behind.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.runfolder import RunFolder

SMALL = ["--dataset", "digits", "--depth", "8", "--batch-size", "16", "--log-every", "4"]
LOOK = 2.0  # seconds between readings of a process's memory


def resident(process: int | str) -> float:
    """The resident memory of a process, in megabytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def sweep(root: Path, seconds: float) -> list[float]:
    """Run ``ablate`` with more seeds than there is time for; return its own process's memory."""
    command = [sys.executable, "-m", "resnetv2_cli", "ablate", "--shortcut", "dropout", *SMALL]
    command += ["--steps", "8", "--eval-every", "0.1", "--runs", "10000", "--output", str(root)]
    seen = []
    with open(root.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            time.sleep(LOOK)
            seen.append(resident(process.pid))
        assert process.poll() is None, "the sweep ended before its time"
        process.terminate()
        process.wait(timeout=300)
    return seen


def trainings(root: Path, seconds: float) -> list[float]:
    """Train again and again in this process; return its memory after each training."""
    torch.set_num_threads(1)
    experiment = Experiment(
        dataset="digits", depth=8, batch_size=16, steps=8, log_every=4, eval_every=0.1
    )
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        folder = RunFolder(root / "run")
        run.train(experiment, folder)
        shutil.rmtree(folder.path)
        seen.append(resident("self"))
    return seen


def growth(seen: list[float]) -> dict[str, float]:
    """Mean megabytes in the second and the last fifth of the readings, and the slope of a line
    through all but the first fifth, in which a process fills its caches, in megabytes per
    reading."""
    kept = seen[len(seen) // 5 :]
    fifth = max(1, len(kept) // 4)
    middle = (len(kept) - 1) / 2
    slope = sum((i - middle) * m for i, m in enumerate(kept))
    slope /= sum((i - middle) ** 2 for i in range(len(kept))) or 1
    return {
        "looks": len(seen),
        "second_fifth": round(mean(kept[:fifth]), 1),
        "last_fifth": round(mean(kept[-fifth:]), 1),
        "most": round(max(seen), 1),
        "slope": round(slope, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=180)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="resnetv2-soak-"))
    half = 60 * given.minutes / 2
    arms = sweep(root / "lab", half)
    made = {"minutes": given.minutes, "sweep": growth(arms)}
    made["sweep"]["runs"] = len(list((root / "lab").rglob("result.json")))
    print(json.dumps(made["sweep"]), flush=True)
    made["trainings"] = growth(trainings(root, half))
    print(json.dumps(made, indent=2))
    if given.output:
        given.output.write_text(json.dumps(made, indent=2))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
