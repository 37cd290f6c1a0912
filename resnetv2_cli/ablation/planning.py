"""The runs of a study: rows, settings and seeds; refused where a row is not what its name says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnetv2_cli import plans
from resnetv2_cli.ablation.arms import HARMLESS, HELD_OUT, Ablation, Arm, Line
from resnetv2_cli.ablation.record import named
from resnetv2_cli.ablation.studies import LENGTH, SCALES, Study, length, paper_row
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.paper import PaperTable, Row

PROTOCOLS = {
    "paper": {},  # 50k training images, test error of the last iteration
    "val": {"val": HELD_OUT},  # 45k/5k: the checkpoint is chosen on the 5k, and tested once
}


def plan(
    study: Study,
    runs: int,
    given: Mapping[str, Any],
    root: Path,
    scale: str = "paper",
    protocol: str = "paper",
    config: Path | None = None,
) -> Ablation:
    """A line for each row, with a run for each seed; seeds are the same in all rows.

    ``given``: settings that override the rows' own. Those of the file ``config`` do so too, except
    where ``given`` has them or the rows differ in them.

    Raises:
        UserError: a setting does not fit a row, two rows would be the same run, or the file does
            not exist or has no settings.
    """
    refuse_varied(study, {*given, *PROTOCOLS[protocol]})
    flags, given = given, beside(study, config, given)
    given = meant(study, flags, given)
    changed = {k: v for k, v in given.items() if k not in HARMLESS}
    scaled = study.at(scale)
    first = given.get("seed", 0)
    lines = []
    for asked, row in zip(study.table.rows, scaled.table.rows, strict=True):
        settings = settings_of(row, scaled, given, scale, protocol)
        origins = (
            dict.fromkeys(scaled.table.base, f"recipe of {scaled.name}, scale {scale}")
            | dict.fromkeys(row.settings, f"row {row.name!r} of {scaled.name}")
            | dict.fromkeys(PROTOCOLS[protocol], f"protocol {protocol}")
            | dict.fromkeys(given, f"file {config}")
            | dict.fromkeys(flags, "flag of ablate")
        )
        kept = {k: v for k, v in origins.items() if k in settings} | {"seed": "ablate --runs"}
        arms = [
            Arm.of(row.name, Experiment(**{**settings, "seed": seed}), root, kept, row.tested)
            for seed in range(first, first + runs)
        ]
        check_held_out(arms[0].experiment)
        if study.axes:
            shortcut = arms[0].experiment.shortcut
            row = beside_paper(row, asked.settings | plans.of_shortcut(shortcut, changed))
        lines.append(Line(row, arms))
    refuse_twins(lines)
    comparable = scale == protocol == "paper" and not changed
    title = titled(scaled.table, scale, protocol, changed)
    found = replace(scaled, name=named(scaled.name, lines, root))
    return Ablation(found, lines, root, title, scale, protocol, comparable)


def refuse_varied(study: Study, settled: set[str]) -> None:
    """Refuse to settle for all rows what makes them differ.

    Raises:
        UserError: a setting is an axis of the grid, or named by rows of the table.
    """
    if settled & LENGTH:  # either overrides both, so an axis of them would change names only
        settled |= LENGTH
    if not (twice := sorted(study.varied & settled)):
        return
    name = twice[0].replace("_", "-")
    if study.axes:
        raise UserError(f"{name} is an axis of the grid", "give it only there")
    table = study.table.title.partition(":")[0]
    hint = f"leave rows out with --row, or make some of your own: --grid {name}=..."
    raise UserError(f"rows of {table} have a {name} of their own", hint)


def settings_of(
    row: Row, study: Study, given: Mapping[str, Any], scale: str, protocol: str
) -> dict[str, Any]:
    """The settings of a row's runs: the table's, the row's and the protocol's, then those that are
    given for all rows."""
    settings = {**study.table.base, **row.settings, **PROTOCOLS[protocol]}
    if LENGTH & {*given}:
        settings = {k: v for k, v in settings.items() if k not in LENGTH}
    shortcut = {**settings, **given}.get("shortcut", "identity")
    settings |= plans.of_shortcut(shortcut, given)
    return settings | warmed(scale, settings, {*given, *study.axes})


def beside_paper(row: Row, settings: Mapping[str, Any]) -> Row:
    """A row of a grid with the paper's errors for these settings, if it has them."""
    asked = {k: v for k, v in settings.items() if k not in HARMLESS}
    known = paper_row(asked, row.tested)
    return replace(row, published=known.published, top5=known.top5) if known else row


def beside(study: Study, config: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, and those of a file, except what the rows differ in.

    Raises:
        UserError: the file does not exist or has no settings.
    """
    asked = Experiment.asked(config, given)
    differ = study.varied | (LENGTH if LENGTH & {*study.axes} else set())
    return {k: v for k, v in asked.items() if k in given or k not in differ} | {**given}


def check_held_out(experiment: Experiment) -> None:
    """Refuse to hold out all training images or more, before every run does. The images of a folder
    are counted only by the run."""
    n = DATASETS[experiment.dataset].train
    if n and experiment.val >= n:
        raise UserError(
            f"cannot hold out {experiment.val} of {n} training images",
            "--val holds out fewer, also under --protocol val",
        )


def refuse_twins(lines: list[Line]) -> None:
    """Refuse rows that share their runs: a comparison would be of a run with itself."""
    taken: dict[tuple[Path, str], str] = {}
    for line in lines:
        test, name = (line.arms[0].folder, line.row.tested), line.row.name
        if test in taken:
            raise UserError(
                f"{taken[test]} and {name} are one and the same run",
                "give each value once; a setting that does not change what is learned (devices, "
                "workers) is not an axis: give it as a flag, with an --output for each value",
            )
        taken[test] = name


def warmed(scale: str, settings: Mapping[str, Any], asked: set[str]) -> dict[str, Any]:
    """A budget's warm-up, scaled to a length of training that was asked for."""
    recipe = SCALES[scale].recipe
    if "warmup" not in recipe or "warmup" in asked or not asked & LENGTH:
        return {}
    steps = length(Experiment(**settings))
    return {"warmup": steps and round(recipe["warmup"] * steps / recipe["steps"])}


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


def meant(study: Study, flags: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings without those of shortcuts that no row has. A file may have them, as it
    may be that of a run.

    Raises:
        UserError: a flag sets one.
    """
    rows = [{**study.table.base, **row.settings, **given} for row in study.table.rows]
    names = {row.get("shortcut", "identity") for row in rows}
    used = {setting for name in names for setting in plans.of_shortcut(name, given)}
    if moot := sorted(flags.keys() - used):
        name = moot[0].replace("_", "-")
        raise UserError(f"no row has a shortcut with --{name}", "resnetv2 list shows who has it")
    return {k: v for k, v in given.items() if k in used}
