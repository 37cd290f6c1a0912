"""F made smaller and smaller: "the gradient of a layer does not vanish even when the weights are
arbitrarily small" (Sec. 2)."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnetv2_cli.analysis.backward import gradients
from resnetv2_cli.analysis.draw import Measured, Panels, named, of, short
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.topics import Table
from resnetv2_cli.analysis.trace import Trace, ratio, size, trace
from resnetv2_cli.resnet import ResNet

FACTORS = (1.0, 0.1, 0.01, 1e-4)


class Times(nn.Module):
    """Multiplies its input by a factor.

    Shape: as the input.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def shrunk(net: ResNet, factor: float) -> ResNet:
    """A copy in which every F is multiplied by ``factor``, as if its last weights, or the BN after
    them, were."""
    net = deepcopy(net)
    for unit in net.units:
        unit.residual.add_module("shrunk", Times(factor))  # type: ignore[union-attr, operator]
    return net


def change(traced: Trace) -> list[float]:
    """||dL/dx_l - dL/dx_L|| / ||dL/dx_L|| for the first l and the last L of each stage."""
    at_x, at_out = gradients(traced)
    found = []
    for span in traced.spans:
        start, end = at_x[span[0]], at_out[span[-1]]
        found.append(ratio(size(start - end), size(end)))
    return found


def measure(subject: Subject, traced: Trace) -> dict[str, Any]:
    """``factor``: what F is multiplied by; ``change``: of the gradient along each stage, a list for
    each factor. Every factor gets the same random numbers, for dropout and stochastic depth."""
    changes = []
    for factor in FACTORS:
        with torch.random.fork_rng(devices=[]):
            made = trace(shrunk(subject.net, factor), subject.x, subject.labels)
        changes.append(change(made))
    return {"factor": list(FACTORS), "change": changes}


def table(measured: Measured) -> Table:
    """A line for each network and factor."""
    columns = ["F times", "stage 1, 2, ..."]
    rows = [
        [named(measured, label, f"{factor:g}"), ", ".join(map(short, changes))]
        for label, m in measured.items()
        for factor, changes in zip(m["factor"], m["change"], strict=True)
    ]
    title = f"|dL/dx_l - dL/dx_L| / |dL/dx_L| when F is small (Sec. 2, Eq. 5){of(measured)}"
    return Table(title, columns, rows)


def draw(measured: Measured, to: Path) -> None:
    """How far the gradient at a stage's start is from that at its end, against the factor on F."""
    most = max(len(m["change"][0]) for m in measured.values()) or 1  # if no unit keeps its shape
    start = "|dL/dx_l - dL/dx_L| / |dL/dx_L|, from its first l to its last L"
    titles = [f"stage {i + 1}: {start}" for i in range(most)]
    panels = Panels(measured, *titles, over_depth=False)
    for label, m in measured.items():
        for stage, changes in enumerate(zip(*m["change"], strict=True)):
            panels.line(stage, label, m["factor"], changes, "o-")
    panels.log(*range(most))
    for panel in panels.panels:
        panel.set_xscale("log")
        panel.invert_xaxis()
    panels.below("factor on every F")
    panels.save(to)
