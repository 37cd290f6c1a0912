"""The rows of an ablation for a page: cells, the states of their runs, marks on a common axis."""

import math
from typing import Any

from matplotlib.ticker import MaxNLocator

from resnetv2_cli.ablation import tables
from resnetv2_cli.ablation.arms import Ablation, Arm, Line
from resnetv2_cli.inventory import Run
from resnetv2_cli.paper import FAIL, FAIL_ABOVE
from resnetv2_cli.plot import COLORS
from resnetv2_cli.runfolder import STATES

TICKS = (1, 2, 5, 10, 20, 50, 100)  # percent


def study(ablation: Ablation, charts: list[dict[str, Any]], detect: float) -> dict[str, Any]:
    """One ablation: its table, a mark for each error on a common axis, its charts."""
    columns, rows = tables.table(ablation, detect)
    title, *notes = ablation.title.splitlines()
    axis = Axis(ablation)
    return {
        "title": title,
        "notes": notes,
        "columns": columns[1:],
        "rows": [
            {
                "name": line.row.name,
                "figure": line.row.figure,
                "note": note(line),
                "color": i % len(COLORS),
                "cells": cells[1:],
                "marks": axis.marks(line),
                "arms": [arm(one) for one in line.arms],
            }
            for i, (line, cells) in enumerate(zip(ablation.lines, rows, strict=True))
        ],
        "ticks": axis.ticks,
        "shaded": axis.shaded,
        "charts": charts,
    }


def note(line: Line) -> str:
    """The note on a row, with digests of the user's own code, since another version of the code
    has a row of the same name."""
    code = {k: v for a in line.arms for k, v in Run(a.row, a.run).own_code.items()}
    return ", ".join(filter(None, [line.row.note, *(f"{k} {v}" for k, v in code.items())]))


def arm(one: Arm) -> dict[str, str]:
    """The state of one run of a row, and a sentence about it."""
    run = Run(one.row, one.run)
    says = f"seed {one.experiment.seed}: {STATES[run.state]}"
    if run.state == "done" and one.error is not None:
        says += f", {one.error:.2f} %"
    elif run.failure:
        says += f", {run.failure.get('reason', '')}"
    elif run.state in ("running", "stopped") and run.steps:
        says += f" at iteration {run.step:,} of {run.steps:,}"
    return {"state": run.state, "says": says}


class Axis:
    """A logarithmic axis of errors, in percent of its width, for all rows of a table."""

    def __init__(self, ablation: Ablation) -> None:
        ours = [e for line in ablation.lines for e in line.summary.errors]
        theirs = [line.row.published for line in ablation.lines]
        known = [e for e in [*ours, *theirs] if e is not None and math.isfinite(e) and e > 0]
        self.shaded = any(map(tables.ruled, ablation.lines))
        known += [FAIL_ABOVE] if self.shaded or FAIL in theirs or not known else []
        self.low, self.high = min(known) / 1.25, max(known) * 1.15

    def x(self, error: float) -> float:
        """The position of an error; FAIL is at the end."""
        if error == FAIL:
            return 100.0
        low, high = math.log(self.low), math.log(self.high)
        share = (math.log(max(error, self.low)) - low) / (high - low)
        return round(100 * min(1.0, share), 2)

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """Labels and positions of ticks: TICKS, or finer ones where errors are nearly alike."""
        within: list[float] = [t for t in TICKS if self.low < t < self.high]
        if len(within) < 2:
            finer = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
            within = [t for t in finer if self.low < t < self.high]
        return [(f"{t:g}", self.x(t)) for t in within]

    def marks(self, line: Line) -> dict[str, Any]:
        """Positions of the published error, the seeds' errors and their median; ``fail``: where a
        ``fail`` begins here; ``failed``: where it begins for a row that fails in the paper."""
        published = line.row.published
        median = line.summary.median
        return {
            "published": None if published in (None, FAIL) else self.x(published),
            "fail": self.x(FAIL_ABOVE) if tables.ruled(line) else 100.0,
            "failed": self.x(FAIL_ABOVE) if published == FAIL else None,
            "seeds": [self.x(error) for error in line.summary.errors],
            "median": None if median is None else self.x(median),
        }
