"""What happens around the training steps: metrics, checkpoints, and leaving early."""

import math
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from resnetv2_cli.csvlog import CSVMetrics
from resnetv2_cli.errors import Diverged, Stopped
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.task import Classification

SAVE_SECONDS = 600.0  # last.ckpt is hardly older than this, however long an epoch takes
AGREE_EVERY = 10  # iterations between the questions of several processes what they wish


def agreed(trainer: Trainer, wish: int) -> int:
    """The largest wish of all processes, so that they do the same at the same iteration."""
    if trainer.world_size == 1:
        return wish
    number = torch.tensor(wish, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op="max"))


def diverged(step: int) -> Diverged:
    """The error of a run whose loss is no longer finite."""
    return Diverged(
        f"the loss is not finite at iteration {step}",
        "try a lower --lr, a longer --warmup or --precision 32-true; the last checkpoint is kept",
    )


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch completed an iteration."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Recorder(Callback):
    """Writes ``metrics.csv`` every ``log_every`` iterations, and after each evaluation.

    Raises:
        Diverged: the loss is no longer finite.
    """

    def __init__(self, csv: CSVMetrics, speed: CSVMetrics, log_every: int, scored: str) -> None:
        self.csv, self.speed, self.log_every, self.scored = csv, speed, log_every, scored
        self.latest: dict[str, float] = {}
        self.mark = 0.0  # when the images after the first ``before`` of ``sums`` began
        self.before = 0.0
        self.lr = 0.0
        self.kept: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["sums"]

    def on_save_checkpoint(self, trainer: Trainer, task: Classification, checkpoint: Any) -> None:
        # Every process has its own sums: the first takes them all, the others start again.
        total = trainer.strategy.reduce(task.sums.clone(), reduce_op="sum")
        task.sums.copy_(total if trainer.is_global_zero else torch.zeros_like(total))
        checkpoint["callbacks"][self.state_key] = {"sums": task.sums.cpu().clone()}

    def on_train_start(self, trainer: Trainer, task: Classification) -> None:
        if self.kept is not None and trainer.is_global_zero:
            task.sums.copy_(self.kept)
        for file in (self.csv, self.speed):
            file.start(trainer.global_step)
        self.before = float(task.sums[2])
        self.mark = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, task: Classification, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not stepped(trainer, batch_idx):
            return
        if step % self.log_every and step != trainer.max_steps:
            return
        sums = trainer.strategy.reduce(task.sums.clone(), reduce_op="sum")
        task.sums.zero_()
        loss, wrong, images = sums.tolist()
        if not math.isfinite(loss):
            raise diverged(step)
        now = time.perf_counter()
        rate = (images - self.before) / (now - self.mark)
        self.mark, self.before = now, 0.0
        metrics = {
            "epoch": round(step / trainer.datamodule.steps_per_epoch, 4),  # type: ignore
            "lr": self.lr,
            "train_loss": loss / images,
            "train_error": 100 * wrong / images,
            "images_per_second": rate,
        }
        self.latest |= metrics
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_validation_start(self, trainer: Trainer, task: Classification) -> None:
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        self.mark += time.perf_counter() - self.began
        self.evaluated(trainer, task)

    def evaluated(self, trainer: Trainer, task: Classification) -> None:
        """Log the last evaluation at its iteration."""
        error, loss, step = (task.scores[k] for k in ("error", "loss", "step"))
        epoch = round(step / trainer.datamodule.steps_per_epoch, 4)  # type: ignore
        metrics = {"epoch": epoch, f"{self.scored}_loss": loss, f"{self.scored}_error": error}
        self.latest |= metrics
        for logger in trainer.loggers:
            if logger is not self.speed:
                logger.log_metrics(metrics, step)


class Keeper(Callback):
    """Keeps ``last.ckpt`` after each evaluation, every ten minutes, and on leaving early;
    ``best.ckpt`` by the validation error; and a numbered one every ``save_every`` iterations.

    The best on the test set is never kept: choosing by it is what a test set must not be used for.
    """

    def __init__(self, folder: RunFolder, save_every: int, choose: bool) -> None:
        self.folder, self.save_every, self.choose = folder, save_every, choose
        self.best = math.inf
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def save(self, trainer: Trainer, task: Classification) -> None:
        """Replace ``last.ckpt``.

        Raises:
            Diverged: something in the network is not finite; the last checkpoint stays.
        """
        values = [task.sums, *task.net.parameters()]
        if agreed(trainer, not all(bool(torch.isfinite(v).all()) for v in values)):
            raise diverged(trainer.global_step)
        trainer.save_checkpoint(self.folder.last)
        self.saved_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        if self.choose and task.scores["error"] < self.best:
            self.best = task.scores["error"]
            trainer.save_checkpoint(self.folder.best)
        self.save(trainer, task)

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx) or evaluates(trainer, batch_idx):
            return  # after an evaluation it is saved anyway, and then with its result
        step = trainer.global_step
        if self.save_every and step % self.save_every == 0:
            trainer.save_checkpoint(self.folder.checkpoints / f"step-{step:08d}.ckpt")
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        if step == trainer.max_steps or (step % AGREE_EVERY == 0 and agreed(trainer, late)):
            self.save(trainer, task)


def evaluates(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an evaluation follows this micro-batch."""
    return (batch_idx + 1) % trainer.val_check_batch == 0  # type: ignore[operator]


SIGNALS = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGUSR1: 138,
    signal.SIGUSR2: 140,
}
TIME_OVER = 1000  # beside the numbers of signals


class Leaver(Callback):
    """Saves and leaves at the next iteration on a signal, or when ``seconds`` are over.

    A second Ctrl-C leaves at once. The handler only sets a flag: several processes agree, every
    ten iterations, before any of them saves.

    Raises:
        Stopped: with the exit status, 128 + the signal's number, or 0 when the time is over.
    """

    def __init__(self, keeper: Keeper, seconds: float | None) -> None:
        self.keeper, self.signal = keeper, 0
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds

    def on_train_start(self, trainer: Trainer, task: Classification) -> None:
        # After Lightning's own, which broadcasts inside the handler; its teardown restores all.
        for number in SIGNALS:
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            os._exit(SIGNALS[signal.SIGINT])
        self.signal = number

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx) or evaluates(trainer, batch_idx):
            return
        if trainer.world_size == 1 or trainer.global_step % AGREE_EVERY == 0:
            self.leave(trainer, task)

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        self.leave(trainer, task)

    def leave(self, trainer: Trainer, task: Classification) -> None:
        late = time.monotonic() > self.deadline
        wish = agreed(trainer, self.signal or (TIME_OVER if late else 0))
        if wish and trainer.global_step < trainer.max_steps:
            self.keeper.save(trainer, task)
            if wish == TIME_OVER:
                raise Stopped("the time is over", 0)
            raise Stopped(signal.Signals(wish).name, SIGNALS[signal.Signals(wish)])
