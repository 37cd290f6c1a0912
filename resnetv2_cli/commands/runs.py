"""``runs``: ``ls``, ``show``, ``compare`` and ``rm``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnetv2_cli import console, quantities, settings
from resnetv2_cli.commands.app import Format, app
from resnetv2_cli.errors import UserError
from resnetv2_cli.runfolder import RUNS, STATES
from resnetv2_cli.settings import flag_name

if TYPE_CHECKING:
    from resnetv2_cli.inventory import Run

runs = typer.Typer(no_args_is_help=True, help="Find runs, compare them, remove them.")
app.add_typer(runs, name="runs", rich_help_panel="Look at runs")

Root = Annotated[Path, typer.Option("--root", help="The folder to look for runs in.")]
Name = Annotated[
    str,
    typer.Argument(help="A name, the start of one if it is unique, a folder, or last."),
]


@runs.command()
def ls(
    root: Root = RUNS,
    state: Annotated[
        settings.rows({s: w for s, w in STATES.items() if s != "waiting"}) | None,  # type: ignore[valid-type]
        typer.Option(help="Only runs in this state."),
    ] = None,
    format: Format = "table",
) -> None:
    """List the runs below a folder: their state, their error, when they last changed."""
    from resnetv2_cli.inventory import runs_in

    found = [run for run in runs_in(root) if state in (None, run.state)]
    if format == "json":
        console.as_json([listed(run) for run in found])
        return
    rows = [
        [
            run.name,
            run.state,
            f"{run.step:,}/{run.steps:,}" if run.steps else f"{run.step:,}",
            percent(run),
            age(run.changed),
        ]
        for run in found
    ]
    title = f"{len(found)} runs in {root}"
    console.SHOW[format](title, ["run", "state", "iteration", "test error", "changed"], rows)


def listed(run: "Run") -> dict[str, Any]:
    """What ``ls`` says of a run, as plain values."""
    error = run.error
    return {
        "name": run.name,
        "folder": str(run.folder.path),
        "state": run.state,
        "step": run.step,
        "steps": run.steps,
        "test_error": error,
        "changed": run.changed,
    }


def percent(run: "Run") -> str:
    """Test error; of an open run the latest one, marked as such."""
    if run.error is not None:
        return "fail" if run.state == "fail" else f"{run.error:.2f} %"
    seen = run.series.get(f"{run.scored}_error")
    return f"({seen[-1][1]:.2f} % {run.scored})" if seen else quantities.NONE


def age(changed: float) -> str:
    """``3 min ago``."""
    return f"{quantities.duration(max(0.0, time.time() - changed))} ago"


@runs.command()
def show(name: Name, root: Root = RUNS, format: Format = "table") -> None:
    """Show what a run is, its state and results, and where it ran."""
    from resnetv2_cli.ablation.studies import unusual
    from resnetv2_cli.compare import said, word
    from resnetv2_cli.inventory import choose, runs_in

    run = choose(name, runs_in(root) if root.is_dir() else [])
    if format == "json":
        facts = {k: v for k, v in run.ended.items() if k != "environment"}
        more = {"failure": run.failure} if run.failure else {}
        made = listed(run) | {"settings": run.settings, "result": facts} | more
        console.as_json(made | {"code": run.own_code, "environment": run.environment})
        return
    rows = [["state", run.state], ["iteration", f"{run.step:,} of {run.steps:,}"]]
    if run.failure:
        rows.append(["reason", run.failure.get("reason", "")])
    rows += [[what, value] for what, value in said(run.ended) if what != "steps"]
    rows += [[flag_name(k), word(v)] for k, v in unusual(run.settings).items()]
    rows += [[what, code] for what, code in run.own_code.items()]
    for key, value in run.environment.items():
        several = isinstance(value, dict)
        words = ", ".join(f"{k} {v}" for k, v in value.items()) if several else word(value)
        rows.append([key, words])
    console.SHOW[format](str(run.folder.path), ["", run.name], rows)


@runs.command()
def compare(
    one: Name,
    other: Name,
    root: Root = RUNS,
    format: Format = "table",
) -> None:
    """Show what differs between two runs, and by how much their results differ."""
    from resnetv2_cli import compare as comparing
    from resnetv2_cli.inventory import choose, runs_in

    known = runs_in(root) if root.is_dir() else []
    a, b = choose(one, known), choose(other, known)
    made = comparing.compare(a, b)
    if format == "json":
        console.as_json(made)
        return
    columns = ["", f"a: {a.name}", f"b: {b.name}", "b - a"]
    console.SHOW[format]("What differs", columns, comparing.rows(made))
    if format == "table":
        for line in comparing.notes(made):
            console.say(line)


@runs.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Runs, as for show.", metavar="NAME...")],
    root: Root = RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove runs with their checkpoints. It asks first; runs that still train are refused."""
    from resnetv2_cli.inventory import choose, refuse_in_use, remove, runs_in

    known = runs_in(root) if root.is_dir() else []
    chosen = {run.folder.path.resolve(): run for run in (choose(n, known) for n in names)}
    refuse_in_use(chosen.values())
    for run in chosen.values():
        console.note(f"{run.folder.path}: {run.state}, {run.step:,} iterations, {percent(run)}")
    question = f"Remove {len(chosen)} run{'s' if len(chosen) > 1 else ''} for good?"
    if not yes and not confirmed(question):
        raise UserError("nothing was removed", "--yes removes without asking")
    refuse_in_use(chosen.values())  # training may have begun there meanwhile
    for run in chosen.values():
        remove(run)
    console.note(f"removed {len(chosen)}")


def confirmed(question: str) -> bool:
    """Ask whether to go on; False if there is no input to read an answer from."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, EOFError):
            console.note("")  # ends the question's line
            return False
        raise  # Ctrl-C
