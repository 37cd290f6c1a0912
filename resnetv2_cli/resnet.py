"""Residual networks for CIFAR and ImageNet: stem, stages of units, head."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnetv2_cli.fused import forgetting
from resnetv2_cli.layers import Activation, Branch, activation, conv, keep_layout, numbered
from resnetv2_cli.plans import (
    BLOCKS,
    STEMS,
    default_block,
    default_option,
    places,
    units_per_stage,
)
from resnetv2_cli.shortcuts import settings_in
from resnetv2_cli.units import Kind, refuse_broken, residual_unit, standing_between


class ResNet(nn.Module):
    """Stem, body, head; the body is stages of Residual Units.

    Without its shortcuts it is ``depth - 1`` times conv, BN, ReLU in a plain chain, whatever the
    unit type, which only says where along the chain shortcuts leave and return (Sec. 4.1).
    So both ends of the chain are complete: the stem activates its output, and the head begins with
    the layers that would open one more unit. With ``first_act="unit"`` the first unit opens with
    its part of the stem's activation, as the others do; the stem keeps the rest.

    Shape: (N, 3, H, W) -> logits (N, classes); meant for H = W = 32 (cifar) or 224 (imagenet).

    Raises:
        UserError: no such depth, unit, shortcut or setting; names the nearest that exist.
    """

    def __init__(
        self,
        depth: int,
        block: str | None = None,
        unit: str = "full-preact",
        shortcut: str = "identity",
        classes: int = 10,
        *,
        stem: str = "cifar",
        settings: Mapping[str, object] | None = None,
        option: str | None = None,
        pad: str = "raw",
        stride_on: str = "first",
        first_act: str = "stem",
        init: str = "fan_out",
    ) -> None:
        super().__init__()
        block = block or default_block(depth, stem)
        option = option or default_option(block, stem)
        made_with = settings_in(shortcut, settings or {})
        kind = Kind(unit, block, shortcut, made_with, option, pad, stride_on)
        start, c = STEMS[stem], STEMS[stem].channels
        self.forget = False
        self.segments = 0  # of the body whose activations are recomputed in backward; 0: none
        refuse_broken(unit, block, stem)
        last, after, before = places(standing_between(unit))
        begun = "bn relu" if first_act == "stem" else f"{last} {after}"  # the stem's activation
        layers = OrderedDict[str, nn.Module](
            conv=conv(3, c, start.kernel, start.stride), act=activation(begun, c)
        )
        if start.pool:
            layers["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(layers)

        stages: list[nn.Module] = []
        for width, n in zip(start.widths, units_per_stage(depth, block, stem), strict=False):
            units = []
            for i in range(n):
                stride = 2 if stages and i == 0 else 1
                activated = first_act == "stem" and not stages and i == 0
                units.append(residual_unit(kind, c, width, stride, activated))
                c = width * BLOCKS[block].expansion
            stages.append(numbered("unit", units))
        self.body = numbered("stage", stages)
        for number, unit_ in enumerate(self.units, 1):
            unit_.shortcut.place(number, len(self.units))  # type: ignore[operator, union-attr]

        act = activation(before, c)  # the pre-activation that would open one more unit
        pool, fc = nn.AdaptiveAvgPool2d(1), nn.Linear(c, classes)
        self.head = nn.Sequential(OrderedDict(act=act, pool=pool, flat=nn.Flatten(), fc=fc))
        initialize(self, init)

    @property
    def units(self) -> list[nn.Module]:
        """Every Residual Unit, l = 1 ... L."""
        return list(self.named_units.values())

    @property
    def named_units(self) -> dict[str, nn.Module]:
        """Every Residual Unit by its name: ``stage1.unit1``."""
        return {
            f"{stage_name}.{unit_name}": unit
            for stage_name, stage in self.body.named_children()
            for unit_name, unit in stage.named_children()
        }

    def activate(self, compiled: bool, forget: bool) -> None:
        """Set how every BN and ReLU computes in training (``Activation``)."""
        self.forget = forget
        for module in self.modules():
            if isinstance(module, Activation | Branch):
                module.compiled = compiled
            if isinstance(module, Activation):
                module.forget = forget

    def part(self, name: str) -> nn.Module:
        """The stem, a stage or the head."""
        return (self.body if name.startswith("stage") else self).get_submodule(name)

    def forward(self, x: Tensor) -> Tensor:
        learns = self.training and torch.is_grad_enabled()
        with forgetting() if learns and self.forget else nullcontext():
            x = self.stem(x)
            if learns and self.segments:
                x = recomputed(self.units, self.segments, x)
            else:
                x = self.body(x)
            return self.head(keep_layout(x))


def recomputed(units: list[nn.Module], segments: int, x: Tensor) -> Tensor:
    """Run the units in sequence; of each segment only the input is kept, and the rest is recomputed
    in backward.

    Shape: (N, C, H, W) -> (N, C', H', W').
    """
    size = -(-len(units) // segments)
    for start in range(0, len(units), size):
        segment = nn.Sequential(*units[start : start + size])
        again = partial(_second_pass, segment)
        x = checkpoint(segment, x, use_reentrant=False, context_fn=again)  # type: ignore
    return x


def _second_pass(segment: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _uncounted(segment)


@contextmanager
def _uncounted(segment: nn.Module) -> Iterator[None]:
    """Leave BN's running statistics as they are: they have counted this batch already."""
    # The base class, which SyncBatchNorm has too.
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in segment.modules() if isinstance(m, kind) and m.track_running_stats]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]  # type: ignore
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]


def weight_layer(name: str) -> bool:
    """Whether the convolution of this name in a unit is a layer of F itself or carries x to the
    addition, rather than part of a shortcut or of a module that the user put into F."""
    part, *inside = name.split(".")
    return (part == "residual" and len(inside) == 1) or f"{name}.".startswith("shortcut.carry.")


def initialize(net: ResNet, mode: str) -> None:
    """He initialization of weight layers ("[23]"); BN keeps scale 1 and shift 0. The user's own
    modules keep theirs, and so do all parts of a shortcut but ``carry``: gates their b_g, a
    convolution its zeros.

    ``fan_out`` as in the authors' Torch code, where others take ``fan_in``: the two differ by a
    factor of 4 in the variance of a bottleneck's 1x1 convolutions. The classifier's bias starts at
    0; its weights keep PyTorch's default.
    """
    own = {m for unit in net.units for name, m in unit.named_modules() if not weight_layer(name)}
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module not in own:
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")  # type: ignore
            if mode == "fan_out":  # PyTorch's counts the outputs of all groups
                module.weight.data.mul_(module.groups**0.5)
    nn.init.zeros_(net.head.fc.bias)  # type: ignore[union-attr, arg-type]
