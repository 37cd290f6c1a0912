"""Runs everything that has no result yet, some at a time; what fails is a row that says so."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from resnetv2_cli.ablation.arms import Arm
from resnetv2_cli.ablation.launch import Launcher, Started
from resnetv2_cli.errors import Stopped, UserError, last_error
from resnetv2_cli.signals import SIGNALS

POLL = 0.2  # seconds between looks at what runs
PATIENCE = 120.0  # seconds that runs are left to save when the ablation is stopped

TRACEBACK = "Traceback (most recent call last):"  # before indented lines, and what was raised

Announce = Callable[[Arm, str], None]
Watch = Callable[[Iterable[Arm]], None]


@dataclass
class Running:
    """A run in one of the places; ``heard``: how much its log had before."""

    arm: Arm
    slot: int
    lock: int
    started: Started
    heard: int


@dataclass
class Sweep:
    """Runs in ``jobs`` places at a time, seed by seed; several ablations may share a folder.

    ``announce`` is told what becomes of each run, ``watch`` what runs, again and again. When
    ``seconds`` are over, runs save and leave.
    """

    launcher: Launcher
    jobs: int
    announce: Announce
    watch: Watch
    seconds: float = math.inf
    running: list[Running] = field(default_factory=list)
    signal: int = 0
    over: bool = False

    def run(self, arms: Iterable[Arm]) -> None:
        """
        Raises:
            Stopped: Ctrl-C, SIGTERM, or the time is over; runs were left time to save, and the
                same command continues.
        """
        deadline = time.monotonic() + self.seconds
        each = {arm.folder: arm for arm in sorted(arms, key=seed)}.values()
        waiting = [arm for arm in each if not self.done(arm)]
        before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (waiting or self.running) and not self.signal:
                if time.monotonic() > deadline:
                    self.over = True
                    break
                waiting = self.fill(waiting)
                self.watch([r.arm for r in self.running])
                time.sleep(POLL)
                self.collect()
        finally:
            self.leave()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal:
            raise Stopped(signal.Signals(self.signal).name, SIGNALS[self.signal])
        if self.over:
            raise Stopped("the time is over", 0)

    @property
    def stopping(self) -> bool:
        """Whether runs are asked to leave, so that none of them failed by leaving."""
        return bool(self.signal) or self.over

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signal = number

    def fill(self, waiting: list[Arm]) -> list[Arm]:
        """Start what there is a place for; what still waits is returned. While all places are
        taken no file is looked at: there may be thousands of runs."""
        left: list[Arm] = []
        for i, arm in enumerate(waiting):
            if len(self.running) == self.jobs:
                return left + waiting[i:]
            if not self.done(arm) and not self.start(arm):
                left.append(arm)
        return left

    def done(self, arm: Arm) -> bool:
        """Whether a run has ended before, which is announced."""
        ended = arm.error is not None
        if ended:
            self.announce(arm, "done before")
        return ended

    def start(self, arm: Arm) -> bool:
        """Start a run, unless another ablation has it; whether it is looked after."""
        lock = arm.claim()
        if lock is None:
            return False
        if self.done(arm):  # another ablation ended it a moment ago
            os.close(lock)
            return True
        arm.clear()
        taken = {r.slot for r in self.running}
        slot = min(set(range(self.jobs)) - taken)
        self.announce(arm, "continuing" if arm.begun else "running")
        heard = arm.log.stat().st_size if arm.log.exists() else 0
        try:
            started = self.launcher.start(arm, slot, lock)
        except BaseException as error:
            os.close(lock)
            if not isinstance(error, OSError):
                raise
            raise UserError(f"cannot start {arm.row}: {error.strerror}") from None
        self.running.append(Running(arm, slot, lock, started, heard))
        return True

    def collect(self) -> None:
        """Take the runs that have ended out of their places."""
        for r in list(self.running):
            status = r.started.status()
            if status is None:
                continue
            self.running.remove(r)
            asked = self.stopping or status in SIGNALS.values()  # by us, or one by its own signal
            refused = r.arm.busy  # a job of another ablation, which waited in the queue, was first
            if r.arm.error is None and not asked and not refused:
                r.arm.fail(reason(r.arm, status, r.heard))
            os.close(r.lock)
            self.announce(r.arm, outcome(r.arm))

    def leave(self) -> None:
        """Ask what still runs to save, and wait for it."""
        for r in self.running:
            r.started.stop()
        deadline = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL)
            self.collect()


def seed(arm: Arm) -> int:
    """All rows get their first seed before any gets its second."""
    return arm.experiment.seed


def reason(arm: Arm, status: int, heard: int = 0) -> str:
    """Why a run ended without a result: its own last words, or the signal that killed it.

    ``heard``: bytes of its log that are of earlier attempts.
    """
    if status == -signal.SIGKILL:
        return "killed by SIGKILL: was the memory full? try a smaller --batch-size or fewer --jobs"
    text = arm.log.read_bytes()[heard:].decode(errors="replace") if arm.log.exists() else ""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if TRACEBACK in lines:
        _, _, after = text.rpartition(TRACEBACK)
        raised = [line for line in after.splitlines() if line.strip() and not line.startswith(" ")]
        return f"status {status}: {(raised or lines[-1:])[0]}"
    if error := last_error(text):
        return error
    words = lines[-1].strip() if lines else "it said nothing"
    return f"status {status}: {words}"


def outcome(arm: Arm) -> str:
    """One line on a run that has ended."""
    failure: dict[str, Any] | None = arm.failure
    if arm.error is not None:
        return f"fail: {failure['reason']}" if failure else f"test error {arm.error:.2f} %"
    if failure:
        return f"failed: {failure['reason']}"
    state = "another process trains it" if arm.busy else "stopped"
    return f"{state}; the same command continues"
