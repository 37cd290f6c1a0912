"""Everything the user reads: results on stdout; errors, notes and progress on stderr."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnetv2_cli.errors import UserError

MANY = 6  # columns: where more do not fit beside each other, they go on below

out = Console(soft_wrap=False)
err = Console(stderr=True, highlight=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on stdout; columns whose cells are numbers stand on the right. Many columns that do
    not fit beside each other go on below, with the first one again."""
    lines = [[plain(str(cell)) for cell in row] for row in rows]
    cells = list(zip(columns, *lines, strict=True))
    widths = [3 + max(map(cell_len, column)) for column in cells]
    begun = [0]
    if len(cells) > MANY:
        for i in range(1, len(cells)):
            if widths[0] + sum(widths[max(1, begun[-1]) : i + 1]) >= out.width:
                begun.append(i)
    for start, end in zip(begun, [*begun[1:], len(cells)], strict=True):
        grid = Table(title=None if start else escape(plain(title)), title_justify="left")
        grid.title_style = "bold"
        for i in (0, *range(max(1, start), end)):
            number = all(cell[:1] in "0123456789+-—f" for cell in cells[i][1:])
            # Names are read whole; what is long beside them folds.
            justify: Literal["left", "right"] = "right" if number and i else "left"
            whole = not i and widths[i] <= 43
            grid.add_column(cells[i][0], justify=justify, overflow="fold", no_wrap=whole)
        for row in lines:
            grid.add_row(*(escape(row[i]) for i in (0, *range(max(1, start), end))))
        out.print(grid)


def plain(text: str) -> str:
    """Without what a terminal would obey: names in a file of a stranger's may hold such codes."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def as_csv(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Comma-separated values, and nothing else, on stdout; the title is left out."""
    csv.writer(sys.stdout, lineterminator="\n").writerows([list(columns), *map(list, rows)])


def as_markdown(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A Markdown table on stdout; all columns but the first stand on the right."""
    columns = list(columns)
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *map(list, rows)]
    print("**" + title.replace("\n", "; ") + "**\n")
    for cells in lines:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    print()


SHOW = {"table": table, "csv": as_csv, "md": as_markdown}


def as_json(value: Any) -> None:
    """JSON, and nothing else, on stdout; null for what is not finite, which JSON does not know."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """What shows, on a terminal, how many things of all are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, every: bar.update(task, completed=done, total=every)


def note(text: str) -> None:
    """A line on stderr."""
    err.print(escape(plain(text)), soft_wrap=True)


def fail(error: UserError) -> None:
    """One line that says what is wrong, and a hint."""
    line = " ".join(str(error).split())
    err.print(f"[bold red]error:[/] {escape(plain(line))}", soft_wrap=True)
    if error.hint:
        err.print(f"[dim]hint: {escape(plain(error.hint))}[/]", soft_wrap=True)
