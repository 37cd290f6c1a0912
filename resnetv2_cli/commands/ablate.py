"""``ablate``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console, paper, plans
from resnetv2_cli.commands.app import Format, app
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import unknown
from resnetv2_cli.flags import with_flags


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
    console.note(f"runs are in {root}; a second call continues")
    ablation.run(
        lines, lambda arm, state: console.note(f"{arm.row}, seed {arm.experiment.seed}: {state}")
    )
    if format == "json":
        console.as_json([line.as_json() for line in lines])
        return
    columns = ["row", "paper, %", "here, %", "n", "difference"]
    console.table(title, columns, ablation.table_rows(lines))


def plan(title: str, lines: list, format: str) -> None:
    """Show what an ablation would run."""
    from resnetv2_cli.describe import describe

    sizes = [
        describe(e, len(DATASETS[e.dataset].classes) or 1000)
        for e in (line.arms[0].experiment for line in lines)
    ]
    if format == "json":
        counts = [{k: s[k] for k in ("parameters", "macs")} for s in sizes]
        console.as_json([line.as_json() | c for line, c in zip(lines, counts, strict=True)])
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
    console.table(title, columns, rows)
