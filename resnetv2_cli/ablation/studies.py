"""What an ablation runs: rows of the paper's tables and figures, or of a user's grid.

To add a budget: one row in SCALES.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from resnetv2_cli import plans
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import expanded
from resnetv2_cli.flags import parsed
from resnetv2_cli.manifest import content, own_files
from resnetv2_cli.paper import FIGURES, TABLE_1, TABLE_2, TABLES, PaperTable, Row

LENGTH = {"steps", "epochs"}  # of training; an experiment is given one of them
LISTS = {"drops", "freeze", "devices"}  # settings whose values may contain commas
BASELINE = "original"  # the unit that others are compared with
ILSVRC = 1_281_167  # training images of ImageNet, used if there is no copy to count


@dataclass(frozen=True)
class Scale:
    """A budget: the depth that replaces each of the paper's, and the recipe."""

    doc: str
    depths: Mapping[int, int] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


SCALES = {
    "paper": Scale("the paper's depths and full recipe"),
    # Deep enough to show what weakens the signal at every unit: 0.5 to the 18th is 4e-6.
    "laptop": Scale(
        "38 layers for 110 and 164, 65 for 1001, 56 for 1202; 400 iterations of 64 images, the "
        "first 40 at a tenth of the learning rate of 0.05",
        {110: 38, 164: 38, 1001: 65, 1202: 56},
        {
            "batch_size": 64,
            "steps": 400,
            "warmup": 40,
            "lr": 0.05,
            "log_every": 20,
            "eval_every": 1.0,
        },
    ),
}


@dataclass(frozen=True)
class Study:
    """The rows of one table; ``name`` is the name of its files, ``axes`` are the settings that a
    grid varies."""

    name: str
    table: PaperTable
    axes: tuple[str, ...] = ()

    @property
    def varied(self) -> set[str]:
        """The settings that the names of rows stand for: a flag that set one for all rows would
        make the names false. The name of a table's row says nothing about the length of training,
        which may be set."""
        made = {name for row in self.table.rows for name in row.settings}
        return {*self.axes} or made - LENGTH

    def at(self, scale: str) -> "Study":
        """The same rows at another budget, which does not touch the axes of a grid.

        Raises:
            UserError: the budget has no depth for one of them.
        """
        small = SCALES[scale]
        if not small.depths:
            return self

        def row(r: Row) -> Row:
            whole = self.table.base | r.settings
            depth = whole.get("depth", 110)
            varied = {k: v for k, v in r.settings.items() if k in self.axes}
            known = depth in small.depths or "depth" in varied
            if whole.get("dataset") == "imagenet" or not known:
                hint = f"leave out --scale {scale}, or name rows with --row"
                raise UserError(f"{r.name} has no {scale} scale", hint)
            kept = {k: v for k, v in r.settings.items() if k not in ("epochs", "drops")}
            recipe = {
                k: v for k, v in small.recipe.items() if k != "steps" or "epochs" not in varied
            }
            less = {"depth": small.depths.get(depth, depth)} | recipe
            return replace(r, settings=kept | less | varied)

        rows = tuple(row(r) for r in self.table.rows)
        return replace(self, name=f"{self.name}-{scale}", table=replace(self.table, rows=rows))

    def only(self, wanted: list[str]) -> "Study":
        """The rows with these names; all of them if no name is given."""
        rows = tuple(row for row in self.table.rows if row.name in wanted or not wanted)
        return replace(self, table=replace(self.table, rows=rows))


def studies(
    tables: list[int] | None = None,
    figures: list[int] | None = None,
    shortcut: str | None = None,
    unit: str | None = None,
    grid: list[str] | None = None,
) -> list[Study]:
    """The rows of tables or figures; those of a shortcut or a unit, after their baseline; or every
    combination of a grid.

    Raises:
        UserError: none or several of these are given, or one does not exist.
    """
    given = [x for x in (tables, figures, shortcut, unit, grid) if x]
    if len(given) != 1:
        raise UserError(
            f"ablate what? give {'only ' if given else ''}one of --table, --figure, --shortcut, "
            "--unit and --grid",
            "for instance: resnetv2 ablate --shortcut exclusive-gate",
        )
    if shortcut:
        return [Study(f"shortcut-{slug(shortcut)}", of_shortcut(shortcut))]
    if unit:
        return [Study(f"unit-{slug(plans.in_names(unit))}", of_unit(unit))]
    if grid:
        return [of_grid(grid)]
    kind, known, numbers = ("table", TABLES, tables) if tables else ("figure", FIGURES, figures)
    for number in numbers or []:
        if number not in known:
            there = ", ".join(map(str, known))
            hint = f"those that can be run: {there}"
            raise UserError(f"there is no {kind.capitalize()} {number} to run", hint)
    return [Study(f"{kind}-{number}", known[number]) for number in dict.fromkeys(numbers or [])]


def around(table: PaperTable, baseline: list[Row], **settings: Any) -> PaperTable:
    """The rows of a table that agree with some settings, after its baseline."""
    chosen = [row for row in table.of(**settings) if row not in baseline]
    return replace(table, rows=(*baseline, *chosen))


def of_shortcut(shortcut: str) -> PaperTable:
    """The rows of Table 1 with a shortcut, after identity; a new row if the table has none."""
    baseline = TABLE_1.of(shortcut="identity")
    if TABLE_1.of(shortcut=shortcut):
        return around(TABLE_1, baseline, shortcut=shortcut)
    settings = {"shortcut": shortcut}
    own = Row(shortcut, None, settings, note="not in the paper", baseline="identity")
    return replace(TABLE_1, rows=(*baseline, own))


