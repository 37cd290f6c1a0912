"""Everything the user reads: results on stdout; errors, notes and progress on stderr."""

import json
import math
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnetv2_cli.errors import UserError

out = Console(soft_wrap=False)
err = Console(stderr=True, highlight=False)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on stdout; columns whose cells are numbers stand on the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    grid = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        number = all(row[i][:1] in "0123456789+-—f" for row in cells)
        grid.add_column(column, justify="right" if number and i else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(escape, row))
    out.print(grid)


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


def note(text: str) -> None:
    """A line on stderr."""
    err.print(escape(text), soft_wrap=True)


def fail(error: UserError) -> None:
    """One line that says what is wrong, and a hint."""
    line = " ".join(str(error).split())
    err.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
    if error.hint:
        err.print(f"[dim]hint: {escape(error.hint)}[/]", soft_wrap=True)
