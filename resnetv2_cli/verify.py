"""Test whether a run that is killed or stopped, and continued, ends with the same bits as one that
is not: on this machine, with the user's own settings."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import trust
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError, last_error
from resnetv2_cli.manifest import READINGS
from resnetv2_cli.quantities import duration
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.telling import Tell, silent

STEPS = 20  # by default
TRIES = 10  # more runs than signals, because one may end before the moment that was drawn
POLL = 0.005  # seconds between looks at a child
# What may differ between equal runs: where, when and how often they were begun.
CIRCUMSTANCES = ("environment", READINGS, "extended")
PARTS = {
    "weights": "state_dict",
    "optimizer": "optimizer_states",
    "schedule": "lr_schedulers",
    "callbacks": "callbacks",
    "step": "global_step",
}


def difference(one: Any, other: Any, place: str = "") -> str:
    """The first place where two values are not the same bit for bit; empty if there is none."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{place}: other keys"
        found = (difference(one[k], other[k], f"{place}.{k}") for k in one)
        return next((d for d in found if d), "")
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{place}: {len(one)} and {len(other)}"
        found = (difference(a, b, f"{place}.{i}") for i, (a, b) in enumerate(zip(one, other)))  # noqa: B905
        return next((d for d in found if d), "")
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if same_bits(one, other) else f"{place}: other bits"
    return "" if one == other or (one != one and other != other) else f"{place}: {one}, {other}"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


def differences(one: RunFolder, other: RunFolder) -> dict[str, str]:
    """How the outputs of two finished runs differ, part by part: empty where bit for bit the same.

    Raises:
        UserError: a checkpoint is missing or damaged.
    """
    a, b = checkpoints.read(one.last), checkpoints.read(other.last)
    made = {part: difference(a.get(key), b.get(key), key) for part, key in PARTS.items()}
    lines, others = (f.metrics.read_text(encoding="utf-8").splitlines() for f in (one, other))
    made["metrics"] = difference(lines, others, "line")
    made["result"] = difference(result(one), result(other), "result")
    return made


def result(folder: RunFolder) -> dict[str, Any]:
    """The result of a run, without its circumstances."""
    whole = json.loads(folder.result.read_bytes())
    return {k: v for k, v in whole.items() if k not in CIRCUMSTANCES}


@dataclass
class Child:
    """One ``train`` command in its own process group, which is killed as a whole."""

    arguments: list[str]
    folder: RunFolder

    def __enter__(self) -> "Child":
        tool = [sys.executable, "-m", "resnetv2_cli", "train"]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [*tool, *self.arguments],
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()
        self.said.close()

    def begun(self) -> None:
        """Wait until it has locked its folder, or ended."""
        lock = self.folder.lock
        mark = lock.stat().st_mtime_ns if lock.exists() else 0
        while self.process.poll() is None:
            if lock.exists() and lock.stat().st_mtime_ns != mark:
                break
            time.sleep(POLL)
        self.since = time.time()

    def trained(self) -> float:
        """Seconds from ``begun`` to its result, which must exist; after that it only draws, and can
        no longer be stopped."""
        return self.folder.result.stat().st_mtime - self.since

    def ended(self, within: float | None = None) -> bool:
        """Wait until it ends, for ``within`` seconds at most; whether it has ended."""
        try:
            self.process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def check(self, *statuses: int) -> None:
        """
        Raises:
            UserError: it ended with another status; the message is its own.
        """
        if self.process.wait() not in statuses:
            self.said.seek(0)
            said = self.said.read()
            words = last_error(said) or said.strip().rpartition("\n")[2] or "it said nothing"
            raise UserError(f"one of the runs failed: {words}")


