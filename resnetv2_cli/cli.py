"""The command line: parse, call, show. It decides nothing."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from resnetv2_cli import __version__, paper, plans, report
from resnetv2_cli.config import CONFIGS, Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import Stopped, UserError, unknown
from resnetv2_cli.flags import seconds, with_flags

app = typer.Typer(
    no_args_is_help=True,
    help="Deep residual networks with identity mappings (He, Zhang, Ren, Sun 2016).",
    epilog="Exit status: 0 done, or saved when --time was over; 2 a mistake that the message "
    "explains; 130, 143, 138, 140 saved and left on Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="A file of configs/; flags win over it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="table or json.")]


@app.command(rich_help_panel="Train")
@with_flags()
def train(
    config: Config = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder: new or empty.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Save and leave cleanly after this long: 25m, 2h.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Train a network; the defaults are the paper's.

    For instance: resnetv2 train --depth 1001 --unit full-preact
    """
    budget = seconds(time) if time else None
    if resume and (config or output):
        raise UserError("--resume takes no --config and no --output", "the folder has them")
    experiment = None if resume else Experiment.load(config, **flags)
    from resnetv2_cli import run
    from resnetv2_cli.display import Display
    from resnetv2_cli.runfolder import RunFolder

    taken = os.environ.get(run.FOLDER)  # in the other processes of a run
    if resume:
        folder = RunFolder(resume)
        experiment, changed = run.resumed(folder, flags)
        for line in changed:
            report.note(line)
    else:
        assert experiment is not None
        named = Path(taken) if taken else output
        folder = RunFolder(named) if named else RunFolder.free(experiment)
    os.environ[run.FOLDER] = str(folder.path)
    if run.first_process():
        report.note(f"{experiment.name} -> {folder.path}, {run.precision(experiment)}")
    display = Display(report.err)
    try:
        result = run.train(
            experiment, folder, resume=bool(resume), seconds=budget, display=[display]
        )
    except Stopped as stopped:
        if run.first_process():
            report.note(f"{stopped}: saved; continue with: resnetv2 train --resume {folder.path}")
        raise
    if not run.first_process():
        return
    if json:
        report.as_json(result)
        return
    error = f"{result['test_error']:.2f} %"
    report.out.print(
        f"test error {error} (top-5 {result['test_top5_error']:.2f} %) of "
        f"{result['test_images']:,} images after {result['steps']:,} iterations"
    )
    report.note(f"curves:   {folder.curves}")
    report.note(f"evaluate: resnetv2 eval {folder.path}")


@app.command("eval", rich_help_panel="Train")
@with_flags()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the picture goes.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Evaluate a checkpoint on its test images; it names network and data by itself."""
    from resnetv2_cli import checkpoint as checkpoints
    from resnetv2_cli import run
    from resnetv2_cli.plot import confusion

    file = checkpoints.find(checkpoint)
    scores, task = run.evaluate(file, **flags)
    if not run.first_process():
        return
    inside = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    picture = (output or inside) / f"confusion-{file.stem}.png"
    per_class = [
        100 * (sum(row) - row[i]) / max(1, sum(row)) for i, row in enumerate(scores["confusion"])
    ]
    try:
        confusion(scores["confusion"], task.classes, picture)
    except OSError as error:
        report.note(f"no picture: cannot write {picture}: {error.strerror}")
    named = dict(zip(task.classes, per_class, strict=True))
    if json:
        report.as_json(scores | {"class_error": named, "picture": str(picture)})
        return
    keys = ("error", "top5_error", "loss")
    summary = [f"{scores[k]:.2f}" + ("" if k == "loss" else " %") for k in keys]
    row = [task.experiment.name, *summary, f"{scores['images']:,}", f"{scores['step']:,}"]
    report.table(str(file), ["network", "error", "top-5", "loss", "images", "iteration"], [row])
    if len(named) <= 20:
        report.table("error by class", ["class", "%"], [(c, f"{e:.2f}") for c, e in named.items()])
    report.note(f"confusion matrix: {picture}")


@app.command(rich_help_panel="Study the paper")
@with_flags("shortcut", "unit")
def ablate(
    shortcut: Annotated[
        str | None, typer.Option(help="Rows of Table 1 with this shortcut; or module:Class.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="Rows of Table 2 with this unit.")] = None,
    table: Annotated[int | None, typer.Option(help="All rows of a table, 1 to 5.")] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row, by its name; may be given often.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Seeds of each row; the paper takes 5.", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the runs are; it may hold some.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")] = False,
    format: Format = "table",
    **flags: Any,
) -> None:
    """Run rows of the paper's tables again, beside the published errors.

    Finished runs are never run again. For instance: resnetv2 ablate --shortcut exclusive-gate
    """
    from resnetv2_cli import ablate as ablation

    if unit is not None and unit not in plans.UNITS:
        raise unknown("unit", unit, plans.UNITS)
    if shortcut and ":" not in shortcut and shortcut not in plans.shortcuts():
        raise unknown("shortcut", shortcut, plans.shortcuts())
    paper_table, rows = ablation.rows(shortcut, unit, table)
    what = shortcut or unit or f"table{table}"
    root = output or Path("runs") / f"ablate-{what.replace(':', '.')}"
    lines = ablation.plan(paper_table, ablation.only(rows, row or []), runs, flags, root)
    title = paper_table.title
    if flags:
        title += "\nhere with " + ", ".join(f"{k} {v}" for k, v in flags.items())
    if dry_run:
        plan(title, lines, format)
        return
    report.note(f"runs are in {root}; a second call continues")
    ablation.run(
        lines, lambda arm, state: report.note(f"{arm.row}, seed {arm.experiment.seed}: {state}")
    )
    if format == "json":
        report.as_json([line.as_json() for line in lines])
        return
    columns = ["row", "paper, %", "here, %", "n", "difference"]
    report.table(title, columns, ablation.table_rows(lines))


def plan(title: str, lines: list, format: str) -> None:
    """Show what an ablation would run."""
    from resnetv2_cli.describe import describe

    sizes = [
        describe(e, len(DATASETS[e.dataset].classes) or 1000)
        for e in (line.arms[0].experiment for line in lines)
    ]
    if format == "json":
        counts = [{k: s[k] for k in ("parameters", "macs")} for s in sizes]
        report.as_json([line.as_json() | c for line, c in zip(lines, counts, strict=True)])
        return
    rows = [
        (
            line.row.name,
            line.row.figure or "—",
            paper.percent(None if line.row.published != line.row.published else line.row.published),
            f"{size['parameters']:,}",
            f"{size['macs'] / 1e6:,.1f}M",
            f"{len(line.arms)}",
            f"{sum(arm.result is not None for arm in line.arms)}",
        )
        for line, size in zip(lines, sizes, strict=True)
    ]
    columns = ["row", "figure", "paper, %", "parameters", "MACs", "runs", "done"]
    report.table(title, columns, rows)


@app.command(rich_help_panel="Study the paper")
@with_flags()
def describe(
    config: Config = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Show a network's units, shapes, parameters and multiply-adds."""
    experiment = Experiment.load(config, **flags)
    from resnetv2_cli.describe import describe as described

    known = len(DATASETS[experiment.dataset].classes) or 1000
    made = described(experiment, known)
    if json:
        report.as_json(made)
        return
    rows = [
        (p["name"], "x".join(map(str, p["output"])), f"{p['parameters']:,}", f"{p['macs']:,}")
        for p in made["parts"]
    ]
    rows.append(("total", "", f"{made['parameters']:,}", f"{made['macs']:,}"))
    report.table(made["network"], ["part", "output", "parameters", "MACs"], rows)
    report.out.print(
        f"{made['parameters_without_bn']:,} parameters without BN, as the paper counts"
    )


