"""Kill small runs at random moments, continue them, and compare them bit for bit with runs that
were never stopped; damage their checkpoints, and check that it is detected.

    python tests/stress/kills.py --kills 200 --damages 400 --seed 1 --output kills.json
    python tests/stress/kills.py --kills 20 --processes 2 --damages 0 --seed 1

Not a part of the ordinary test run. One process is forked for each training, so that 200 kills take
half an hour of one core; two processes are started as a user starts them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.resume import continued
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.telling import silent
from resnetv2_cli.verify import Trial, differences

SMALL = {
    "dataset": "digits", "depth": 8, "batch_size": 16, "steps": 24, "log_every": 4,
    "eval_every": 0.14, "save_every": 5,
}  # fmt: skip
SETTINGS = {
    "plain": {},
    "dropout, micro-batches": {"shortcut": "dropout", "unit": "original", "accumulate": 2},
    "validation split": {"val": 1000, "eval_every": 0.3},
    "stochastic depth, cosine": {"shortcut": "stochastic-depth", "schedule": "cosine"},
    "float32, no numbered checkpoints": {"precision": "32-true", "save_every": 0},
}


def train(folder: RunFolder, experiment: Experiment) -> None:
    """Begin or continue a run in this process, as the command does."""
    torch.set_num_threads(1)
    if folder.config.exists():
        experiment, _ = continued(folder, {})
        run.train(experiment, folder, resume=True)
    else:
        run.train(experiment, folder)


def forked(folder: RunFolder, experiment: Experiment, log: Path) -> int:
    """Train in a child process; return its ID."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("ab", 0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        train(folder, experiment)
        status = 0
    except Stopped as stopped:
        status = stopped.status
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, seconds: float | None = None) -> int | None:
    """The exit status of a child; None if it still runs after ``seconds``."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


class Single:
    """Runs in one process each."""

    def __init__(self, root: Path, experiment: Experiment) -> None:
        self.root, self.experiment, self.log = root, experiment, root / "log"
        began = time.monotonic()
        self.whole = RunFolder(root / "whole")
        assert wait(forked(self.whole, experiment, self.log)) == 0, self.log.read_text()
        self.seconds = time.monotonic() - began

    def killed(self, name: str, moments: random.Random, most: int) -> tuple[RunFolder, list[str]]:
        """Kill a run up to ``most`` times and let it end; return it and its state at each kill."""
        folder, had = RunFolder(self.root / name), []
        while True:
            child = forked(folder, self.experiment, self.log)
            moment = moments.uniform(0, self.seconds) if len(had) < most else None
            status = wait(child, moment)
            if status is None:
                os.kill(child, signal.SIGKILL)
                status = wait(child)
            if status == -signal.SIGKILL:
                had.append(state(folder))
            elif status == 0:
                return folder, had
            else:
                raise AssertionError(f"status {status}\n{self.log.read_text()[-3000:]}")


class Several:
    """Runs in two processes each, by the console command; both are killed, or one of them."""

    def __init__(self, root: Path, experiment: Experiment) -> None:
        self.trial = Trial(experiment, root, [], 0)
        self.whole = self.trial.whole("whole")
        self.seconds = self.trial.seconds

    def killed(self, name: str, moments: random.Random, most: int) -> tuple[RunFolder, list[str]]:
        self.trial.random, self.trial.seconds = moments, self.seconds
        folder, steps = self.trial.stopped(name, signal.SIGKILL, most)
        return folder, [f"checkpoint {s}" if s else "no checkpoint" for s in steps]


def state(folder: RunFolder) -> str:
    """How far a run had come when it was killed."""
    if not folder.config.exists():
        return "not begun"
    if folder.result.exists():
        return "result"
    saving = any(folder.checkpoints.glob("*.tmp"))
    return ("saving" if saving else "checkpoint") if folder.last.exists() else "no checkpoint"


def damaged(good: bytes, moments: random.Random) -> tuple[str, bytes]:
    """What was done to a checkpoint, and the checkpoint cut short or with some bits flipped."""
    if moments.random() < 0.3:
        at = moments.randrange(len(good))
        return f"cut after {at}", good[:at]
    flips = moments.choice([1, 1, 1, 2, 8])
    bad, places = bytearray(good), [moments.randrange(len(good)) for _ in range(flips)]
    if moments.random() < 0.2:  # in the seal itself
        places = [len(good) - 1 - moments.randrange(82)]
    for at in places:
        bad[at] ^= 1 << moments.randrange(8)
    return f"bits flipped at {places}", bytes(bad)


def damage(whole: RunFolder, root: Path, count: int, moments: random.Random) -> list[str]:
    """Damage ``last.ckpt`` of a finished run ``count`` times; return the damages that were read
    without an error, or where the newest intact checkpoint was not used instead."""
    missed = []
    copy = RunFolder(root / "damaged")
    shutil.copytree(whole.path, copy.path)
    good = copy.last.read_bytes()
    before = checkpoints.read(copy.previous)["global_step"]
    copies = list(copy.checkpoints.glob("step-*.ckpt"))
    newest = max([before, *(checkpoints.read(p)["global_step"] for p in copies)])
    for _ in range(count):
        what, bad = damaged(good, moments)
        if bad == good:
            continue
        copy.last.unlink()
        copy.last.write_bytes(bad)
        try:
            checkpoints.read(copy.last)
            missed.append(what)
            continue
        except UserError:
            pass
        found = checkpoints.newest(copy.checkpoints, copy.last, silent)
        if found is None or found[1]["global_step"] != newest:
            missed.append(f"{what}: continued from {found and found[0]}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    moments, began = random.Random(given.seed), time.monotonic()
    made = {"kills": 0, "runs": 0, "exact": 0, "had": Counter(), "wrong": []}
    images.load("digits", Path())  # decoded once, before several need it
    root = Path(tempfile.mkdtemp(prefix="resnetv2-kills-"))
    more = {} if given.processes == 1 else {"devices": "2", "accelerator": "cpu"}
    kind = Single if given.processes == 1 else Several
    names = list(SETTINGS)[: 2 if given.processes > 1 else None]
    makers = {}
    while made["kills"] < given.kills:
        name = names[made["runs"] % len(names)]
        if name not in makers:
            place = root / str(len(makers))
            place.mkdir()
            settings = {**SMALL, **SETTINGS[name], **more}
            makers[name] = kind(place, Experiment.load(**settings))
        most = min(moments.choice([1, 2, 3]), given.kills - made["kills"])
        folder, had = makers[name].killed(f"run{made['runs']}", moments, most)
        differ = {p: d for p, d in differences(makers[name].whole, folder).items() if d}
        made["runs"] += 1
        made["kills"] += len(had)
        made["had"].update(had)
        if differ:
            made["wrong"].append({"settings": name, "folder": str(folder.path), "differ": differ})
            print(f"WRONG: {name} {folder.path}: {differ}", file=sys.stderr, flush=True)
        else:
            made["exact"] += 1
            shutil.rmtree(folder.path)
        print(
            f"{made['kills']} kills, {made['exact']} of {made['runs']} runs exact, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    made["damages"], made["missed"] = given.damages, []
    if given.damages:
        first = makers[names[0]]
        made["missed"] = damage(first.whole, root, given.damages, moments)
        print(f"{given.damages} damages, missed: {made['missed']}")
    made["seconds"] = round(time.monotonic() - began)
    print(json.dumps(made, indent=2))
    if given.output:
        given.output.write_text(json.dumps(made, indent=2))
    if not made["wrong"] and not made["missed"]:
        shutil.rmtree(root)
    raise SystemExit(bool(made["wrong"] or made["missed"]))


if __name__ == "__main__":
    main()
