"""One run of one row, its folder and its outcome; and the rows of a study with their runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from resnetv2_cli import jsonfile
from resnetv2_cli.ablation.studies import Study, digest, length, slug
from resnetv2_cli.config import Experiment
from resnetv2_cli.locks import inherited, taken
from resnetv2_cli.options import PAPER_STEPS
from resnetv2_cli.paper import FAIL, Row
from resnetv2_cli.runfolder import OTHERS, RunFolder
from resnetv2_cli.stats import Pairs, Summary

# Settings that do not depart from the recipe of the paper's errors.
HARMLESS = {f.name for f in fields(Experiment) if f.metadata["free"]} - {"weights"}
HARMLESS |= {"seed", "precision", "log_every", "eval_every"}
HELD_OUT = 5_000  # of CIFAR's training images, for choosing (as [1])


@dataclass(frozen=True)
class Arm:
    """One run of a row. Its folder is named after its experiment, including the user's own code, so
    that rows and studies share runs. ``tested``: the protocol that its errors are of, if not the
    first."""

    row: str
    experiment: Experiment
    folder: Path
    origins: Mapping[str, str] = field(default_factory=dict)  # of settings that are not defaults
    tested: str = ""

    @classmethod
    def of(
        cls,
        row: str,
        experiment: Experiment,
        root: Path,
        origins: Mapping[str, str] | None = None,
        tested: str = "",
    ) -> "Arm":
        name = experiment.name.removesuffix(f"-s{experiment.seed}")
        folder = root / f"{slug(name)}-{digest(experiment)}" / f"s{experiment.seed}"
        return cls(row, experiment, folder, origins or {}, tested)

    @property
    def run(self) -> RunFolder:
        """The contents of its folder."""
        return RunFolder(self.folder)

    @property
    def config(self) -> Path:
        """The file that requests the run, beside its folder."""
        return self.run.beside(".yaml")

    @property
    def log(self) -> Path:
        """The output of the run, beside its folder."""
        return self.run.beside(".log")

    @property
    def begun(self) -> bool:
        return self.run.begun

    @property
    def error(self) -> float | None:
        """Test error in percent, FAIL if it diverged, None if it has no result."""
        if scores := self.scores:
            return scores["error"]
        return FAIL if self.failure and self.failure["diverged"] else None

    @property
    def scores(self) -> dict[str, float]:
        """``error`` and ``top5_error`` on the test images, in percent; empty before its end."""
        result = self.run.read_result()
        if not result:
            return {}
        if self.watched:
            said = {name: result.get(f"test_{name}") for name in ("error", "top5_error")}
        else:
            said = result.get(OTHERS, {}).get(self.tested, {})
        return {name: float(value) for name, value in said.items() if jsonfile.is_number(value)}

    @property
    def watched(self) -> bool:
        """Whether its errors are of the protocol that its curve shows."""
        return self.tested in ("", self.experiment.protocols[0])

    @property
    def failure(self) -> dict[str, Any] | None:
        """Why it ended without a result: ``reason``, and whether the loss ``diverged``."""
        return self.run.read_failure() or None

    @property
    def crashed(self) -> bool:
        """Whether a mistake or a bug ended it; divergence is a result, not a crash."""
        return self.error is None and self.failure is not None

    def fail(self, reason: str) -> None:
        """Note that the run crashed; the next call of the same ablation tries it again."""
        file = self.run.failed
        file.parent.mkdir(parents=True, exist_ok=True)
        jsonfile.write(file, {"reason": reason, "diverged": False})

    def clear(self) -> None:
        """Forget a crash before the run is tried again."""
        self.run.failed.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """Whether a process trains in its folder, whoever started it."""
        return bool(taken(self.run.lock))

    def claim(self) -> int | None:
        """A lock that the run's process inherits; None while another process holds it, or while a
        queued job, which inherits no lock, trains on after its ablation has ended."""
        lock = inherited(self.run.beside(".lock"))
        if lock is not None and self.busy:
            os.close(lock)
            return None
        return lock


@dataclass(frozen=True)
class Line:
    """One row: what the paper published, and the runs with all seeds."""

    row: Row
    arms: list[Arm] = field(default_factory=list)

    @property
    def errors(self) -> dict[int, float]:
        """Test error by seed, in percent; FAIL for a run that diverged."""
        found = {arm.experiment.seed: arm.error for arm in self.arms}
        return {seed: error for seed, error in found.items() if error is not None}

    @property
    def top5(self) -> dict[int, float]:
        """Top-5 error by seed, in percent, on ImageNet; empty for other images."""
        if self.arms[0].experiment.dataset != "imagenet":
            return {}
        found = {arm.experiment.seed: arm.scores.get("top5_error") for arm in self.arms}
        return {seed: error for seed, error in found.items() if error is not None}

    @property
    def in_full(self) -> bool:
        """Whether it trains for at least the paper's 64,000 iterations, on all images except those
        that a protocol may hold out."""
        e = self.arms[0].experiment
        return e.val <= HELD_OUT and (length(e) or 0) >= PAPER_STEPS

    @property
    def summary(self) -> Summary:
        return Summary(tuple(self.errors.values()))

    @property
    def failures(self) -> list[str]:
        """The reasons why runs crashed, each once."""
        reasons = [arm.failure["reason"] for arm in self.arms if arm.failure and arm.crashed]
        return list(dict.fromkeys(reasons))


@dataclass(frozen=True)
class Ablation:
    """A study and its runs, one line per row.

    ``title``: the table's, with everything that makes all rows differ from the paper's recipe;
    ``comparable``: whether none of these differences was asked for here.
    """

    study: Study
    lines: list[Line]
    root: Path
    title: str
    scale: str = "paper"
    protocol: str = "paper"
    comparable: bool = True

    @property
    def file(self) -> Path:
        """What a report reads: rows, published errors, and where the runs are."""
        return self.root / f"ablation-{self.study.name}.json"

    def line(self, name: str) -> Line | None:
        return next((line for line in self.lines if line.row.name == name), None)

    def pairs(self, line: Line) -> Pairs:
        """A row paired with its baseline, seed by seed."""
        baseline = self.line(line.row.baseline)
        return Pairs.of(line.errors, baseline.errors if baseline else {})

    @property
    def trainings(self) -> list[Line]:
        """One row for each training. Where several rows test the same training, it is the one whose
        protocol is used during training, if there is one: the curves are of that protocol."""
        first: dict[Path, Line] = {}
        for line in sorted(self.lines, key=lambda line: not line.arms[0].watched):
            first.setdefault(line.arms[0].folder, line)
        return [line for line in self.lines if first[line.arms[0].folder] is line]

    def curves(self) -> dict[str, dict[str, Path]]:
        """Metrics files of each panel's rows, first seed; all rows in one panel if the table has
        none. A panel's title also names all differences from the paper's recipe, and says that the
        curves are of the first seed where there are more, since the table beside it is of all."""
        table = self.study.table
        panels = table.panels or {table.title: tuple(line.row.name for line in self.lines)}
        below = self.title.removeprefix(table.title)
        if any(len(line.arms) > 1 for line in self.lines):
            below += "\nfirst seed of each row"
        drawn = {
            line.row.name: metrics
            for line in self.trainings
            if (metrics := line.arms[0].run.metrics).exists()
        }
        return {
            panel + below: {name: drawn[name] for name in names if name in drawn}
            for panel, names in panels.items()
        }
