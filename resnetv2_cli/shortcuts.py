"""h, and how it is combined with F: a class for each shortcut of Fig. 2, and two of later papers.

To add one: write a class whose ``forward(x, residual)`` is its formula, and give it a row in
SHORTCUTS. A class of your own needs no row: ``--shortcut my_module:MyShortcut``.
"""

import inspect
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from resnetv2_cli import own, trust
from resnetv2_cli.errors import unknown
from resnetv2_cli.layers import Branch, watched
from resnetv2_cli.ownname import OwnName, settled
from resnetv2_cli.plans import check_settings


class Shortcut(nn.Module):
    """x + F(x): identity, the clean information path (Fig. 2a).

    ``carry`` brings x to the addition: the identity, except in units that change the shape of x.
    Keyword arguments of a subclass's ``__init__`` are its settings.

    Shape: x (N, c_in, H, W) and residual (N, c_out, H/stride, W/stride) -> y, shaped as residual.
    """

    projects = False  # whether x passes a 1x1 convolution in every unit (option C of [1])

    def __init__(self, c_in: int, c_out: int, stride: int, carry: nn.Module) -> None:
        super().__init__()
        self.carry = carry

    def place(self, unit: int, units: int) -> None:
        """Called with the number of its unit in the network, 1 ... L, and with L."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.carry(x) + residual

    def join(self, x: Tensor, residual: Branch, after: nn.Module) -> Tensor:
        """``after(forward(x, F(x)))``. If ``forward`` is this plain sum, F adds x as it writes its
        output, unless hooks observe F(x)."""
        if type(self).forward is Shortcut.forward and not watched(self, residual):
            return residual(x, self.carry, after)
        return after(self(x, residual(x)))


class ConstantScale(Shortcut):
    """a x + b F(x): constant scaling, a = shortcut scale, b = residual scale (Eqn. 6, Fig. 2b)."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        carry: nn.Module,
        shortcut_scale: float = 0.5,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__(c_in, c_out, stride, carry)
        self.a, self.b = shortcut_scale, residual_scale

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.a * self.carry(x) + self.b * residual


class ShortcutOnlyGate(Shortcut):
    """(1 - g(x)) x + F(x), where g(x) = sigmoid(W_g x + b_g) (Fig. 2d)."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, carry: nn.Module, gate_bias: float = -6.0
    ) -> None:
        super().__init__(c_in, c_out, stride, carry)
        self.gate = nn.Conv2d(c_in, c_out, 1, stride)  # W_g: PyTorch's init; the paper states none
        nn.init.constant_(self.gate.bias, gate_bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate(x))
        return (1 - g) * self.carry(x) + residual


class ExclusiveGate(ShortcutOnlyGate):
    """(1 - g(x)) x + g(x) F(x), as in Highway Networks (Fig. 2c)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        g = torch.sigmoid(self.gate(x))
        return (1 - g) * self.carry(x) + g * residual


class Conv1x1(Shortcut):
    """W_s x + F(x): a 1x1 convolution in every unit, option C of [1] (Fig. 2e).

    It is the projection of option B, followed by BN where BN follows the last layer of F:
    "BN layers are right after the weight layers for all units here" (caption of Fig. 2).
    """

    projects = True


class Dropout(Shortcut):
    """dropout(x) + F(x) (Fig. 2f).

    Inverted: in training, kept values are divided by 1 - ratio, as in Caffe and PyTorch. Not
    inverted: at test time, x is scaled by 1 - ratio, the "scale with an expectation of 0.5".
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        carry: nn.Module,
        dropout_ratio: float = 0.5,
        dropout_inverted: bool = True,
    ) -> None:
        super().__init__(c_in, c_out, stride, carry)
        self.drop = nn.Dropout(dropout_ratio)
        self.scale = 1.0 if dropout_inverted else 1.0 - dropout_ratio

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.scale * self.drop(self.carry(x)) + residual


class StochasticDepth(Shortcut):
    """x + d F(x), where d is 1 or 0 for each batch: stochastic depth (not in the paper).

    F of unit l survives with probability p_l = 1 - (1 - p_L) l / L, where p_L is ``survival``; at
    test time d is p_l (Huang, Sun, Liu, Sedra, Weinberger 2016, Eqns. 2, 4 and 5).
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, carry: nn.Module, survival: float = 0.5
    ) -> None:
        super().__init__(c_in, c_out, stride, carry)
        self.survival = self.p = survival

    def place(self, unit: int, units: int) -> None:
        self.p = 1 - (1 - self.survival) * unit / units

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        d = torch.rand((), device=x.device) < self.p if self.training else self.p
        return self.carry(x) + d * residual