@app.command(rich_help_panel="Train")
@with_flags()
def bench(
    config: Config = None,
    rounds: Annotated[int, typer.Option(help="Turns that each arm has.", min=1)] = 5,
    stretch: Annotated[int, typer.Option(help="Iterations of one turn.", min=1)] = 5,
    json: Json = False,
    **flags: Any,
) -> None:
    """Time training beside a plain PyTorch loop, taking turns in one process."""
    experiment = Experiment.load(config, **flags)
    from resnetv2_cli.bench import bench as timed

    made = timed(experiment, rounds, stretch)
    if json:
        report.as_json(made)
        return
    rows = [
        (
            name,
            f"{a['images_per_second']:,.0f}",
            f"{a['ratio']:.2f}",
            f"{a['least']:.2f}-{a['most']:.2f}",
        )
        for name, a in made["arms"].items()
    ]
    title = f"{made['network']}, batch {made['batch_size']}, {made['precision']}"
    report.table(title, ["", "images/s", "ratio", "least-most"], rows)
    report.out.print(
        f"The Trainer, its files and callbacks cost {made['trainer_overhead']:+.1%} over the bare "
        f"step; normalization and augmentation are {made['augmentation']:.2%} of it."
    )


@app.command("list", rich_help_panel="Study the paper")
def list_() -> None:
    """List units, shortcuts, datasets and configs, with the errors the paper reports."""
    units = [(u, cut, paper.published("unit", u)) for u, cut in plans.UNITS.items()]
    columns = ["--unit", "between two units", "paper, %"]
    report.table("Units: + ends one, | begins the next (Fig. 4)", columns, units)
    shortcuts = [
        (s, row.formula, paper.published("shortcut", s)) for s, row in plans.shortcuts().items()
    ]
    report.table("Shortcuts (Fig. 2)", ["--shortcut", "y", "paper, %"], shortcuts)
    report.table("Datasets", ["--dataset", "what"], [(name, d.doc) for name, d in DATASETS.items()])
    report.table("Configs", ["--config", "what"], [(p.stem, headline(p)) for p in configs()])


def configs() -> list[Path]:
    """The recipes that come with the tool."""
    return sorted(CONFIGS.glob("*.yaml"))


def headline(config: Path) -> str:
    """The first comment of a recipe."""
    return config.read_text().splitlines()[0].removeprefix("#").strip()


@app.command(rich_help_panel="Study the paper")
@with_flags()
def show(config: Config = None, **flags: Any) -> None:
    """Show the experiment that a config and flags make, without running it."""
    print(Experiment.load(config, **flags).dump(), end="")


def version(wanted: bool) -> None:
    if wanted:
        print(f"resnetv2 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """``debug`` is for the help alone: ``main`` takes it out wherever it stands."""


def main(arguments: Iterable[str] | None = None) -> None:
    """The console script: every mistake of the user ends here, in one line and a hint."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:  # wherever it stands
        os.environ["RESNETV2_DEBUG"] = "1"
        given = [a for a in given if a != "--debug"]
    try:
        app(given)
    except (UserError, OSError) as error:
        if os.environ.get("RESNETV2_DEBUG"):
            raise
        if isinstance(error, OSError):  # a full disk, a folder without permission
            what = f"{error.filename}: " if error.filename else ""
            error = UserError(f"{what}{error.strerror or error}", "what was saved before is kept")
        report.fail(error)
        sys.exit(2)
    except Stopped as stopped:
        # Of several processes the first reports; another's status would look like a crash to it.
        sys.exit(stopped.status if os.environ.get("LOCAL_RANK", "0") == "0" else 0)
    except KeyboardInterrupt:
        report.note("interrupted")
        sys.exit(130)
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):  # the framework's own way out
            sys.exit(130)
        raise
