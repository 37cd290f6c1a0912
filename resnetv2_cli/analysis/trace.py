"""The tensors of every unit, kept while a batch passes: x_l, h, F, y_l, x_{l+1}."""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetv2_cli.errors import UserError
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import ShortcutOnlyGate


@dataclass(eq=False)
class Unit:
    """One Residual Unit while a batch passes, with the autograd graph between its tensors.

    Shape: x (N, c_in, H, W); the others (N, c_out, H/stride, W/stride), gate too.
    """

    name: str  # as in checkpoints: stage1.unit1
    module: nn.Module
    x: Tensor = field(init=False)  # x_l
    split: Tensor = field(init=False)  # x_l after an activation that both paths share, if any
    residual: Tensor = field(init=False)  # F(x_l, W_l)
    h: Tensor = field(init=False)  # h(x_l), the output of the shortcut alone
    added: Tensor = field(init=False)  # what F adds to h, scaled or gated: F, b F or g F
    y: Tensor = field(init=False)  # y_l = h(x_l) + F(x_l, W_l)
    out: Tensor = field(init=False)  # x_{l+1} = f(y_l)
    gate: Tensor | None = None  # g(x_l)

    @property
    def stage(self) -> int:
        """1, 2, 3, ..."""
        return int(self.name.split(".")[0].removeprefix("stage"))

    @property
    def keeps_shape(self) -> bool:
        """Whether Eq. 3 can hold here: not where the feature map changes (footnote 1)."""
        return self.x.shape == self.out.shape


@dataclass(eq=False)
class Trace:
    """Every unit, l = 1 ... L, and the loss (nats, mean over the batch)."""

    units: list[Unit]
    loss: Tensor

    @property
    def spans(self) -> list[list[Unit]]:
        """Consecutive units with the same feature-map size, where the derivations are strict."""
        keeping = [u for u in self.units if u.keeps_shape]
        return [list(units) for _, units in groupby(keeping, key=lambda u: u.stage)]


def trace(net: ResNet, x: Tensor, labels: Tensor) -> Trace:
    """Pass a batch once, in the network's current mode, and keep the tensors of every unit.

    A copy is used, since BN's running statistics would count the batch. h is computed a second
    time, on its own, with the same statistics and the same random numbers.

    Shape: x (N, 3, H, W), labels (N,).

    Raises:
        UserError: a layer writes in place into x_l, F, y_l or x_{l+1}, or a unit does not call its
            shortcut; names the unit.
    """
    net = deepcopy(net).requires_grad_(False)
    net.segments = 0
    watchers = [_Watcher(Unit(name, unit)) for name, unit in net.named_units.items()]
    loss = F.cross_entropy(net(x.detach().requires_grad_()), labels)
    for watcher in watchers:
        watcher.refuse_if_rewritten()
    return Trace([w.unit for w in watchers], loss)


class _Watcher:
    """Fills a ``Unit`` from hooks on its module."""

    def __init__(self, unit: Unit) -> None:
        self.unit, self.versions = unit, dict[str, int]()
        shortcut: Any = unit.module.shortcut
        unit.module.register_forward_pre_hook(self.enters)
        shortcut.register_forward_pre_hook(self.meets)
        shortcut.register_forward_hook(self.adds)
        unit.module.register_forward_hook(self.leaves)
        if isinstance(shortcut, ShortcutOnlyGate):
            shortcut.gate.register_forward_hook(self.opens)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor and its version, which in-place layers raise: it must not change again."""
        setattr(self.unit, name, tensor)
        self.versions[name] = tensor._version

    def enters(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.keep("x", args[0])

    def meets(self, _: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        self.keep("split", args[0])
        self.keep("residual", args[1])
        self.random = torch.get_rng_state()

    def adds(self, shortcut: nn.Module, args: tuple[Tensor, Tensor], y: Tensor) -> None:
        def again(residual: Tensor) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.random)  # the mask that dropout drew for y
                return shortcut.forward(args[0], residual)

        self.refuse_if_rewritten()  # here, to name the unit that did it
        self.keep("y", y)
        self.unit.h = again(torch.zeros_like(args[1]))
        # Not y - h: if f is the identity, y_l is x_{l+1}, which no term of lower units may contain.
        self.unit.added = again(args[1]) - self.unit.h

    def opens(self, _: nn.Module, args: Any, out: Tensor) -> None:
        self.unit.gate = torch.sigmoid(out.detach())

    def leaves(self, _: nn.Module, args: Any, out: Tensor) -> None:
        if "y" not in self.versions:
            hint = "h and F are measured where self.shortcut(x, residual) is called"
            raise UserError(
                f"{self.unit.name} has a forward of its own that does not call its shortcut", hint
            )
        self.refuse_if_rewritten()
        self.keep("out", out)

    def refuse_if_rewritten(self) -> None:
        for name, version in self.versions.items():
            if getattr(self.unit, name)._version != version:
                hint = "use layers that do not work in place where the two paths split or meet"
                raise UserError(f"{self.unit.name} rewrites its {_WORDS[name]} in place", hint)


_WORDS = {"x": "x_l", "split": "x_l", "residual": "F(x_l)", "y": "y_l", "out": "x_{l+1}"}


def size(x: Tensor) -> float:
    """The Euclidean norm of a tensor as a whole, over all images.

    Squares leave a format's range long before the numbers themselves: they are taken in float64, of
    x over its largest absolute value.
    """
    x = x.detach().double()
    largest = float(x.abs().max())
    if not largest or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(x / largest))


def ratio(a: float | None, b: float | None) -> float:
    """a / b; NaN if b is 0, or one of them is missing or not finite."""
    if a is None or not b or not math.isfinite(a) or not math.isfinite(b):
        return math.nan
    return a / b