class ReZero(Shortcut):
    """x + a F(x), where a is learned and 0 at first: ReZero, SkipInit (not in the paper).

    Source: Bachlechner, Majumder, Mao, Cottrell, McAuley 2020, Eqn. 1; De and Smith 2020, who also
    leave BN out of F.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, carry: nn.Module) -> None:
        super().__init__(c_in, c_out, stride, carry)
        self.a = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.carry(x) + self.a * residual


SHORTCUTS: dict[str, type[Shortcut]] = {  # parsed by plans.shortcuts(): plain class names only
    "identity": Shortcut,
    "constant-scale": ConstantScale,
    "exclusive-gate": ExclusiveGate,
    "shortcut-only-gate": ShortcutOnlyGate,
    "conv1x1": Conv1x1,
    "dropout": Dropout,
    "stochastic-depth": StochasticDepth,
    "rezero": ReZero,
}


def shortcut_class(name: str) -> type[Shortcut]:
    """The class of a row, or the user's own, ``module:Class``.

    Raises:
        UserError: there is no such row, module or class, the class cannot be used, or only a file
            asks for it (``trust``).
    """
    if ":" not in name:
        if name not in SHORTCUTS:
            raise unknown("shortcut", name, SHORTCUTS)
        return SHORTCUTS[name]
    trust.refuse_strange(OwnName.of(name).place)  # on each call: the next command may not allow it
    return _own(name)


@cache
def _own(name: str) -> type[Shortcut]:
    """The class of ``module:Class``.

    Raises:
        UserError: there is no such module or class, or the class is no ``Shortcut``, has no such
            settings, or fails.
    """
    found = own.imported("shortcut", OwnName.of(name).place, Shortcut)
    refuse_broken(found, name)
    return found


def settings_in(name: str, given: Mapping[str, object]) -> dict[str, object]:
    """A shortcut's settings: those ``given``, and those in its name.

    Raises:
        UserError: it has no such setting.
    """
    known = settings_of(shortcut_class(name))
    check_settings(name, given, known)
    return {**_named(name, known), **given}


def _named(name: str, known: Mapping[str, object]) -> dict[str, object]:
    if ":" not in name:
        return {}
    return settled("shortcut", OwnName.of(name), known, "keyword arguments of its __init__")


def refuse_broken(cls: type[Shortcut], name: str) -> None:
    """Try a user's own class on small inputs, before it is used in a network.

    Raises:
        UserError: it fails, or its output does not have the shape of F(x).
    """
    made = "it is made with (c_in, c_out, stride, carry), called with (x, residual)"
    hint = "x and F(x) differ in shape where a stage begins: see self.carry"
    with own.tried("shortcut", name, cls, made) as gives:
        for c, stride, carry in ((64, 1, nn.Identity()), (128, 2, nn.Conv2d(64, 128, 1, 2))):
            x, residual = torch.randn(2, 64, 8, 8), torch.randn(2, c, 8 // stride, 8 // stride)
            shortcut = cls(64, c, stride, carry, **_named(name, settings_of(cls)))
            shortcut.place(1, 2)
            gives(shortcut(x, residual), residual, "F(x)", hint)
            own.refuse_rewritten("shortcut", name, x)


def settings_of(cls: type[Shortcut]) -> dict[str, object]:
    """A shortcut's settings and their defaults: the keyword arguments of its ``__init__``."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
