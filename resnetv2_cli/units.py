"""The Residual Unit, x_{l+1} = f(h(x_l) + F(x_l, W_l)), and how it is built from the tables."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from resnetv2_cli import own, trust
from resnetv2_cli.errors import UserError
from resnetv2_cli.layers import Branch, ZeroPad, activation, conv
from resnetv2_cli.ownname import OwnName, settled
from resnetv2_cli.plans import BLOCKS, STEMS, UNITS, between, places, unit_between
from resnetv2_cli.shortcuts import Shortcut, shortcut_class


@dataclass(frozen=True)
class Kind:
    """What all units of a network have in common."""

    unit: str = "full-preact"
    block: str = "basic"
    shortcut: str = "identity"
    settings: Mapping[str, object] = field(default_factory=dict)
    option: str = "A"  # of [1]: where the shape changes A pads and B projects; C always projects
    pad: str = "raw"  # what option A carries in a pre-activation unit: raw or activated x
    stride_on: str = "first"  # which weight layer of F has the stride: the first, or the 3x3


class ResidualUnit(nn.Module):
    """x_{l+1} = f(h(x_l) + F(x_l, W_l)).

    A unit of your own is a class derived from this one, with its own ``between`` or ``weights``:
    ``--unit my_module:MyUnit``. Its settings are the class attributes that are numbers, booleans
    or strings: ``--unit my_module:MyUnit:ratio=4``.

    Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
    Source: Eqns. 1 and 2; ``shared`` acts "before splitting into two paths" (appendix).
    """

    between = UNITS["full-preact"]  # the layers between two units of a user's own class

    def __init__(
        self, shared: nn.Module, residual: Branch, shortcut: Shortcut, after: nn.Module
    ) -> None:
        super().__init__()
        self.shared, self.residual, self.shortcut, self.after = shared, residual, shortcut, after

    @classmethod
    def weights(
        cls, kind: Kind, c_in: int, width: int, c_out: int, stride: int
    ) -> Iterator[tuple[str, nn.Module]]:
        """The named layers of F, first weight layer to last: weight, (bn relu, weight)...

        ``act1`` and ``last``, the layers that ``between`` puts before and after them, are not
        included. Convolutions among these layers get the network's initialization; those inside a
        module of your own keep the one that it gives them.

        Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
        """
        kernels = BLOCKS[kind.block].kernels
        # The first 1x1, as in the authors' Caffe and Torch code; fb.resnet.torch has the 3x3.
        strided = kernels.index(3) if kind.stride_on == "3x3" else 0
        c_outs = [width] * (len(kernels) - 1) + [c_out]
        for k, (kernel, c) in enumerate(zip(kernels, c_outs, strict=True)):
            if k:
                yield f"act{k + 1}", activation("bn relu", c_in)
            yield f"conv{k + 1}", conv(c_in, c, kernel, stride if k == strided else 1)
            c_in = c

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)  # the identity in most units
        # y_l = h(x_l) + F(x_l, W_l)   (1)
        # x_{l+1} = f(y_l)             (2)
        return self.shortcut.join(x, self.residual, self.after)


# By option of [1]: whether a unit projects, given whether it changes the shape.
PROJECTS: dict[str, Callable[[bool], bool]] = {
    "A": lambda changes: False,
    "B": lambda changes: changes,
    "C": lambda changes: True,
}


def carry(
    kind: Kind, cls: type[Shortcut], last: str, c_in: int, c_out: int, stride: int
) -> nn.Module:
    """The path of x to the addition: the identity, or what the option of [1] prescribes.

    Shape: (N, c_in, H, W) -> (N, c_out, H/stride, W/stride).
    """
    changes = stride != 1 or c_in != c_out
    projects = cls.projects or PROJECTS[kind.option](changes)
    if not projects:
        return ZeroPad(c_in, c_out, stride) if changes else nn.Identity()
    bn = "bn" if "bn" in last else ""  # BN follows the projection where it follows F's last weights
    return Branch(OrderedDict(conv=conv(c_in, c_out, 1, stride), act=activation(bn, c_out)))


def weighted(module: nn.Module) -> bool:
    """Whether x passes a weight layer here, which then needs its pre-activation, as F does."""
    return any(isinstance(m, nn.Conv2d) for m in module.modules())


def unit_class(name: str) -> type[ResidualUnit]:
    """The class of a unit type: the user's own, ``module:Class``, or the paper's.

    Raises:
        UserError: there is no such module or class, the class cannot be used, or only a file asks
            for it (``trust``).
    """
    if ":" not in name:
        return ResidualUnit
    trust.refuse_strange(OwnName.of(name).place)
    return _own(name)


@cache
def _own(name: str) -> type[ResidualUnit]:
    """The class of ``module:Class``, with the settings in its name.

    Raises:
        UserError: there is no such module or class, the class is no ``ResidualUnit``, or it has no
            such settings.
    """
    cls = own.imported("unit", OwnName.of(name).place, ResidualUnit)
    lineage = cls.__mro__[: cls.__mro__.index(ResidualUnit)]
    known = {n: v for base in reversed(lineage) for n, v in vars(base).items() if n[0] != "_"}
    plain = {n: v for n, v in known.items() if isinstance(v, int | float | str) and n != "between"}
    made = settled("unit", OwnName.of(name), plain, "numbers, booleans and strings of the class")
    same = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), same | made) if made else cls


def standing_between(unit: str) -> str:
    """The layers between two units of a type; for a user's own class its ``between``.

    Raises:
        UserError: that is not valid layers and marks.
    """
    return between(unit_between(str(unit_class(unit).between)) if ":" in unit else unit)


def residual_unit(
    kind: Kind, c_in: int, width: int, stride: int = 1, activated: bool = False
) -> ResidualUnit:
    """Build one unit from the tables; ``activated``: x is already activated, as after the stem."""
    last, after, before = places(standing_between(kind.unit))
    unit, cls = unit_class(kind.unit), shortcut_class(kind.shortcut)
    c_out = width * BLOCKS[kind.block].expansion

    carried = carry(kind, cls, last, c_in, c_out, stride)
    # "these projection shortcuts are also with pre-activation" (appendix). Option A has no weights,
    # and the paper is silent: raw x keeps the path clean, fb.resnet.torch pads the activated x.
    both = weighted(carried) or (isinstance(carried, ZeroPad) and kind.pad == "activated")
    before = "" if activated else before
    shared, before = (before, "") if both else ("", before)

    weights = unit.weights(kind, c_in, width, c_out, stride)
    layers = [("act1", activation(before, c_in)), *weights, ("last", activation(last, c_out))]
    names = [name for name, _ in layers]
    if twice := [name for name in names if names.count(name) > 1]:
        hint = "names must differ; act1 and last are the layers that open and end F"
        raise UserError(f"unit {kind.unit!r} has two layers called {twice[0]!r}", hint)
    return unit(
        shared=activation(shared, c_in),
        residual=Branch(OrderedDict(layers)),
        shortcut=cls(c_in, c_out, stride, carried, **kind.settings),
        after=activation(after, c_out),
    )


@cache
def refuse_broken(name: str, block: str, stem: str) -> None:
    """Try a user's own unit on small inputs, in every shape that a network uses it in.

    Raises:
        UserError: it fails, or its output does not have the shape of x_{l+1}.
    """
    if ":" not in name:
        return
    made = "its weights are pairs of a name and a layer, given (kind, c_in, width, c_out, stride)"
    hint = "its weights must take c_in channels to c_out, with this total stride"
    kind, c = Kind(name, block, option="B"), STEMS[stem].channels
    with own.tried("unit", name, unit_class(name), made) as gives:
        for stage, width in enumerate(STEMS[stem].widths):
            c_out = width * BLOCKS[block].expansion
            for c_in, stride in ((c, 1 if stage == 0 else 2), (c_out, 1)):
                unit = residual_unit(kind, c_in, width, stride)
                x, y = torch.randn(2, c_in, 8, 8), torch.empty(2, c_out, 8 // stride, 8 // stride)
                gives(unit.residual(unit.shared(x)), y, "F(x)", hint)
                gives(unit(x), y, "x_l+1", "its forward returns what the next unit takes")
                own.refuse_rewritten("unit", name, x)
            c = c_out
