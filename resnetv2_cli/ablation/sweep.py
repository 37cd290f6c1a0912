"""Run everything that has no result yet, some at a time; a failure is reported in its row."""

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

POLL = 0.2  # seconds between checks of the runs
PATIENCE = 120.0  # seconds that runs have to save when the ablation is stopped

TRACEBACK = "Traceback (most recent call last):"  # followed by indented lines and the exception

Announce = Callable[[Arm, str], None]
Watch = Callable[[Iterable[Arm]], None]


@dataclass
class Running:
    """A run in one of the slots; ``heard``: bytes that its log had before."""

    arm: Arm
    slot: int
    lock: int
    started: Started
    heard: int


@dataclass
class Sweep:
    """Runs arms seed by seed, ``jobs`` at a time; several ablations may share a folder.

    ``announce`` is called when a run starts or ends, ``watch`` with the running ones, again and
    again. After ``seconds``, runs save and exit.
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
        """Run what has no result yet.

        Raises:
            Stopped: Ctrl-C, SIGTERM, or the time is over; runs had time to save, and the same
                command continues.
        """
        deadline = time.monotonic() + self.seconds
        # All rows get their first seed before any gets its second.
        in_order = sorted(arms, key=lambda arm: arm.experiment.seed)
        waiting = [arm for arm in in_order if not self.done(arm)]
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
        """Whether runs were asked to exit, so that their exit is not a failure."""
        return bool(self.signal) or self.over

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self.signal = number

    def fill(self, waiting: list[Arm]) -> list[Arm]:
        """Start runs while there are free slots, and return those that still wait. While all slots
        are taken no file is read: there may be thousands of runs."""
        left: list[Arm] = []
        for i, arm in enumerate(waiting):
            if len(self.running) == self.jobs:
                return left + waiting[i:]
            if not self.done(arm) and not self.start(arm):
                left.append(arm)
        return left

    def done(self, arm: Arm) -> bool:
        """Whether a run already has a result; if so, that is announced."""
        ended = arm.error is not None
        if ended:
            self.announce(arm, "done before")
        return ended

    def start(self, arm: Arm) -> bool:
        """Start a run unless another ablation has it; return False if it must wait."""
        lock = arm.claim()
        if lock is None:
            return False
        if self.done(arm):  # another ablation finished it a moment ago
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
        """Remove the runs that have ended from their slots."""
        for r in list(self.running):
            status = r.started.status()
            if status is None:
                continue
            self.running.remove(r)
            asked = self.stopping or status in SIGNALS.values()  # by us, or by a signal of its own
            refused = r.arm.busy  # by a job of another ablation that had waited in the queue
            if r.arm.error is None and not asked and not refused:
                r.arm.fail(reason(r.arm, status, r.heard))
            os.close(r.lock)
            self.announce(r.arm, outcome(r.arm))

    def leave(self) -> None:
        """Ask the running runs to save and exit, and wait for them."""
        for r in self.running:
            r.started.stop()
        deadline = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL)
            self.collect()


def reason(arm: Arm, status: int, heard: int = 0) -> str:
    """Why a run ended without a result: its error or last line, or the signal that killed it.

    ``heard``: bytes of its log that are from earlier attempts.
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
    """One line about a run that has ended."""
    failure: dict[str, Any] | None = arm.failure
    if arm.error is not None:
        return f"fail: {failure['reason']}" if failure else f"test error {arm.error:.2f} %"
    if failure:
        return f"failed: {failure['reason']}"
    state = "another process trains it" if arm.busy else "stopped"
    return f"{state}; the same command continues"
