"""The progress of a training run: a bar on a terminal, plain lines in a log file."""

import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from resnetv2_cli.callbacks import Recorder, stepped

LINES = 10.0  # least seconds between plain lines
REFRESH = 0.5  # least seconds between updates of the bar
RECENT = 600.0  # seconds that a pace is measured over
MARKS = 20  # samples in that time

SCORES = {  # the newest metrics, in words
    "train_loss": "loss {train_loss:.3f}",
    "train_error": "train {train_error:.1f} %",
    "val_error": "val {val_error:.2f} % at {evaluated:,}",
    "test_error": "test {test_error:.2f} % at {evaluated:,}",
    "lr": "lr {lr:.3g}",
    "skipped": "skipped {skipped:.0f}",
}


class Pace:
    """Iterations per second, including evaluations, over the last ten minutes: an earlier pause, or
    other work on the machine then, says nothing about how long the rest takes."""

    def __init__(self) -> None:
        self.marks: deque[tuple[float, int]] = deque()  # time, iterations done by then

    def at(self, now: float, step: int) -> float:
        """The pace at time ``now``, with ``step`` iterations done; 0 at the first call."""
        while len(self.marks) > 1 and now - self.marks[1][0] >= RECENT:
            self.marks.popleft()
        if not self.marks or now - self.marks[-1][0] >= RECENT / MARKS:
            self.marks.append((now, step))
        since, before = self.marks[0]
        return (step - before) / max(1e-9, now - since)


class Display(Callback):
    """Shows epoch, it/s, images/s, time left; loss, training and test error, lr."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.shown = 0.0
        self.live: Live | None = None
        self.recent = Pace()

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data.train_images + data.experiment.val < data.dataset.train:
            part = f"{data.train_images:,} of its {data.dataset.train:,} training images"
            self.console.print(f"note: only a part of {data.experiment.dataset}: {part}")
        parts, whole = trainer.world_size, data.experiment.batch_size
        micro = data.experiment.accumulate
        if parts * micro > 1:
            each = "about " if whole % (parts * micro) else ""
            each += f"{whole / parts / micro:.0f}"
            each += f" on each of {parts} devices" if parts > 1 else ""
            times = f", {micro} times" if micro > 1 else ""
            self.console.print(f"{whole:,} images an iteration: {each}{times}")
        if self.console.is_terminal:
            bar = BarColumn(bar_width=20)
            self.bar = Progress(bar, TaskProgressColumn(), TextColumn("{task.description}"))
            self.row = self.bar.add_task("starting", total=trainer.max_steps)
            self.scores = Text()
            self.live = Live(Group(self.bar, self.scores), console=self.console)
            self.live.start()

    def on_train_batch_start(
        self, trainer: Trainer, task: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.recent.marks:  # after the capture of graphs, which is no iteration
            self.recent.at(time.monotonic(), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or not stepped(trainer, batch_idx):
            return
        now, step = time.monotonic(), trainer.global_step
        last, latest = step == trainer.max_steps, self.recorded(trainer)
        if not last and now - self.shown < (REFRESH if self.live else LINES):
            return
        if last:  # the known scores are of an earlier iteration; those of the last come next
            latest = {k: v for k, v in latest.items() if k not in ("val_error", "test_error")}
        scores = "  ".join(said.format(**latest) for key, said in SCORES.items() if key in latest)
        if self.live:
            self.bar.update(self.row, completed=step, description=self.pace(trainer))
            self.scores.plain = scores
        elif latest:
            place = f"step {step:,}/{trainer.max_steps:,}"
            self.console.print(f"{place}  {self.pace(trainer)}  {scores}", soft_wrap=True)
        else:
            return
        self.shown = now

    @staticmethod
    def recorded(trainer: Trainer) -> dict[str, float]:
        """The newest metrics."""
        [recorder] = [c for c in trainer.callbacks if isinstance(c, Recorder)]  # type: ignore
        return recorder.latest

    def pace(self, trainer: Trainer) -> str:
        """Where the run is, how fast it goes and how long is left."""
        step, latest = trainer.global_step, self.recorded(trainer)
        rate = self.recent.at(time.monotonic(), step)
        epoch = step / trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        parts = [f"epoch {epoch:.1f}", f"{rate:.2f} it/s"]
        if "images_per_second" in latest:
            parts.append(f"{latest['images_per_second']:,.0f} images/s")
        left = (trainer.max_steps - step) / max(rate, 1e-9)
        return "  ".join([*parts, f"{clock(left)} left"])

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def on_train_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, task: LightningModule, error: BaseException) -> None:
        self.close()


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
