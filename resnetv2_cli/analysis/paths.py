"""The gradient by path length: a path goes through F in some units, through h in the others.

Not from this paper: Veit, Wilber and Belongie 2016 count paths this way, and sample them; here all
paths of one length are summed exactly.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli.analysis.backward import gradients, vjp
from resnetv2_cli.analysis.draw import Measured, Panels, Value, named, of, short
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.topics import Table
from resnetv2_cli.analysis.trace import Trace, Unit, ratio, size
from resnetv2_cli.quantities import NONE

LENGTHS = 24  # of the longest paths kept apart; longer ones form one remainder


def by_length(units: list[Unit], at_end: Tensor, longest: int) -> list[Tensor]:
    """dL/dx_1 of all paths through F of exactly 0, 1, ..., ``longest`` units, each shaped as x_1.

    These are the terms with k factors F' in the product of (h' + F') over all units; f' is on every
    path.
    """
    terms = [at_end]
    for unit in reversed(units):
        if unit.out is not unit.y:  # f is not the identity
            terms = [vjp([unit.out], [unit.y], [term])[0] for term in terms]
        none = torch.zeros_like(terms[0])
        through_h, through_f = [*terms, none], [none, *terms]
        terms = [
            vjp([unit.h, unit.added], [unit.x], [a, b])[0]
            for a, b in zip(through_h, through_f, strict=True)
        ][: longest + 1]
    return terms


def measure(subject: Subject, trace: Trace) -> dict[str, Any]:
    """For the lengths 0, 1, ...: ``norm`` of their part of dL/dx_1, and ``share``, its component
    along dL/dx_1 over the norm of dL/dx_1. The shares and ``rest``, of longer paths, add up to 1;
    paths that point against the gradient have negative ones. NaN if the gradient is 0."""
    at_x, at_out = gradients(trace)
    total = at_x[trace.units[0]].double()
    found = by_length(trace.units, at_out[trace.units[-1]], min(LENGTHS, len(trace.units)))
    terms = [term.double() for term in found]  # sums and products would leave float32's range
    whole = size(total)
    share = [ratio(float((term * (total / whole)).sum()), whole) for term in terms]
    return {
        "units": len(trace.units),
        "norm": [size(term) for term in terms],
        "share": share,
        "rest": 1 - sum(share),
        "rest_norm": ratio(size(total - sum(terms)), whole),
    }


def percent(shares: list[Value]) -> str:
    """Their sum, percent: one decimal, no minus sign before 0.0; a dash if one is missing."""
    known = [s for s in shares if s is not None]
    return f"{round(100 * sum(known), 1) + 0.0:.1f}" if known == shares else short(None)


def table(measured: Measured) -> Table:
    """A line for each network."""
    groups = {"0": (0, 0), "1-3": (1, 3), "4-6": (4, 6), "7-12": (7, 12), "13-24": (13, LENGTHS)}
    columns = ["passed", "units", *groups, "more", "half within"]
    rows = []
    for label, m in measured.items():
        known = m["share"] if None not in m["share"] else []
        half = next((k for k, s in enumerate(accumulate(known)) if s >= 0.5), None)
        rows.append(
            [
                named(measured, label, "" if len(measured) > 1 else "share"),
                str(m["units"]),
                *(percent(m["share"][a : b + 1]) for a, b in groups.values()),
                percent([m["rest"]]),
                NONE if half is None else f"{half}",
            ]
        )
    title = f"dL/dx_1, %, by how many F its paths pass (Veit et al. 2016){of(measured)}"
    return Table(title, columns, rows)


def draw(measured: Measured, to: Path) -> None:
    """Share and norm against path length."""
    panels = Panels(
        measured,
        "share of dL/dx_1 along its own direction",
        "norm of the part",
        over_depth=False,
    )
    for label, m in measured.items():
        lengths = range(len(m["share"]))
        panels.line(0, label, lengths, m["share"], "o-")
        panels.line(1, label, lengths, m["norm"], "o-")
    panels.log(1)
    panels.below("units whose F the path passes (not from this paper: Veit et al. 2016)")
    panels.save(to)
