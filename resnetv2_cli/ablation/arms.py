"""One run of one row, its folder and what became of it; and the rows of a study with their runs."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from resnetv2_cli import jsonfile, plans
from resnetv2_cli.ablation.studies import (
    LENGTH,
    SCALES,
    Study,
    digest,
    length,
    published,
    slug,
    unusual,
)
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import inherited, taken
from resnetv2_cli.paper import FAIL, PaperTable, Row
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.stats import Pairs, Summary


@dataclass(frozen=True)
class Arm:
    """One run. Its folder is named after what it is, code of one's own with it, so that rows and
    studies share runs."""

    row: str
    experiment: Experiment
    folder: Path
    origins: Mapping[str, str] = field(default_factory=dict)  # of settings that are no defaults

    @classmethod
    def of(
        cls, row: str, experiment: Experiment, root: Path, origins: Mapping[str, str] | None = None
    ) -> "Arm":
        name = experiment.name.removesuffix(f"-s{experiment.seed}")
        folder = root / f"{slug(name)}-{digest(experiment)}" / f"s{experiment.seed}"
        return cls(row, experiment, folder, origins or {})

    @property
    def run(self) -> RunFolder:
        """What is in its folder."""
        return RunFolder(self.folder)

    @property
    def config(self) -> Path:
        """What the run is asked for, beside its folder."""
        return self.run.beside(".yaml")

    @property
    def log(self) -> Path:
        """What the run says."""
        return self.run.beside(".log")

    @property
    def begun(self) -> bool:
        return self.run.begun

    @property
    def error(self) -> float | None:
        """Test error in percent, FAIL if it diverged, None if it has not come to an end."""
        if result := self.run.read_result():
            return float(result["test_error"])
        return FAIL if self.failure and self.failure["diverged"] else None

    @property
    def failure(self) -> dict[str, Any] | None:
        """Why it ended without a result: ``reason``, and whether the loss ``diverged``."""
        return self.run.read_failure() or None

    @property
    def crashed(self) -> bool:
        """Whether it ended by a mistake or a bug; one that diverged is a result."""
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
        """A lock that the run's process inherits; None while another has it, or a job of a queue,
        which inherits nothing, trains on behind its ablation."""
        lock = inherited(self.run.beside(".lock"))
        if lock is not None and self.busy:
            os.close(lock)
            return None
        return lock


@dataclass(frozen=True)
class Line:
    """One row: what the paper published, and the runs of all seeds."""

    row: Row
    arms: list[Arm] = field(default_factory=list)

    @property
    def errors(self) -> dict[int, float]:
        """Seed: test error in percent, FAIL for a run that diverged."""
        found = {arm.experiment.seed: arm.error for arm in self.arms}
        return {seed: error for seed, error in found.items() if error is not None}

    @property
    def in_full(self) -> bool:
        """Whether the recipe is the paper's: that of a row of its own, or what the defaults are."""
        known = self.row.published == self.row.published
        return known or not RECIPE & unusual(asdict(self.arms[0].experiment)).keys()

    @property
    def summary(self) -> Summary:
        return Summary(tuple(self.errors.values()))

    @property
    def failures(self) -> list[str]:
        """The reasons of the runs that crashed, each once."""
        reasons = [arm.failure["reason"] for arm in self.arms if arm.failure and arm.crashed]
        return list(dict.fromkeys(reasons))


