"""``ablate``."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnetv2_cli import console, plans, quantities, settings
from resnetv2_cli.ablation import planning, studies
from resnetv2_cli.ablation.launch import LAUNCHERS
from resnetv2_cli.commands.app import Detect, Format, Time, app
from resnetv2_cli.errors import Stopped, UserError, unknown
from resnetv2_cli.flags import seconds, with_flags

if TYPE_CHECKING:
    from resnetv2_cli.ablation.arms import Ablation, Arm

LAB = Path("runs/lab")


@app.command(rich_help_panel="Study the paper")
@with_flags("shortcut", "unit", "protocol")  # its own --protocol says which images train
def ablate(
    axes: Annotated[
        list[str] | None, typer.Argument(help="More axes of the grid.", show_default=False)
    ] = None,
    shortcut: Annotated[
        list[str] | None, typer.Option(help="Rows of Table 1 with this shortcut; or module:Class.")
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option(help="Rows of Table 2 with this unit; or 'bn + | bn', or module:Class."),
    ] = None,
    table: Annotated[
        list[int] | None, typer.Option(help="All rows of a table, 1 to 5; may be repeated.")
    ] = None,
    figure: Annotated[
        list[int] | None, typer.Option(help="The rows of a figure with curves: 1, 3 or 6.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Every combination: --grid depth=20,110 shortcut=identity,dropout; values "
            "with commas are separated by /: drops=0.5,0.75/0.4,0.6"
        ),
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row, by its name; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="A YAML file, or a name in configs/, for all rows; flags override it.",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Seeds of each row; the paper uses 5.", min=1)] = 1,
    scale: Annotated[
        settings.rows(studies.SCALES),  # type: ignore[valid-type]
        typer.Option(help="; ".join(f"{name}: {s.doc}" for name, s in studies.SCALES.items())),
    ] = "paper",
    protocol: Annotated[
        settings.rows(planning.PROTOCOLS),  # type: ignore[valid-type]
        typer.Option(
            help="paper: 50k training images, last iteration, test images seen at every "
            "evaluation; val: 45k/5k, the checkpoint chosen on the 5k, test images read once."
        ),
    ] = "paper",
    jobs: Annotated[int, typer.Option(help="Runs at the same time.", min=1)] = 1,
    launcher: Annotated[
        settings.rows(LAUNCHERS),  # type: ignore[valid-type]
        typer.Option(
            help="process: child processes; local, slurm: jobs of submitit, here or on SLURM."
        ),
    ] = "process",
    hours: Annotated[
        float, typer.Option(help="Time limit of one queue job, in hours.", min=0.1)
    ] = 24.0,
    detect: Detect = 0.5,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the runs; it may hold some already.")
    ] = LAB,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, with the time it would take.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure a few iterations for the plan.")
    ] = True,
    time: Time = None,
    format: Format = "table",
    **flags: Any,
) -> None:
    """Reproduce rows of the paper's tables, next to the published errors.

    Finished runs are never run again. For instance: resnetv2 ablate --shortcut exclusive-gate
    """
    budget = math.inf if time is None else seconds(time)
    of_unit, of_shortcut = only("unit", unit), only("shortcut", shortcut)
    if of_unit is not None:
        of_unit = plans.unit_type(of_unit)
    if of_shortcut is not None:
        of_shortcut = plans.shortcut_type(of_shortcut)
    if axes and not grid:
        raise UserError(f"unexpected {axes[0]!r}", "axes of a grid come after --grid")
    of_grid = [grid, *(axes or [])] if grid else None
    chosen = studies.studies(table, figure, of_shortcut, of_unit, of_grid)
    known = [r.name for study in chosen for r in study.table.rows]
    for name in row or []:
        if name not in known:
            raise unknown("row", name, known)
    chosen = [study.only(row or []) for study in chosen]
    made = [
        planning.plan(study, runs, flags, output, scale, protocol, config)
        for study in chosen
        if study.table.rows
    ]
    if dry_run:
        plan(made, jobs, probe, detect, format)
        return
    try:
        run(made, jobs, launcher, hours, budget)
    except Stopped as stopped:
        console.note(f"{stopped}: saved; the same command continues")
        raise
    show(made, detect, format)
    left = [arm for arm in every(made) if arm.error is None]
    crashed = [arm for arm in left if arm.crashed]
    if crashed:
        hint = (
            f"{crashed[0].log} has the output of the first one; the same command tries them again"
        )
        raise UserError(f"{len(crashed)} of {len(every(made))} runs crashed", hint)
    if left:  # a signal reached one of them alone
        hint = "the same command continues them"
        raise UserError(f"{len(left)} of {len(every(made))} runs were stopped", hint)


def only(axis: str, given: list[str] | None) -> str | None:
    """The value of a flag that may be given once.

    Raises:
        UserError: it is given more often, and only one would count.
    """
    if given and len(given) > 1:
        hint = f"several are a grid: --grid {axis}={','.join(given)}"
        raise UserError(f"--{axis} is given {len(given)} times", hint)
    return given[0] if given else None


def every(made: "list[Ablation]") -> "list[Arm]":
    """The runs of all rows, each once; of a shared run, the arm whose protocol training uses."""
    arms: dict[Path, Arm] = {}
    for arm in (arm for ablation in made for line in ablation.lines for arm in line.arms):
        if arm.watched or arm.folder not in arms:
            arms[arm.folder] = arm
    return list(arms.values())


def run(made: "list[Ablation]", jobs: int, launcher: str, hours: float, budget: float) -> None:
    """Run what has no result yet, for at most ``budget`` seconds, and draw the curves."""
    from resnetv2_cli.ablation import record
    from resnetv2_cli.ablation.progress import Progress
    from resnetv2_cli.ablation.sweep import Sweep
    from resnetv2_cli.plot import panels

    root = made[0].root
    start = LAUNCHERS[launcher](jobs, root, hours)
    for ablation in made:
        record.write(ablation)
    arms = every(made)
    console.note(f"{len(arms)} runs in {root}; the same command continues, resnetv2 report shows")
    with Progress(console.err, len(arms)) as progress:
        Sweep(start, jobs, progress.announce, progress.watch, budget).run(arms)
    for ablation in made:
        picture = root / f"{ablation.study.name}.png"
        groups = ablation.curves()
        if any(groups.values()):
            panels(groups, picture)
            console.note(f"curves: {picture}")


def show(made: "list[Ablation]", detect: float, format: str) -> None:
    """Print the results in one of the formats."""
    from resnetv2_cli.ablation import tables

    if format == "json":
        console.as_json([tables.as_json(ablation, detect) for ablation in made])
        return
    for ablation in made:
        columns, rows = tables.table(ablation, detect)
        console.SHOW[format](ablation.title, columns, rows)


def plan(made: "list[Ablation]", jobs: int, probe: bool, detect: float, format: str) -> None:
    """Print what an ablation would run, and for how long."""
    from resnetv2_cli.ablation import tables
    from resnetv2_cli.ablation.probe import forecast, total

    counted = [forecast(ablation, probe) for ablation in made]
    if format == "json":
        console.as_json(
            [
                tables.as_json(ablation, detect, lines)
                | {"seconds": total([(ablation, lines)], jobs)}
                for ablation, lines in zip(made, counted, strict=True)
            ]
        )
        return
    for ablation, lines in zip(made, counted, strict=True):
        rows = list(zip(ablation.lines, lines, strict=True))
        columns = {
            "row": [line.row.name for line, _ in rows],
            "paper": [tables.published(line.row) for line, _ in rows],
            "depth": [f"{line.arms[0].experiment.depth}" for line, _ in rows],
            "weights": [f"{counts['parameters'] / 1e6:.2f}M" for _, counts in rows],
            "MACs": [f"{counts['macs'] / 1e6:,.0f}M" for _, counts in rows],
            "memory": [quantities.size(counts["activation_bytes"]) for _, counts in rows],
            "done": [f"{counts['done']}/{counts['planned']}" for _, counts in rows],
        }
        if probe:
            own = ablation.trainings  # other rows test a run of one of these
            columns["time"] = [
                quantities.duration(counts["seconds"]) if line in own else "the same"
                for line, counts in rows
            ]
        title = ablation.title
        if len(set(columns["depth"])) == 1:
            title += f"\n{columns.pop('depth')[0]} layers each"
        console.SHOW[format](title, columns, zip(*columns.values(), strict=True))
    seconds = total(zip(made, counted, strict=True), jobs)
    if seconds == 0:
        console.note("all of it is done")
    elif seconds is not None:
        console.note(
            f"about {quantities.duration(seconds)} of training in all, from a few iterations "
            "measured here; evaluation comes on top"
        )
