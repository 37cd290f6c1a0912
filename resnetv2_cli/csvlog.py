"""Metrics files as they are written; ``runfolder`` reads them, without waiting for a framework."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CSVMetrics(Logger):
    """A CSV file that is only ever appended to; a resumed run continues it after its step."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        # A run that was killed after its last evaluation makes that evaluation again.
        self.newest = path.read_text().splitlines()[-1] if path.exists() else ""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them."""

    @rank_zero_only
    def start(self, step: int) -> None:
        """Keep the lines up to iteration ``step``: later ones will be written again."""
        lines = [",".join(self.columns)]
        if self.path.exists():
            kept = self.path.read_text().splitlines()[1:]
            lines += [line for line in kept if int(line.split(",")[0]) <= step]
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text("\n".join(lines) + "\n")
        os.replace(partial, self.path)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        given = {"step": step} | metrics
        cells = [format_cell(given.get(c)) for c in self.columns]
        line = ",".join(cells)
        if any(cells[1:]) and line != self.newest:
            self.newest = line
            with self.path.open("a") as file:
                file.write(line + "\n")


def format_cell(value: float | int | None) -> str:
    """A number with six significant digits, or nothing."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"
