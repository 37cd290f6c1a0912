"""A forward pass that keeps x_l, F_l and y_l of every Residual Unit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from resnetv2_cli.layers import keep_layout
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.units import ResidualUnit


@dataclass(frozen=True)
class Step:
    """One unit at work: x_l -> F(x_l), y_l -> x_{l+1} = ``out``, all of shape (N, C, H, W).

    ``draws``: the generator's state before the shortcut, so that a dropout can be drawn again.
    """

    name: str
    unit: ResidualUnit
    x: Tensor
    residual: Tensor
    y: Tensor
    out: Tensor
    draws: Tensor

    @property
    def clean(self) -> bool:
        """Whether x keeps its shape, so that x_l and x_{l+1} can be compared (footnote 1)."""
        return self.x.shape == self.out.shape

    def shortcut(self, x: Tensor, residual: Tensor) -> Tensor:
        """h(x) and F together, with the draws of this step."""
        with drawn(self.draws):
            return self.unit.shortcut(x, residual)

    def h(self, x: Tensor) -> Tensor:
        """h(x) alone: what the shortcut carries where F is 0."""
        return self.shortcut(x, torch.zeros_like(self.residual))


@contextmanager
def drawn(state: Tensor) -> Iterator[None]:
    """With the generator as it was; afterwards it is as it is."""
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)


def trace(net: ResNet, x: Tensor) -> tuple[list[Step], Tensor]:
    """Every unit's step, l = 1 ... L, and the logits; nothing in them is overwritten later.

    Shape: x (N, 3, H, W), normalized.
    """
    steps = []
    x = net.stem(x)
    for stage_name, stage in net.body.named_children():
        for name, unit in stage.named_children():
            draws = torch.get_rng_state()
            shared = unit.shared(x)  # type: ignore[operator]
            residual = unit.residual(shared)  # type: ignore[operator]
            with drawn(draws):
                y = unit.shortcut(shared, residual)  # type: ignore[operator]
            out = unit.after(y)  # type: ignore[operator]
            torch.set_rng_state(advanced(draws))
            steps.append(Step(f"{stage_name}.{name}", unit, x, residual, y, out, draws))  # type: ignore
            x = out
    return steps, net.head(keep_layout(x))


def advanced(state: Tensor) -> Tensor:
    """The generator's state after some draws, so that no two units draw the same."""
    with drawn(state):
        torch.rand(1)
        return torch.get_rng_state()


def stretches(steps: list[Step]) -> dict[str, list[Step]]:
    """The units of each stage over which the equations hold: all but one that changes the shape.

    "Derivations are valid within one feature-map size" (footnote 1).
    """
    found: dict[str, list[Step]] = {}
    for step in steps:
        if step.clean:
            found.setdefault(step.name.split(".")[0], []).append(step)
    return found
