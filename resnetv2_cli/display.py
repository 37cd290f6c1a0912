"""The progress of a training run: a bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from resnetv2_cli.callbacks import Recorder, stepped

LINES = 10.0  # seconds between plain lines, at least


class Display(Callback):
    """epoch, it/s, images/s, loss, training and test error, lr and time left."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.shown = 0.0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.began, self.first = time.monotonic(), trainer.global_step
        if self.console.is_terminal:
            columns = (
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console, transient=False)
            self.row = self.bar.add_task("starting", total=trainer.max_steps)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not stepped(trainer, batch_idx):
            return
        now, last = time.monotonic(), trainer.global_step == trainer.max_steps
        if self.bar and (last or now - self.shown > 0.5):
            self.shown = now
            text = self.line(trainer)
            self.bar.update(self.row, completed=trainer.global_step, description=text)
        elif not self.bar and (last or now - self.shown > LINES) and self.recorded(trainer):
            self.shown = now
            done = f"step {trainer.global_step:,}/{trainer.max_steps:,}"
            self.console.print(f"{done}  {self.line(trainer)}", soft_wrap=True)

    def recorded(self, trainer: Trainer) -> dict[str, float]:
        [recorder] = [c for c in trainer.callbacks if isinstance(c, Recorder)]  # type: ignore
        return recorder.latest

    def line(self, trainer: Trainer) -> str:
        """The state of the run in one line."""
        latest, step = self.recorded(trainer), trainer.global_step
        rate = (step - self.first) / max(1e-9, time.monotonic() - self.began)
        left = (trainer.max_steps - step) / max(rate, 1e-9)
        epoch = step / trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        parts = [f"epoch {epoch:.1f}", f"{rate:.2f} it/s"]
        names: dict[str, Callable[[float], str]] = {
            "images_per_second": lambda v: f"{v:,.0f} images/s",
            "train_loss": lambda v: f"loss {v:.3f}",
            "train_error": lambda v: f"train {v:.1f} %",
            "val_error": lambda v: f"val {v:.2f} %",
            "test_error": lambda v: f"test {v:.2f} %",
            "lr": lambda v: f"lr {v:.3g}",
        }
        parts += [show(latest[key]) for key, show in names.items() if key in latest]
        return "  ".join([*parts, f"{clock(left)} left"])

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, task: LightningModule, error: BaseException) -> None:
        self.close()


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
