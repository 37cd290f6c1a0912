"""Leaving early, on a signal or when the time is up: all processes leave, and nothing is lost."""

import math
import os
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from resnetv2_cli.callbacks import AGREE_EVERY, Keeper, agreed, evaluates, stepped
from resnetv2_cli.errors import Stopped
from resnetv2_cli.signals import SIGNALS
from resnetv2_cli.task import Classification

TIME_OVER = 1000  # above the numbers of all signals


class Leaver(Callback):
    """Saves and leaves at the next iteration on a signal, or after ``deadline``, a time of the
    monotonic clock. During an evaluation after training everything is saved already: a single
    process leaves at once, several leave after a batch.

    Its handlers are installed while it is entered, and set a flag: several processes agree, every
    ten iterations, before any of them saves. A second Ctrl-C leaves at once.

    Raises:
        Stopped: with the exit status, 128 + the signal's number, or 0 when the time is up.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline, self.signal = deadline, 0
        self.keeper: Keeper | None = None  # who saves, in training
        self.at_once = False
        self.shared = 0  # batches of an evaluation that every process has in common

    def __enter__(self) -> "Leaver":
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # ``cluster.Launcher`` blocked them
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            os._exit(SIGNALS[signal.SIGINT])
        self.signal = number
        if self.at_once:
            raise stopped(number)

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx) or evaluates(trainer, batch_idx):
            return
        if trainer.world_size == 1 or trainer.global_step % AGREE_EVERY == 0:
            self.leave(trainer, task)

    def wish(self, trainer: Trainer) -> int:
        """What all processes agree on: a signal's number, ``TIME_OVER`` or 0."""
        late = time.monotonic() > self.deadline
        return agreed(trainer, self.signal or (TIME_OVER if late else 0))

    def leave(self, trainer: Trainer, task: Classification) -> None:
        if (wish := self.wish(trainer)) and trainer.global_step < trainer.max_steps:
            assert self.keeper is not None
            if self.keeper.saved_step != trainer.global_step:  # else last.ckpt is of it already
                self.keeper.save(trainer, task, leaving=True)
            raise stopped(wish)

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.leave(trainer, task)
        self.at_once = False

    def on_validation_start(self, trainer: Trainer, task: Classification) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.begin(trainer, trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_batch_end(trainer, task, outputs, batch, batch_idx)

    def on_test_start(self, trainer: Trainer, task: Classification) -> None:
        self.begin(trainer, trainer.num_test_batches)

    def on_test_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Asking waits for a GPU. On a CPU there is nothing to wait for, and a batch takes long.
        often = trainer.strategy.root_device.type == "cpu" or (batch_idx + 1) % AGREE_EVERY == 0
        if often and batch_idx < self.shared:
            self.leave_evaluation(trainer)

    def on_test_end(self, trainer: Trainer, task: Classification) -> None:
        self.at_once = False

    def begin(self, trainer: Trainer, batches: Sequence[float]) -> None:
        """Before the first batch of an evaluation after training."""
        self.shared = -agreed(trainer, -int(sum(batches)))  # another process may have one fewer
        self.at_once = trainer.world_size == 1
        self.leave_evaluation(trainer)

    def leave_evaluation(self, trainer: Trainer) -> None:
        if wish := self.wish(trainer):
            raise stopped(wish)


def stopped(wish: int) -> Stopped:
    """The exception that a signal, or the end of the time, ends the command with."""
    if wish == TIME_OVER:
        return Stopped("the time is over", 0)
    return Stopped(signal.Signals(wish).name, SIGNALS[wish])
