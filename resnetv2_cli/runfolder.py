"""The folder of one run: what is in it, and that nothing in it is overwritten or lost."""

import csv
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError

PACKAGES = ["resnetv2-cli", "torch", "torchvision", "lightning", "torchmetrics", "numpy"]


class RunFolder:
    """``config.yaml``, ``environment.json``, ``metrics.csv``, ``speed.csv``, ``checkpoints/``,
    and at the end ``result.json`` and ``curves.png``, or ``failed.json`` if the loss diverged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.csv"
        self.speed = path / "speed.csv"
        self.result = path / "result.json"
        self.failed = path / "failed.json"
        self.curves = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"

    @classmethod
    def free(cls, experiment: Experiment, root: Path = Path("runs")) -> "RunFolder":
        """The folder for a run that was given none: ``runs/NAME``, numbered if that is taken."""
        path, n = root / experiment.name, 1
        while path.exists():
            n += 1
            path = root / f"{experiment.name}.{n}"
        return cls(path)

    def refuse_if_used(self) -> None:
        """
        Raises:
            UserError: the folder holds something already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"{self.path} is not empty",
                f"name another with --output, or continue it: resnetv2 train --resume {self.path}",
            )

    def create(self, experiment: Experiment) -> None:
        """Make the folder of a new run.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True)
            self.config.write_text(experiment.dump())
            write_json(self.environment, environment())
        except OSError as error:
            hint = "name another folder with --output"
            raise UserError(f"cannot write {self.path}: {error.strerror}", hint) from None

    def experiment(self) -> Experiment:
        """What the run is.

        Raises:
            UserError: the folder is not that of a run.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path} is not the folder of a run", "it has no config.yaml")
        return Experiment.load(self.config)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value, wholly or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each column of a metrics file as (iteration, value) pairs."""
    series: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name != "step":
                    series.setdefault(name, []).append((int(row["step"]), float(cell)))
    return series


def environment() -> dict[str, Any]:
    """Command, versions, hardware and commit: what a number is reported with."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "hardware": hardware(),
        "cpu_threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def hardware() -> str:
    """``1 x NVIDIA H100``, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores, {name}"


def commit() -> str:
    """The commit of this package's own checkout, ``+`` if it was changed since; else empty."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
