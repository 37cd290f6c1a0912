"""The folder of one run: its files, none of which is overwritten or lost."""

import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from resnetv2_cli import jsonfile
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import PARTIAL, write_text
from resnetv2_cli.locks import held
from resnetv2_cli.manifest import Manifest

RUNS = Path("runs")  # where runs are by default
OTHERS = "by_protocol"  # in a result: its scores under the protocols after the first

STATES = {  # of runs, in words
    "done": "done",
    "fail": "diverged",
    "crashed": "crashed",
    "running": "running",
    "stopped": "stopped",
    "waiting": "not begun",
}


class RunFolder:
    """Has ``config.yaml``, ``manifest.json``, ``metrics.csv``, ``speed.csv``, ``checkpoints/``, and
    at the end ``result.json`` and ``curves.png``, or ``failed.json`` if the run diverged or
    crashed; while a process trains in it, ``run.lock``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.lock = path / "run.lock"
        self.manifest = Manifest(path / "manifest.json")
        self.metrics = path / "metrics.csv"
        self.speed = path / "speed.csv"
        self.result = path / "result.json"
        self.failed = path / "failed.json"
        self.curves = path / "curves.png"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "previous.ckpt"
        self.best = self.checkpoints / "best.ckpt"

    @classmethod
    def of(cls, checkpoint: Path) -> "RunFolder":
        """The folder of the run that a checkpoint is in, in ``checkpoints`` or directly; if it is
        in none, the checkpoint's own folder."""
        inside = checkpoint.parent
        if not inside.name:  # it is in the working directory
            inside = inside.absolute()
        folder = cls(inside.parent)
        return folder if inside == folder.checkpoints else cls(inside)

    @classmethod
    def free(cls, experiment: Experiment) -> "RunFolder":
        """The default folder of a run: ``runs/NAME``, numbered if that is taken."""
        path, n = RUNS / experiment.name, 1
        while path.exists():
            n += 1
            path = RUNS / f"{experiment.name}.{n}"
        return cls(path)

    def beside(self, suffix: str) -> Path:
        """The path of what an ablation keeps beside the folder: the run's request, log or lock."""
        path = self.path if self.path.name not in ("", "..") else Path(os.path.abspath(self.path))
        return path.with_name(path.name + suffix)

    def refuse_if_used(self) -> None:
        """Refuse to begin a run in a folder that is in use.

        Raises:
            UserError: the folder already holds something other than the remains of a run that was
                killed before it began.
        """
        begun = {self.lock.name, self.manifest.path.name, self.checkpoints.name}
        if self.path.is_dir():
            whole = [p for p in self.path.iterdir() if p.suffix != PARTIAL]
            inside = [p for p in whole if p.name not in begun]
            free = not inside and not any(self.checkpoints.glob("*"))
        else:
            free = not self.path.exists()
        if not free:
            hint = f"name another with --output{self._way_on()}"
            raise UserError(f"{self.path} is not empty", hint)

    def _way_on(self) -> str:
        """What else a hint can suggest for a used folder, if it is that of a run."""
        if self.begun:
            return f", or continue it: resnetv2 train --resume {quote(str(self.path))}"
        if self.metrics.exists() or any(self.checkpoints.glob("*.ckpt")):
            return f", or restore this run's {self.config.name}"
        return ""

    def claimed(self) -> AbstractContextManager[None]:
        """Lock the folder: no other process trains in it meanwhile.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        return held(self.lock, "wait for it, or let it save and leave: kill -TERM")

    def create(self, experiment: Experiment, manifest: dict[str, Any]) -> None:
        """Begin a new run; the folder counts as one once it has its ``config.yaml``.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.checkpoints.mkdir(exist_ok=True)
            jsonfile.write(self.manifest.path, manifest)
            write_text(self.config, experiment.dump())
        except OSError as error:
            with suppress(OSError):
                self.manifest.path.unlink(missing_ok=True)
                self.checkpoints.rmdir()
            hint = "name another folder with --output"
            raise UserError(f"cannot write {self.path}: {error.strerror}", hint) from None

    def go_on(
        self, experiment: Experiment, step: int, changed: dict[str, Any], extended: dict[str, Any]
    ) -> None:
        """Continue the run after iteration ``step``: write changes to ``config.yaml``, and rename
        the result of a shorter training.

        Raises:
            OSError: it cannot be written.
        """
        self.manifest.add_resume(step, changed, extended)
        if changed:
            write_text(self.config, experiment.dump())
        if self.result.exists():
            self.result.rename(self.path / f"result-{step:08d}.json")
            self.curves.unlink(missing_ok=True)
        self.failed.unlink(missing_ok=True)

    @property
    def begun(self) -> bool:
        """Whether it is the folder of a run."""
        return self.config.is_file()

    def read_result(self) -> dict[str, Any]:
        """The content of ``result.json``; empty if it is missing or damaged, or lacks the test
        error, or one under another protocol that it names."""
        said = jsonfile.mapping(self.result)
        others = said.get(OTHERS, {})
        errors = [said.get("test_error")]
        shapes = {OTHERS: dict, "environment": dict, "classes": int}
        if not all(isinstance(said.get(name, kind()), kind) for name, kind in shapes.items()):
            return {}
        errors += [scores.get("error") for scores in others.values() if isinstance(scores, dict)]
        whole = len(errors) == 1 + len(others) and all(map(jsonfile.is_number, errors))
        return said if whole else {}

    def read_failure(self) -> dict[str, Any]:
        """Why the run failed: ``reason``, and whether the loss ``diverged``; empty if it did not
        fail, or the file cannot be read."""
        said = jsonfile.mapping(self.failed)
        return {"reason": "unknown", "diverged": True} | said if said else {}

    @property
    def diverged(self) -> str | None:
        """Why the run diverged; None if it did not."""
        said = self.read_failure()
        return said["reason"] if said and said["diverged"] else None

    def experiment(self) -> Experiment:
        """The experiment of the run.

        Raises:
            UserError: the folder is not that of a run.
        """
        if not self.begun:
            raise UserError(f"{self.path} is not the folder of a run", "it has no config.yaml")
        return Experiment.load(self.config)


def refuse_needed(path: Path) -> None:
    """Refuse to overwrite what a run needs to be continued, or its results.

    Raises:
        UserError: the path is that of such a file.
    """
    whole = Path(os.path.realpath(path))  # ``resolve`` raises for a link to itself
    own, above = RunFolder(whole.parent), RunFolder(whole.parent.parent)
    needed = [own.config, own.manifest.path, own.metrics, own.speed, own.result, own.lock]
    if (own.begun and whole in needed) or (above.begun and whole.parent == above.checkpoints):
        raise UserError(f"{path} is part of a run", "name another file with --output")


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each column of a metrics file as (iteration, value) pairs; empty if there is none yet.

    An incomplete line, as a power failure may leave it, is skipped.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    for line in lines[:-1]:
        with suppress(ValueError, KeyError):
            cells = dict(zip(header.split(","), line.split(","), strict=True))
            step = int(cells.pop("step"))
            for name, value in [(name, float(cell)) for name, cell in cells.items() if cell]:
                series.setdefault(name, []).append((step, value))
    return series
