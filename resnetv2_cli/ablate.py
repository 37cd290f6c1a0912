"""Rows of the paper's tables, run again under several seeds, beside what was published."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from resnetv2_cli import plans
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.paper import FAIL, FAIL_ABOVE, TABLE_1, TABLE_2, TABLES, PaperTable, Row, percent


@dataclass(frozen=True)
class Arm:
    """One run of one row."""

    row: str
    experiment: Experiment
    folder: Path

    @property
    def config(self) -> Path:
        """What the run was asked for, beside its folder."""
        return self.folder.with_suffix(".yaml")

    def refuse_another(self) -> None:
        """
        Raises:
            UserError: the folder has a run of other settings, which must not pass for this one.
        """
        if not self.config.exists():
            return
        kept = Experiment.load(self.config)
        for f in fields(Experiment):
            was, is_ = getattr(kept, f.name), getattr(self.experiment, f.name)
            if was != is_ and not f.metadata["free"]:
                raise UserError(
                    f"{self.folder} has a run with {f.name} {was}, not {is_}",
                    "name another folder with --output",
                )

    @property
    def result(self) -> float | None:
        """Test error in percent, FAIL if it diverged, None if it has not ended."""
        if (self.folder / "failed.json").exists():
            return FAIL
        file = self.folder / "result.json"
        return json.loads(file.read_text())["test_error"] if file.exists() else None


@dataclass(frozen=True)
class Line:
    """One row of an ablation: the paper's error and those measured, in percent, one a seed."""

    row: Row
    arms: list[Arm] = field(default_factory=list)

    @property
    def errors(self) -> list[float]:
        """What has been measured; FAIL for a run that diverged."""
        return [arm.result for arm in self.arms if arm.result is not None]

    @property
    def measured(self) -> str:
        """Median (mean±std), as in Table 4; ``fail`` where the median is above 20 %."""
        errors = self.errors
        if not errors:
            return "—"
        middle, diverged = median(errors), errors.count(FAIL)
        spread = f" ({mean(errors):.2f}±{stdev(errors):.2f})" if len(errors) > 1 > diverged else ""
        if diverged:
            spread = f" ({diverged} of {len(errors)} diverged)"
        if middle == FAIL:
            return "fail (diverged)"
        return f"fail ({middle:.2f})" if middle > FAIL_ABOVE else f"{middle:.2f}{spread}"

    @property
    def difference(self) -> str:
        """Median minus the published error, in points; nothing where either failed."""
        errors, theirs = self.errors, self.row.published
        if not errors or theirs != theirs or theirs == FAIL or median(errors) > FAIL_ABOVE:
            return "—"
        return f"{median(errors) - theirs:+.2f}"

    def as_json(self) -> dict[str, Any]:
        published = self.row.published
        return {
            "name": self.row.name,
            "published": plain(published),
            "figure": self.row.figure,
            "note": self.row.note,
            "errors": [plain(e) for e in self.errors],
            "median": plain(median(self.errors)) if self.errors else None,
            "n": len(self.errors),
            "settings": asdict(self.arms[0].experiment),
        }


def plain(error: float) -> float | str | None:
    """An error for JSON: percent, ``"fail"``, or null where the paper has none."""
    if error != error:
        return None
    return "fail" if error == FAIL else error


UNPUBLISHED = float("nan")


def only(rows: list[Row], wanted: list[str]) -> list[Row]:
    """The rows that are named; all if none is.

    Raises:
        UserError: there is no such row; names the nearest.
    """
    names = [row.name for row in rows]
    for name in wanted:
        if name not in names:
            raise unknown("row", name, names)
    return [row for row in rows if row.name in wanted or not wanted]


