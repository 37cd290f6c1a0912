"""What a Residual Unit is made of, read off its modules: the parts of Eqns. 1 and 2 in words."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from resnetv2_cli.layers import SEQUENCES, ZeroPad
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.units import ResidualUnit

# Where the formula ends, in the first line of a shortcut's docstring.
BEHIND = re.compile(r"[:,]| \((?:Fig|Eqn)|\.$|\.\s")
# What is not a factor of the F(x) after it: a difference outside brackets, or a divisor.
NO_FACTOR = re.compile(r" - (?![^(]*\))|[-/]$")


@dataclass(frozen=True)
class Anatomy:
    """The layers of one unit, in the order in which x passes them.

    ``shared``: before x splits into two paths. ``residual``: F. ``shortcut``: what x passes on its
    way to the addition. ``scale``: what F is multiplied by, if anything. ``after``: f.
    ``formula``: y_l, as the shortcut's docstring writes it.
    """

    shared: tuple[str, ...]
    residual: tuple[str, ...]
    shortcut: tuple[str, ...]
    scale: str
    after: tuple[str, ...]
    formula: str

    @property
    def equations(self) -> list[str]:
        """Eqns. 1 and 2 with the unit's own parts for h, F and f."""
        x = f"{' -> '.join(self.shared)} of x_l" if self.shared else "x_l"
        return [
            f"y_l = {self.formula}, x = {x}",
            f"F: {' -> '.join(self.residual)}",
            f"h: {' -> '.join(self.shortcut) or 'the identity'}",
            f"x_l+1 = f(y_l), f: {' -> '.join(self.after) or 'the identity'}",
        ]


def anatomy(unit: ResidualUnit) -> Anatomy:
    """The parts of a unit.

    A shortcut whose docstring has no formula with F(x) in it is shown by the name of its class. So
    is h if the formula is not the sum of h and a multiple of F(x): (x + F(x)) / 2 is not.
    """
    cls: Any = type(unit.shortcut)
    first = (cls.__doc__ or "").strip().partition("\n")[0]
    formula = BEHIND.split(first)[0].strip()
    terms = re.split(r" \+ (?![^(]*\))", formula)
    written = len(terms) == 2 and "F(x)" in terms[1]
    carried = tuple(layers(unit.shortcut.carry))  # type: ignore[arg-type]
    scale = terms[-1].removesuffix("F(x)").rstrip(" *·")
    multiple = terms[-1].endswith("F(x)") and not NO_FACTOR.search(scale)
    if written and multiple and all(term.count("(") == term.count(")") for term in terms):
        h = () if terms[0] == "x" or cls.projects else (terms[0],)
    else:
        formula = formula if written else f"{cls.__name__}(x, F(x))"
        h, scale = (cls.__name__,), ""
    return Anatomy(
        shared=tuple(layers(unit.shared)),
        residual=tuple(layers(unit.residual)),
        shortcut=carried + h,
        scale=scale,
        after=tuple(layers(unit.after)),
        formula=formula,
    )


def layers(module: nn.Module) -> Iterator[str]:
    """The layers of a module that a signal passes, by the paper's names: weight, BN, ReLU; others
    by the name of their class."""
    if isinstance(module, nn.Conv2d):
        kernel, strided = "x".join(map(str, module.kernel_size)), f", /{module.stride[0]}"
        yield f"weight {kernel}, {module.out_channels}{strided if module.stride != (1, 1) else ''}"
    elif isinstance(module, nn.BatchNorm2d):
        yield "BN"
    elif isinstance(module, nn.ReLU):
        yield "ReLU"
    elif isinstance(module, ZeroPad):
        yield f"zero-pad +{module.extra}, /{module.stride}"
    elif type(module) in SEQUENCES:
        for child in module.children():
            yield from layers(child)
    elif not isinstance(module, nn.Identity):
        yield type(module).__name__


@dataclass(frozen=True)
class Alike:
    """Units of a network that are built alike: ``first`` to ``last`` of ``stage``."""

    stage: int
    first: int
    last: int
    anatomy: Anatomy

    @property
    def name(self) -> str:
        several = f"units {self.first} to {self.last}"
        one = f"unit {self.first}"
        return f"stage {self.stage}, {several if self.last > self.first else one}"

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        equations = {"equations": self.anatomy.equations}
        return {"units": self.name, **asdict(self.anatomy), **equations}


def kinds(net: ResNet) -> list[Alike]:
    """The units of a network; consecutive ones that are built alike are grouped."""
    found: list[Alike] = []
    for number, stage in enumerate(net.body, 1):
        for place, unit in enumerate(stage.children(), 1):
            made = anatomy(unit)  # type: ignore[arg-type]
            if found and found[-1].stage == number and found[-1].anatomy == made:
                found[-1] = Alike(number, found[-1].first, place, made)
            else:
                found.append(Alike(number, place, place, made))
    return found
