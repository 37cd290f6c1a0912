"""The Residual Unit, x_{l+1} = f(h(x_l) + F(x_l, W_l)), and how one is filled from the tables."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from resnetv2_cli.layers import Branch, ZeroPad, activation, conv
from resnetv2_cli.plans import BLOCKS, places
from resnetv2_cli.shortcuts import Shortcut, shortcut_class


class ResidualUnit(nn.Module):
    """x_{l+1} = f(h(x_l) + F(x_l, W_l)).

    Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
    Source: Eqns. 1 and 2; ``shared`` acts "before splitting into two paths" (appendix).
    """

    def __init__(
        self, shared: nn.Module, residual: Branch, shortcut: Shortcut, after: nn.Module
    ) -> None:
        super().__init__()
        self.shared, self.residual, self.shortcut, self.after = shared, residual, shortcut, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)  # the identity in most units
        # y_l = h(x_l) + F(x_l, W_l)   (1)
        # x_{l+1} = f(y_l)             (2)
        return self.shortcut.join(x, self.residual, self.after)


# Whether a unit projects, by the option of [1], from whether it changes the shape.
PROJECTS: dict[str, Callable[[bool], bool]] = {
    "A": lambda changes: False,
    "B": lambda changes: changes,
    "C": lambda changes: True,
}


@dataclass(frozen=True)
class Kind:
    """What all units of a network have in common."""

    unit: str = "full-preact"
    block: str = "basic"
    shortcut: str = "identity"
    settings: Mapping[str, object] = field(default_factory=dict)
    option: str = "A"  # of [1]: where the shape changes, A pads and B projects; C always does
    pad: str = "raw"  # what option A carries in a pre-activation unit: raw or activated x
    stride_on: str = "first"  # which weight layer of F has the stride: the first, or the 3x3


def residual_branch(
    kind: Kind, before: str, last: str, c_in: int, width: int, stride: int
) -> Branch:
    """F: before, weight, (bn relu, weight) ..., last.

    Shape: (N, c_in, H, W) -> (N, width * expansion, H/stride, W/stride).
    """
    block = BLOCKS[kind.block]
    # The first 1x1, as in the authors' Caffe models and Torch code; fb.resnet.torch has the 3x3.
    strided = block.kernels.index(3) if kind.stride_on == "3x3" else 0
    layers, act = OrderedDict[str, nn.Module](), before
    c_outs = [width] * (len(block.kernels) - 1) + [width * block.expansion]
    for k, (kernel, c_out) in enumerate(zip(block.kernels, c_outs, strict=True)):
        layers[f"act{k + 1}"] = activation(act, c_in)
        layers[f"conv{k + 1}"] = conv(c_in, c_out, kernel, stride if k == strided else 1)
        c_in, act = c_out, "bn relu"
    layers["last"] = activation(last, c_in)
    return Branch(layers)


def carry(
    kind: Kind, cls: type[Shortcut], last: str, c_in: int, c_out: int, stride: int
) -> nn.Module:
    """What brings x to the addition: nothing, or what the option of [1] says.

    Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
    """
    changes = stride != 1 or c_in != c_out
    projects = cls.projects or PROJECTS[kind.option](changes)
    if not projects:
        return ZeroPad(c_in, c_out, stride) if changes else nn.Identity()
    bn = "bn" if "bn" in last else ""  # a unit that normalizes behind F's weights does so here too
    return nn.Sequential(OrderedDict(conv=conv(c_in, c_out, 1, stride), act=activation(bn, c_out)))


def weighted(module: nn.Module) -> bool:
    """Whether x meets a weight layer here; then it wants its pre-activation, as F does."""
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def residual_unit(
    kind: Kind, c_in: int, width: int, stride: int = 1, activated: bool = False
) -> ResidualUnit:
    """Fill one unit from the tables; ``activated``: x comes activated, as it does from the stem."""
    last, after, before = places(kind.unit)
    c_out = width * BLOCKS[kind.block].expansion
    cls = shortcut_class(kind.shortcut)

    carried = carry(kind, cls, last, c_in, c_out, stride)
    # "these projection shortcuts are also with pre-activation" (appendix). Option A has no weights,
    # and the paper is silent: raw x keeps the path clean, fb.resnet.torch pads the activated x.
    both = weighted(carried) or (isinstance(carried, ZeroPad) and kind.pad == "activated")
    before = "" if activated else before
    shared, before = (before, "") if both else ("", before)

    return ResidualUnit(
        shared=activation(shared, c_in),
        residual=residual_branch(kind, before, last, c_in, width, stride),
        shortcut=cls(c_in, c_out, stride, carried, **kind.settings),
        after=activation(after, c_out),
    )