def rows(
    shortcut: str | None = None, unit: str | None = None, table: int | None = None
) -> tuple[PaperTable, list[Row]]:
    """The table and those of its rows that concern a shortcut or a unit, after its baseline.

    Raises:
        UserError: none or several of the three are given, or there is no such table.
    """
    given = [x for x in (shortcut, unit, table) if x is not None]
    if len(given) != 1:
        raise UserError(
            "ablate what? give one of --shortcut, --unit and --table",
            "for instance: resnetv2 ablate --shortcut exclusive-gate",
        )
    if table is not None:
        if table not in TABLES:
            raise UserError(f"the paper has no Table {table}", "it has 1 to 5")
        return TABLES[table], list(TABLES[table].rows)
    if shortcut is not None:
        baseline, chosen = TABLE_1.of(shortcut="identity"), TABLE_1.of(shortcut=shortcut)
        if not chosen:
            chosen = [Row(shortcut, UNPUBLISHED, {"shortcut": shortcut}, note="not in the paper")]
        return TABLE_1, baseline + [r for r in chosen if r not in baseline]
    baseline, chosen = TABLE_2.of(unit="original"), TABLE_2.of(unit=unit)
    return TABLE_2, baseline + [r for r in chosen if r not in baseline]


def plan(
    table: PaperTable, rows: Iterable[Row], runs: int, overrides: dict[str, Any], root: Path
) -> list[Line]:
    """A line for each row, with an arm for each seed; seeds are the same in all rows.

    Raises:
        UserError: an override does not fit a row.
    """
    first = overrides.get("seed", 0)
    lines = []
    for row in rows:
        paper = {**table.base, **row.settings}
        if "steps" in overrides or "epochs" in overrides:
            paper.pop("epochs", None)
        settings = paper | fitting(overrides, paper["shortcut"])
        arms = []
        for seed in range(first, first + runs):
            experiment = Experiment(**{**settings, "seed": seed})
            slug = re.sub(r"[^a-z0-9.+-]+", "-", row.name.lower()).strip("-")
            arms.append(Arm(row.name, experiment, root / slug / f"s{seed}"))
            arms[-1].refuse_another()
        lines.append(Line(row, arms))
    return lines


def fitting(overrides: dict[str, Any], shortcut: str) -> dict[str, Any]:
    """The overrides without settings of other shortcuts: a gate's bias is nothing to identity."""
    known = plans.shortcuts()
    if shortcut not in known:
        return overrides
    others = {name for row in known.values() for name in row.settings} - set(
        known[shortcut].settings
    )
    return {k: v for k, v in overrides.items() if k not in others}


def run(lines: list[Line], announce: Callable[[Arm, str], None]) -> None:
    """Run every arm that has no result, each in a process of its own, seed by seed.

    An arm that was interrupted is continued; one that fails is a row that says so.

    Raises:
        UserError: an arm's process stopped for another reason than a diverging loss.
    """
    arms = [arm for line in lines for arm in line.arms]
    for arm in sorted(arms, key=lambda a: a.experiment.seed):
        if arm.result is not None:
            announce(arm, "done before")
            continue
        begun = (arm.folder / "config.yaml").exists()
        announce(arm, "continuing" if begun else "running")
        status = wait(command(arm, begun))
        if status in (130, 143):
            raise KeyboardInterrupt
        if status and arm.result is None:
            raise UserError(
                f"{arm.row}, seed {arm.experiment.seed}, stopped with status {status}",
                "the same command continues; finished runs are not run again",
            )


def wait(command: list[str]) -> int:
    """Run a command to its end, its progress on our stderr.

    Ctrl-C reaches it as it reaches us, SIGTERM is passed on; either way it is left time to save.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def command(arm: Arm, begun: bool) -> list[str]:
    """The command of one arm: a ``train`` that anybody could type."""
    tool = [sys.executable, "-m", "resnetv2_cli", "train"]
    if begun:
        return [*tool, "--resume", str(arm.folder)]
    arm.config.parent.mkdir(parents=True, exist_ok=True)
    arm.config.write_text(arm.experiment.dump())
    return [*tool, "--config", str(arm.config), "--output", str(arm.folder)]


def published(row: Row) -> str:
    """The paper's error, with mean±std where it gives them; a dash where it has no such row."""
    if row.published != row.published:
        return "—"
    return percent(row.published) + (f" ({row.spread})" if row.spread else "")


def table_rows(lines: list[Line]) -> list[tuple[str, ...]]:
    """row, paper, measured, n, difference: what the table shows."""
    return [
        (
            line.row.name,
            published(line.row),
            line.measured,
            str(len(line.errors)),
            line.difference,
        )
        for line in lines
    ]
