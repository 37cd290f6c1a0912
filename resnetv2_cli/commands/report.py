"""``report`` and ``plot``: show what is on disk."""

import time
from pathlib import Path
from typing import Annotated

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Detect, app
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.flags import seconds
from resnetv2_cli.scales import YS
from resnetv2_cli.settings import rows

SUFFIXES = ("png", "svg", "pdf")

What = Annotated[
    list[str],
    typer.Argument(
        help="Runs, folders of an ablation or of an analysis, or folders that contain such; or "
        "names of runs, as in resnetv2 runs.",
        metavar="RUNS...",
    ),
]


@app.command(rich_help_panel="Look at runs")
def plot(
    what: What,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path(
        "figures"
    ),
    format: Annotated[
        list[str] | None,
        typer.Option(help="png (the default), svg or pdf; may be repeated.", metavar="NAME"),
    ] = None,
    y: Annotated[
        rows(YS),  # type: ignore[valid-type]
        typer.Option(
            "--y", help="paper: the loss logarithmic, the error linear; or the same for both."
        ),
    ] = "paper",
) -> None:
    """Draw the curves and analyses of runs, in the style of the paper's figures."""
    for suffix in format or []:
        if suffix not in SUFFIXES:
            raise unknown("format", suffix, SUFFIXES)
    from resnetv2_cli import figures
    from resnetv2_cli.inventory import look, places

    found = look(places(what))
    drawn = [
        file
        for suffix in dict.fromkeys(format or ["png"])
        for file in figures.every(found, output, suffix, y)
    ]
    if not drawn:
        raise UserError(f"nothing to draw in {', '.join(what)}", "no run there has begun")
    for file in drawn:
        console.note(str(file))


@app.command(rich_help_panel="Look at runs")
def report(
    what: What,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file; it is overwritten.")
    ] = Path("report.html"),
    watch: Annotated[
        str | None,
        typer.Option(
            help="Write it again every 30s, 5m, ... until no run is open; the page reloads itself."
        ),
    ] = None,
    detect: Detect = 0.5,
) -> None:
    """Write one HTML page: tables next to the paper's, curves, analyses, settings, hardware.

    The page works offline. For instance: resnetv2 report runs/lab --watch 30s
    """
    every = 0 if watch is None else max(1, round(seconds(watch, "--watch")))
    if output.is_dir():
        raise UserError(f"{output} is a folder", "--output names the file, such as report.html")
    from resnetv2_cli.inventory import places
    from resnetv2_cli.report.page import write
    from resnetv2_cli.runfolder import refuse_needed

    refuse_needed(output)

    folders = places(what)
    while True:
        states, more = write(folders, output, detect, every)
        said = ", ".join(f"{n} {state}" for state, n in states.items()) or "no runs"
        console.note(f"{output}: {said}")
        if not every or not more:
            return
        time.sleep(every)