def of_unit(unit: str) -> PaperTable:
    """The rows of Table 2 with a unit, after the original ones; if the table has none, a new row at
    the table's first depth, after the original unit and full pre-activation."""
    baseline = TABLE_2.of(unit=BASELINE)
    if TABLE_2.of(unit=unit):
        return around(TABLE_2, baseline, unit=unit)
    depth = baseline[0].settings["depth"]
    known = {n: TABLE_2.of(unit=n, depth=depth)[0].published for n in (BASELINE, "full-preact")}
    own = Row(unit, None, {"unit": unit}, note="not in the paper", baseline=BASELINE)
    rows = [
        Row(name, error, {"unit": name}, baseline=BASELINE if name != BASELINE else "")
        for name, error in known.items()
    ]
    title = f"Table 2: units, ResNet-{depth} on CIFAR-10"
    return PaperTable(title, TABLE_2.base | {"depth": depth}, (*rows, own))


def of_grid(axes: list[str]) -> Study:
    """Every combination of ``depth=20,110 shortcut=identity,dropout``; the first is the baseline.

    Values that contain commas are separated by slashes: ``drops=0.5,0.75/0.4,0.6``. Rows that
    differ only in their protocol are tests of one training.

    Raises:
        UserError: an axis is not ``setting=value,value``, names no setting, or is given twice
            (steps and epochs count as one); or it is the seed.
    """
    chosen: dict[str, list[Any]] = {}
    for axis in axes:
        name, _, values = axis.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not values:
            hint = "for instance: --grid depth=20,110 shortcut=identity,dropout"
            raise UserError(f"{axis!r} is not an axis of a grid", hint)
        if name == "seed":
            raise UserError("seed is not an axis", "--runs N gives every row N seeds")
        if name in chosen:
            raise UserError(f"the grid has {name} twice", "give all its values together")
        between = "/" if name in LISTS else ","
        chosen[name] = [parsed(name, value) for value in values.split(between)]
    if set(chosen) >= LENGTH:
        raise UserError("steps and epochs are both the length", "vary one of them")
    title = " x ".join(f"{name} {', '.join(map(str, v))}" for name, v in chosen.items())
    rows: list[Row] = []
    for combination in itertools.product(*chosen.values()):
        settings = dict(zip(chosen, combination, strict=True))
        name = " ".join(f"{k}={v}" for k, v in settings.items())
        tested = settings.get("protocol", "")
        if tested:
            settings["protocol"] = ",".join(chosen["protocol"])
        baseline = rows[0].name if rows else ""
        rows.append(Row(name, None, settings, tested=tested, baseline=baseline))
    table = PaperTable(f"Grid: {title}", {}, tuple(rows))
    return Study(f"grid-{slug(title)[:60]}", table, tuple(chosen))


def paper_row(settings: Mapping[str, Any], tested: str = "") -> Row | None:
    """The row of the paper with exactly these settings, tested by this protocol; None if none.

    What a row leaves open has the default of the tool, which is the paper's recipe.
    """
    wanted, by = spelled_out(settings), tested or Experiment(**settings).protocols[0]
    for table in TABLES.values():
        for row in table.rows:
            alike = row.tested in ("", by)
            if alike and spelled_out(table.base | row.at(settings)) == wanted:
                return row
    return None


def spelled_out(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``identity``, and all of the shortcut's own, defaults included; without the
    protocol by which photographs are tested."""
    experiment = Experiment(**settings)
    whole = experiment.shortcut_settings | dict(identity(experiment))
    return {k: v for k, v in whole.items() if k != "protocol"}


def length(experiment: Experiment) -> int | None:
    """The number of iterations, computed from the training set where epochs are given; None if that
    is a folder that does not exist."""
    if experiment.epochs is None:
        return experiment.steps
    images = training_images(experiment.dataset, experiment.data_dir)
    if not images:
        return None
    rounds = -(-(images - experiment.val) // experiment.batch_size)
    return max(1, round(experiment.epochs * rounds))


@cache
def training_images(dataset: str, place: str) -> int:
    """The number of training images of a dataset; 0 if it is a folder that does not exist."""
    if known := DATASETS[dataset].train:
        return known
    from resnetv2_cli.data.folder import scan  # imports torch, which a report does without

    try:
        return len(scan(expanded(place), "train").files)
    except UserError:
        return ILSVRC if dataset == "imagenet" else 0


def identity(experiment: Experiment) -> tuple[tuple[str, Any], ...]:
    """What identifies an experiment: all settings but the seed and those that are free to change;
    for images that only their folder identifies, the folder too.

    Defaults are left out, so that a version with more settings still finds the runs.
    """
    whole = {"block": experiment.block_, "stem": experiment.stem_}
    if experiment.dataset == "folder":
        whole["data_dir"] = experiment.data_dir
    for f in fields(Experiment):
        value = getattr(experiment, f.name)
        if not f.metadata["free"] and f.name != "seed" and value != f.default:
            whole.setdefault(f.name, value)
    return tuple(whole.items())


def digest(experiment: Experiment) -> str:
    """Six hexadecimal digits that tell experiments of the same name apart: a digest of ``identity``
    and of the user's own code."""
    made = repr(identity(experiment)).encode()
    for files in own_files(experiment).values():
        made += content(files)
    return hashlib.sha256(made).hexdigest()[:6]


def unusual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not defaults."""
    usual = {f.name: f.default for f in fields(Experiment)}
    return {k: v for k, v in settings.items() if k not in usual or v != usual[k]}


def slug(text: str) -> str:
    """A file name: lowercase letters, digits, dots, plus signs and hyphens."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
