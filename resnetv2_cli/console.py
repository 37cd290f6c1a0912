"""Everything the user reads: results on stdout; errors, notes and progress on stderr."""

import csv
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnetv2_cli import jsonfile
from resnetv2_cli.errors import UserError
from resnetv2_cli.quantities import NONE

NAME = 43  # a column of names up to this width is not folded
NUMBER = re.compile(rf"[-+0-9{NONE}]|fail\b|$")  # how the cells of a column of numbers begin
WORDS = 24  # nor is any other up to this width, and a folded one has at least this width

# No emoji: mine:Key:ratio=4 is a name, not a picture of a key.
out = Console(soft_wrap=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on stdout; columns of numbers are right-aligned. Columns that do not fit side by side
    continue below, with the first one repeated."""
    lines = [[plain(str(cell)) for cell in row] for row in rows]
    made = [Column(cells, i == 0) for i, cells in enumerate(zip(columns, *lines, strict=True))]
    if title:
        out.print(escape(plain(title)), style="bold", highlight=False)
    begun = [0]
    for i in range(1, len(made)):
        beside = [made[0], *made[max(1, begun[-1]) : i + 1]]
        if len(beside) > 2 and 1 + sum(column.least for column in beside) > out.width:
            begun.append(i)
    for start, end in zip(begun, [*begun[1:], len(made)], strict=True):
        grid = Table()
        chosen = [0, *range(max(1, start), end)]
        fits = 1 + sum(made[i].least for i in chosen) <= out.width
        for i in chosen:
            whole = fits and made[i].least == made[i].width
            grid.add_column(
                made[i].head,
                justify="right" if made[i].numbers else "left",
                overflow="fold",
                no_wrap=whole,
                min_width=made[i].least - 3 if fits else None,
            )
        for row in lines:
            grid.add_row(*(escape(row[i]) for i in chosen))
        out.print(grid)


class Column:
    """A column of a table, its head first. ``width``: with border and padding; ``least``: what it
    must have. Numbers and short names are not folded; longer text beside them is."""

    def __init__(self, cells: tuple[str, ...], first: bool) -> None:
        self.head = cells[0]
        self.numbers = not first and all(map(NUMBER.match, cells[1:]))
        self.width = 3 + max(map(cell_len, cells))
        short = self.width <= (NAME if first else WORDS)
        self.least = self.width if short else max(WORDS, 3 + cell_len(self.head))


def plain(text: str) -> str:
    """The text without control codes for a terminal: names in a stranger's file may hold such."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def as_csv(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Comma-separated values, and nothing else, on stdout; the title is left out."""
    csv.writer(sys.stdout, lineterminator="\n").writerows([list(columns), *map(list, rows)])


def as_markdown(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A Markdown table on stdout; all columns but the first are right-aligned."""
    columns = list(columns)
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *map(list, rows)]
    print("**" + title.replace("\n", "; ") + "**\n")
    for cells in lines:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    print()


SHOW = {"table": table, "csv": as_csv, "md": as_markdown}


def as_json(value: Any) -> None:
    """JSON, and nothing else, on stdout; null for non-finite numbers, which JSON does not have."""
    print(jsonfile.text(value))


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal; yields a function that gets the numbers done and in all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, every: bar.update(task, completed=done, total=every)


def say(text: str) -> None:
    """A line on stdout."""
    out.print(escape(plain(text)), soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """A line on stderr."""
    err.print(escape(plain(text)), soft_wrap=True)


def fail(error: UserError) -> None:
    """One line that says what is wrong, and a hint."""
    line = " ".join(str(error).split())
    err.print(f"[bold red]error:[/] {escape(plain(line))}", soft_wrap=True)
    if error.hint:
        err.print(f"[dim]hint: {escape(plain(error.hint))}[/]", soft_wrap=True)
