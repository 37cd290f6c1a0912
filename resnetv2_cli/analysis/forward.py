"""The signal on its way up: x_L = x_l + sum of F(x_i, W_i) (Eq. 4), and where it breaks."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli.analysis.draw import Measured, Panels, by_stage, ends, named, of, short
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.topics import Table
from resnetv2_cli.analysis.trace import Trace, Unit, ratio, size


def additive_residuals(span: list[Unit]) -> list[float]:
    """||x_L - x_l - sum F(x_i, W_i)|| / ||x_L|| for every l of a span; x_L leaves its last unit.

    F is taken as it is added, including any factor of the shortcut. Zero up to rounding where h and
    f are identities. Source: Eq. 4.
    """
    x_L = span[-1].out.detach()
    total, off = torch.zeros_like(x_L), list[float]()
    for unit in reversed(span):
        total = total + unit.added.detach()
        off.append(ratio(size(x_L - unit.x.detach() - total), size(x_L)))
    return off[::-1]


def each_image(x: Tensor) -> float:
    """The norm of one image's feature map, averaged over the batch.

    Shape: x (N, C, H, W).
    """
    return sum(map(size, x)) / len(x)


def below_zero(y: Tensor) -> float:
    """The share of negative numbers; NaN if one is NaN.

    Shape: y any.
    """
    return float((y < 0).double().where(~y.isnan(), math.nan).mean())


def measure(subject: Subject, trace: Trace) -> dict[str, Any]:
    """``x``, ``residual`` (norms) and ``negative`` (share of y_l < 0) of every unit; ``off``,
    the relative error of Eq. 4 from there to the end of its stage, None where the shape changes."""
    off = {
        unit: value
        for span in trace.spans
        for unit, value in zip(span, additive_residuals(span), strict=True)
    }
    return {
        "stage": [u.stage for u in trace.units],
        "x": [each_image(u.x) for u in trace.units],
        "residual": [each_image(u.residual) for u in trace.units],
        "negative": [below_zero(u.y) for u in trace.units],
        "off": [off.get(u) for u in trace.units],
    }


def table(measured: Measured) -> Table:
    """A line for each stage of each network."""
    columns = ["stage", "|x_l|", "|F_l|/|x_l|", "y_l < 0", "Eq. 4 off by"]
    rows = [
        [
            named(measured, label, stage),
            ends([m["x"][i] for i in units]),
            ends([ratio(m["residual"][i], m["x"][i]) for i in units]),
            ends([m["negative"][i] for i in units]),
            short(max((m["off"][i] for i in units if m["off"][i] is not None), default=None)),
        ]
        for label, m in measured.items()
        for stage, units in by_stage(m)
    ]
    title = f"x_L = x_l + sum F(x_i) (Eq. 4), first - last unit of a stage{of(measured)}"
    return Table(title, columns, rows)


def draw(measured: Measured, to: Path) -> None:
    """Norms, Eq. 4 and signs, over depth."""
    panels = Panels(
        measured,
        "norm of x_l (solid) and of F(x_l) (dashed), one image",
        "Eq. 4 off by: |x_L - x_l - sum F(x_i)| / |x_L|, L the stage's end",
        "share of y_l < 0, before f",
    )
    for label, m in measured.items():
        panels.over_depth(0, label, m["x"])
        panels.over_depth(0, label, m["residual"], "--")
        panels.off(1, label, m["off"])
        panels.over_depth(2, label, m["negative"])
    panels.log(0)
    panels.save(to)
