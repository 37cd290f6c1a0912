"""The progress of an ablation's runs: a live table on a terminal, lines in a log."""

import time
from collections.abc import Iterable

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from resnetv2_cli.ablation.arms import Arm
from resnetv2_cli.errors import UserError
from resnetv2_cli.runfolder import read_metrics

LOOK = 1.0  # seconds between looks at the metrics files
LINES = 60.0  # seconds between lines in a log


class Progress:
    """Announces what becomes of each run, and shows the running ones."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.ended = console, total, 0
        self.looked = self.said = time.monotonic()
        self.live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def announce(self, arm: Arm, state: str) -> None:
        """Print a line for a run that begins, stops or ends."""
        self.ended += arm.error is not None or arm.failure is not None
        line = f"[{self.ended}/{self.total}] {arm.row}, seed {arm.experiment.seed}: {state}"
        self.console.print(escape(line), soft_wrap=True, highlight=False)

    def watch(self, running: Iterable[Arm]) -> None:
        """Show how far the runs are, but not too often."""
        now = time.monotonic()
        if now - self.looked < LOOK:
            return
        self.looked = now
        if self.live:
            grid = Table.grid(padding=(0, 2))
            for arm in running:
                grid.add_row(escape(f"{arm.row}, seed {arm.experiment.seed}"), *place(arm))
            self.live.update(grid)
        elif now - self.said > LINES:
            self.said = now
            for arm in running:
                line = f"{arm.row}, seed {arm.experiment.seed}: " + "  ".join(place(arm))
                self.console.print(escape(line), soft_wrap=True, highlight=False)


def place(arm: Arm) -> list[str]:
    """Iteration, training loss and last validation and test errors of a run, from its files."""
    folder = arm.run
    if not folder.metrics.exists():
        return ["starting"]
    try:
        series = read_metrics(folder.metrics)
        steps = folder.experiment().steps
    except UserError:
        return ["starting"]
    if "train_loss" not in series:
        return [f"0/{steps:,}"]
    step, loss = series["train_loss"][-1]
    words = [f"{step:,}/{steps:,}", f"loss {loss:.3f}"]
    for split in ("val", "test"):
        if f"{split}_error" in series:
            words.append(f"{split} {series[f'{split}_error'][-1][1]:.2f} %")
    return words