class Trial:
    """The same short training, repeated in folders under ``root``."""

    def __init__(
        self,
        experiment: Experiment,
        root: Path,
        more: list[str],
        seed: int,
        tell: Tell = silent,
    ) -> None:
        self.root, self.more, self.random, self.tell = root, more, random.Random(seed), tell
        self.config = root / "experiment.yaml"
        self.config.write_text(experiment.dump(), encoding="utf-8")
        self.seconds = 0.0

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / name)

    def arguments(self, folder: RunFolder) -> list[str]:
        """Arguments that begin the run, or continue it if it has begun."""
        if folder.begun:
            return ["--resume", str(folder.path), *self.more]
        return ["--config", str(self.config), "--output", str(folder.path), *self.more]

    def whole(self, name: str) -> RunFolder:
        """A run that is never stopped; the moments of signals are drawn from its training time."""
        folder = self.folder(name)
        self.seconds = self.to_its_end(folder)
        return folder

    def to_its_end(self, folder: RunFolder) -> float:
        """Begin a run, or continue it, and let it end; the seconds that it trained."""
        with Child(self.arguments(folder), folder) as child:
            child.begun()
            child.ended()
            child.check(0)
            return child.trained()

    def stopped(self, name: str, number: int, times: int) -> tuple[RunFolder, list[int]]:
        """A run that gets a signal at random moments and is continued; and the iteration that it
        continued after, each time."""
        folder = self.folder(name)
        steps: list[int] = []
        while len(steps) < times:
            with Child(self.arguments(folder), folder) as child:
                child.begun()
                if child.ended(self.random.uniform(0, self.seconds)):
                    child.check(0)
                    if not steps:  # it ended before the moment that was drawn
                        self.seconds = min(self.seconds, child.trained())
                    break
                child.send(number)
                child.ended()
                child.check(-number, 128 + number, 0)
            if folder.result.exists():
                break
            found = checkpoints.newest(folder.checkpoints, folder.last, silent)
            steps.append(found[1]["global_step"] if found else 0)
            self.tell(f"{signal.Signals(number).name}: it continues after iteration {steps[-1]}")
        self.to_its_end(folder)
        return folder, steps


def short(config: Path | None, flags: dict[str, Any]) -> Experiment:
    """The training that a config and flags describe, of STEPS iterations unless the flags give a
    length, with checkpoints throughout, so that signals arrive between them.

    Raises:
        UserError: the settings are not valid.
    """
    brief = {} if "steps" in flags or "epochs" in flags else {"steps": STEPS}
    often = max(1, {**flags, **brief}.get("steps", STEPS) // 6)
    settings = {"log_every": often, "save_every": often} | flags | brief
    experiment = Experiment.load(config, **settings)
    if "warmup" not in flags and (experiment.warmup or 0) > experiment.steps:
        return replace(experiment, warmup=None)  # the config's is for a longer training
    return experiment


def verify(
    experiment: Experiment,
    root: Path,
    kills: int,
    tell: Tell,
    seed: int,
) -> list[dict[str, Any]]:
    """For each way to stop a run: the iterations that it continued after, and for each part how it
    differs from that of the run that was never stopped. The first way is none: the same run again.

    Raises:
        UserError: a run failed for another reason.
    """
    trial = Trial(experiment, root, trust.flags(experiment.own.values()), seed, tell)
    tell("a run that is never stopped")
    began = time.monotonic()
    whole = trial.whole("whole")
    # Stopped runs take half as long on average, and each has the startup of a process.
    left = (4 + 0.75 * kills) * (time.monotonic() - began)
    tell(f"the same again; some {duration(left)} are left in all")
    same = differences(whole, trial.whole("again"))
    made: list[dict[str, Any]] = [{"stopped by": "nothing, run twice", "went on after": [], **same}]
    for number, times in ((signal.SIGKILL, kills), (signal.SIGTERM, 1)):
        name = signal.Signals(number).name
        tell(f"{name} at random moments, {times} in all")
        steps, found = several(trial, number, times, lambda folder: differences(whole, folder))
        made.append({"stopped by": name, "went on after": steps, **found})
    return made


def several(
    trial: Trial, number: int, times: int, look: Callable[[RunFolder], dict[str, str]]
) -> tuple[list[int], dict[str, str]]:
    """As many runs as it takes to send ``times`` signals; the iterations that they continued after,
    and the first difference found in each part.

    Raises:
        UserError: they end before they can be stopped.
    """
    steps: list[int] = []
    found: dict[str, str] = {}
    for run in range(times + TRIES):
        name = f"{signal.Signals(number).name}-{run}"
        folder, after = trial.stopped(name, number, times - len(steps))
        steps += after
        for part, place in look(folder).items():
            found[part] = found.get(part) or place
        if len(steps) >= times:
            return steps, found
    raise UserError("the runs end before they can be stopped", "give more --steps")