@dataclass(frozen=True)
class Ablation:
    """A study and its runs, one line a row.

    ``title``: the table's, with all that makes every row differ from the paper's recipe;
    ``comparable``: whether nothing does.
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
        """A row beside the one that it is compared with."""
        baseline = self.line(line.row.baseline)
        return Pairs.of(line.errors, baseline.errors if baseline else {})

    def curves(self) -> dict[str, dict[str, Path]]:
        """Metrics files of each panel's rows, first seed; all rows in one if it has no panels. A
        panel's title says all that differs from the paper's recipe, too."""
        table = self.study.table
        panels = table.panels or {table.title: tuple(line.row.name for line in self.lines)}
        differing = self.title.removeprefix(table.title)
        drawn = {
            line.row.name: metrics
            for line in self.lines
            if (metrics := line.arms[0].run.metrics).exists()
        }
        return {
            panel + differing: {name: drawn[name] for name in names if name in drawn}
            for panel, names in panels.items()
        }

    def write(self) -> None:
        """Leave ``file``, so that a report finds rows that have not begun too."""
        self.root.mkdir(parents=True, exist_ok=True)
        before = recorded(self.file)
        rows = [
            {
                "name": line.row.name,
                "figure": line.row.figure,
                "published": number(line.row.published),
                "spread": line.row.spread,
                "note": line.row.note,
                "baseline": line.row.baseline,
                "settings": unusual(asdict(replace(line.arms[0].experiment, seed=0))),
                "arms": self.runs(line, before.get(line.row.name, [])),
            }
            for line in self.lines
        ]
        jsonfile.write(
            self.file,
            {
                "title": self.title,
                "scale": self.scale,
                "protocol": self.protocol,
                "comparable": self.comparable,
                "panels": self.study.table.panels,
                "rows": rows,
            },
        )

    def runs(self, line: Line, before: list[str]) -> list[str]:
        """The folders of a row's runs, with those of more seeds that the record had before."""
        ours = [str(arm.folder.relative_to(self.root)) for arm in line.arms]
        begun = [place for place in before if RunFolder(self.root / place).begun]
        return list(dict.fromkeys([*ours, *begun]))


def recorded(file: Path) -> dict[str, list[str]]:
    """The folders of each row's runs in the file of an ablation; nothing if there is none."""
    try:
        rows = jsonfile.mapping(file).get("rows", [])
        return {str(row["name"]): [str(place) for place in row["arms"]] for row in rows}
    except (KeyError, TypeError):
        return {}


def number(error: float | None) -> float | str | None:
    """An error for JSON: percent, ``"fail"``, or null where there is none."""
    if error is None or error != error:
        return None
    return "fail" if error == FAIL else error


PROTOCOLS = {
    "paper": {},  # 50k training images, test error of the last iteration
    "val": {"val": 5000},  # 45k/5k: the checkpoint is chosen on the 5k, and tested once
}


def plan(
    study: Study,
    runs: int,
    given: Mapping[str, Any],
    root: Path,
    scale: str = "paper",
    protocol: str = "paper",
) -> Ablation:
    """A line for each row, with a run for each seed; seeds are the same in all rows.

    ``given``: settings that win over the rows' own.

    Raises:
        UserError: a setting does not fit a row, or two rows would be one run.
    """
    settled = {*given, *PROTOCOLS[protocol]}
    if settled & LENGTH:  # an axis of either would be nothing but a name
        settled |= LENGTH
    if twice := sorted(study.varied & settled):
        name = twice[0].replace("_", "-")
        if study.axes:
            raise UserError(f"{name} is an axis of the grid", "give it there alone")
        table = study.table.title.partition(":")[0]
        hint = f"leave rows out with --row, or make some of your own: --grid {name}=..."
        raise UserError(f"rows of {table} have a {name} of their own", hint)
    changed = {k: v for k, v in given.items() if k not in HARMLESS}
    asked = {row.name: row.settings for row in study.table.rows}
    study = study.at(scale)
    first = given.get("seed", 0)
    lines = []
    for row in study.table.rows:
        settings = {**study.table.base, **row.settings, **PROTOCOLS[protocol]}
        origins = (
            dict.fromkeys(study.table.base, f"recipe of {study.name}, scale {scale}")
            | dict.fromkeys(row.settings, f"row {row.name!r} of {study.name}")
            | dict.fromkeys(PROTOCOLS[protocol], f"protocol {protocol}")
            | dict.fromkeys(given, "flag of ablate")
            | {"seed": "ablate --runs"}
        )
        if LENGTH & {*given}:
            settings = {k: v for k, v in settings.items() if k not in LENGTH}
        settings |= fitting(given, settings.get("shortcut", "identity"))
        settings |= warmed(scale, settings, {*given, *study.axes})
        kept = {k: v for k, v in origins.items() if k in settings or k == "seed"}
        arms = [
            Arm.of(row.name, Experiment(**{**settings, "seed": seed}), root, kept)
            for seed in range(first, first + runs)
        ]
        if study.axes:
            shortcut = row.settings.get("shortcut", "identity")
            other = {k: v for k, v in asked[row.name].items() if k not in HARMLESS}
            row = replace(row, published=published(other | fitting(changed, shortcut)))
        check_held_out(arms[0].experiment)
        lines.append(Line(row, arms))
    refuse_twins(lines)
    comparable = scale == protocol == "paper" and not changed
    title = titled(study.table, scale, protocol, changed)
    study = replace(study, name=named(study.name, lines, root))
    return Ablation(study, lines, root, title, scale, protocol, comparable)


