"""Writing of metrics files; ``runfolder`` reads them, without importing a framework."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from resnetv2_cli.files import write_text


class CSVMetrics(Logger):
    """A CSV file that is only ever appended to; a resumed run continues it after the step it
    resumes from.

    Lines that cannot be written because the disk is full are kept, and written with later ones.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        super().__init__()
        self.path, self.columns = path, columns
        self.waiting = ""
        self.newest = ""  # the last line: an evaluation that a continued run repeats is one line

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` has them."""

    def lines(self) -> list[str]:
        """The header and all complete lines: a power failure may leave part of one, or nothing."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        whole = [line for line in text.split("\n")[1:-1] if self.is_whole(line)]
        return [",".join(self.columns), *whole]

    def is_whole(self, line: str) -> bool:
        cells = line.split(",")
        return len(cells) == len(self.columns) and cells[0].isdecimal()

    @rank_zero_only
    def start(self, step: int) -> None:
        """Drop the lines after iteration ``step``: they will be written again."""
        header, *lines = self.lines()
        kept = [header, *(line for line in lines if int(line.split(",")[0]) <= step)]
        write_text(self.path, "\n".join(kept) + "\n")
        self.newest = kept[-1]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        given = {"step": step} | metrics
        cells = [format_cell(given.get(c)) for c in self.columns]
        line = ",".join(cells)
        if any(cells[1:]) and line != self.newest:
            self.newest = line
            self.waiting += line + "\n"
            with suppress(OSError):  # reported at the next checkpoint, which needs them on disk
                self.write()

    def write(self, *, flush: bool = False) -> None:
        """Append the waiting lines. ``flush``: and flush the file to disk.

        Raises:
            OSError: that failed. Lines that could not be written wait on, none of them in the file.
        """
        data = self.waiting.encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            if os.write(file, data) < len(data):
                os.ftruncate(file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self.waiting = ""
            if flush:
                os.fsync(file)
        finally:
            os.close(file)


def format_cell(value: float | int | None) -> str:
    """A number with six significant digits, or nothing."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"
