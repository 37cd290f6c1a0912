"""The forward pass: Eqs. 3, 4 and 7, and how open the shortcuts are."""

import math
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli.analysis.trace import Step, stretches

SMALLEST = {  # positive normal numbers
    "float32": torch.finfo(torch.float32).tiny,
    "float16": torch.finfo(torch.float16).tiny,
}


def rms(x: Tensor) -> float:
    """Root mean square of all elements."""
    return float(x.double().square().mean().sqrt())


def forward(steps: list[Step]) -> dict[str, Any]:
    """``units``: sizes of x_l and F_l along depth; ``stages``: the additive form (Eq. 4).

    ``additive_error``: max |x_L - x_l - sum F_i| over max |x_L|, zero to rounding where h and f
    are the identity, for every pair of ends that a stage has, the worst. ``least_growth``: min of
    x_{l+1} - x_l, not negative where F ends in ReLU, Fig. 4(c).
    """
    return {
        "units": [
            {
                "name": s.name,
                "x": rms(s.x),
                "residual": rms(s.residual),
                "truncated": float((s.y < 0).double().mean()),
            }
            for s in steps
        ],
        "x_L": rms(steps[-1].out),
        "stages": [
            {
                "name": name,
                "units": len(part),
                "additive_error": additive_error(part),
                "least_growth": min(float((s.out - s.x).min()) for s in part),
                "truncated": sum(float((s.y < 0).double().mean()) for s in part) / len(part),
            }
            for name, part in stretches(steps).items()
        ],
    }


def additive_error(part: list[Step]) -> float:
    """Eq. 4 from each x_l of a stage to its end: the largest error, relative to max |x_L|."""
    end = part[-1].out
    total, worst = torch.zeros_like(end), 0.0
    for step in reversed(part):
        total = total + step.residual  # sum of F_i, i = l ... L-1
        worst = max(worst, float((end - step.x - total).abs().max()))
    return worst / float(end.abs().max())


def shortcuts(steps: list[Step]) -> dict[str, Any]:
    """How much of x each h lets through, and what is left at the end of the stages (Eqs. 6-8).

    ``gain``: size of h(x_l) over size of x_l; ``open``: mean of 1 - g(x_l), for gates, with its
    ``least`` and ``most``. ``log10_product``: of all gains, the factor that Eq. 8 puts before the
    direct term; ``underflows``: the arithmetics that cannot hold it.
    """
    units = [one(step) for step in steps]
    product = sum(math.log10(u["gain"]) if u["gain"] > 0 else -math.inf for u in units)
    return {
        "units": units,
        "log10_product": product,
        "underflows": [name for name, tiny in SMALLEST.items() if product < math.log10(tiny)],
    }


def one(step: Step) -> dict[str, Any]:
    """A unit's shortcut."""
    with torch.no_grad():
        shared = step.unit.shared(step.x)
        found: dict[str, Any] = {"name": step.name, "gain": rms(step.h(shared)) / rms(shared)}
        if gate := getattr(step.unit.shortcut, "gate", None):
            carried = 1 - torch.sigmoid(gate(shared))
            found |= {
                "open": float(carried.mean()),
                "least": float(carried.min()),
                "most": float(carried.max()),
            }
    return found