def check_held_out(experiment: Experiment) -> None:
    """Refuse to hold out more images than train, before every run says so; a folder's are counted
    by the run."""
    n = DATASETS[experiment.dataset].train
    if n and experiment.val >= n:
        raise UserError(
            f"cannot hold out {experiment.val} of {n} training images",
            "--val holds out fewer, with --protocol val too",
        )


def named(study: str, lines: list[Line], root: Path) -> str:
    """A study's name with a digest of its rows and of what their runs are, so that no ablation
    takes the files of another; without one where earlier versions recorded just these."""
    rows = {line.row.name: line.arms[0].folder.parent.name for line in lines}
    before = recorded(root / f"ablation-{study}.json")
    if rows == {name: Path(*places[:1]).parent.name for name, places in before.items()}:
        return study
    made = repr(rows).encode()
    return f"{study}-{hashlib.sha256(made).hexdigest()[:6]}"


def refuse_twins(lines: list[Line]) -> None:
    """Refuse rows that share their runs: beside each other they would compare a run with itself."""
    taken: dict[Path, str] = {}
    for line in lines:
        folder, name = line.arms[0].folder, line.row.name
        if folder in taken:
            raise UserError(
                f"{taken[folder]} and {name} are one and the same run",
                "what changes nothing that is learned (devices, workers) is no axis: give it as a "
                "flag, with an --output for each of its values",
            )
        taken[folder] = name


def warmed(scale: str, settings: Mapping[str, Any], asked: set[str]) -> dict[str, Any]:
    """A budget's warm-up as the same share of another length that was asked for."""
    recipe = SCALES[scale].recipe
    if "warmup" not in recipe or "warmup" in asked or not asked & LENGTH:
        return {}
    steps = length(Experiment(**settings))
    return {"warmup": steps and round(recipe["warmup"] * steps / recipe["steps"])}


# What may be given and the paper's errors are still of the same recipe.
HARMLESS = {f.name for f in fields(Experiment) if f.metadata["free"]} - {"weights"}
HARMLESS |= {"seed", "precision", "log_every", "eval_every"}
# What makes the recipe that the defaults are, whatever network is trained on whatever images.
RECIPE = {f.name for f in fields(Experiment) if f.metadata["panel"] != "Network"}
RECIPE -= HARMLESS | {"dataset"}


def titled(table: PaperTable, scale: str, protocol: str, changed: Mapping[str, Any]) -> str:
    """A table's title, with a line for each thing that differs from the paper's recipe."""
    parts = [table.title, *filter(None, [table.unlike])]
    if scale != "paper":
        parts.append(f"{scale} scale, not the paper's recipe")
    if protocol != "paper":
        parts.append(f"protocol {protocol}")
    if changed:
        parts.append("here with " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    return "\n".join(parts)


def fitting(given: Mapping[str, Any], shortcut: str) -> dict[str, Any]:
    """Those of the settings that a shortcut has: a gate's bias is nothing to identity."""
    known = plans.shortcuts()
    if shortcut not in known:
        return dict(given)
    others = {name for row in known.values() for name in row.settings}
    others -= set(known[shortcut].settings)
    return {k: v for k, v in given.items() if k not in others}
