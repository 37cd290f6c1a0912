"""What the pictures of all topics share: panels over depth, with several networks overlaid.

Color shows the network, line style the quantity, as in the paper's figures.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from resnetv2_cli.plot import COLORS, as_is, plt, save
from resnetv2_cli.quantities import NONE

Measured = Mapping[str, dict[str, Any]]  # by network label
Value = float | None
ROUND = 1e-17  # below the rounding of float64 at 1


class Panels:
    """Panels one above the other, for the networks of ``measured``.

    The x-axis is l = 1 ... L if all of them have the same number of units in every stage, otherwise
    the share of the depth. Dotted lines show where the first network's feature-map size changes.
    """

    def __init__(self, measured: Measured, *titles: str, over_depth: bool = True) -> None:
        self.colors = dict(zip(measured, cycle(COLORS), strict=False))
        self.figure, axes = plt.subplots(
            len(titles),
            1,
            figsize=(7, 2.3 * len(titles) + 0.8),
            layout="constrained",
            sharex=over_depth,
            squeeze=False,
        )
        self.panels = [row[0] for row in axes]
        for panel, title in zip(self.panels, titles, strict=True):
            panel.set_title(title, loc="left", fontsize=9)
            panel.grid(axis="y", alpha=0.3)
            panel.tick_params(which="both", labelsize=8)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if over_depth:
            self._depth(measured)

    def _depth(self, measured: Measured) -> None:
        stages = [m["stage"] for m in measured.values()]
        self.relative = any(other != stages[0] for other in stages)
        unit = 100 / len(stages[0]) if self.relative else 1
        changes = [i + 0.5 for i in range(1, len(stages[0])) if stages[0][i] != stages[0][i - 1]]
        for panel in self.panels:
            for change in changes:
                panel.axvline(change * unit, color="grey", lw=0.8, ls=":")
        self.below("depth, % of the units" if self.relative else "unit l")

    def over_depth(self, panel: int, label: str, ys: Sequence[Value], dash: str = "-") -> None:
        """Draw a value for every unit, with gaps where there is none."""
        n = len(ys)
        xs = [(i + 1) * (100 / n if self.relative else 1) for i in range(n)]
        self.line(panel, label, xs, ys, dash)

    def line(
        self, panel: int, label: str, xs: Sequence[float], ys: Sequence[Value], dash: str = "-"
    ) -> None:
        """Draw a line in the color of its network, with gaps where there is no number."""
        shown = [y if y is not None and math.isfinite(y) else math.nan for y in ys]
        self.panels[panel].plot(xs, shown, dash, color=self.colors[label], lw=1.4, ms=3)

    def off(self, panel: int, label: str, ys: Sequence[Value]) -> None:
        """Draw the relative error of an equation, at least ROUND, so that 0 shows too."""
        self.over_depth(panel, label, [y if y is None else max(y, ROUND) for y in ys])
        self.panels[panel].set_yscale("log")
        self.panels[panel].set_ylim(ROUND / 10, 100)

    def below(self, text: str) -> None:
        """Label the x-axis of the last panel."""
        self.panels[-1].set_xlabel(text, fontsize=9)

    def log(self, *panels: int) -> None:
        """Make panels logarithmic: zeros leave gaps, and a panel of only zeros stays linear."""
        for panel in (self.panels[i] for i in panels):
            if math.isfinite(panel.dataLim.minposy):
                panel.set_yscale("log", nonpositive="mask")

    def save(self, to: Path) -> None:
        """Write the picture, with the networks named at the top."""
        handles = [plt.Line2D([], [], color=c, lw=2) for c in self.colors.values()]
        self.figure.legend(
            handles,
            [*map(as_is, self.colors)],
            loc="outside upper left",
            ncols=1 + (len(self.colors) > 4),
            fontsize=8,
            frameon=False,
        )
        save(self.figure, to)


def named(measured: Measured, label: str, part: object = "") -> str:
    """The first cell of a line; with one network, the name is in the table's title instead."""
    return ": ".join(filter(None, [label if len(measured) > 1 else "", str(part)]))


def of(measured: Measured) -> str:
    """The end of a title: the network, where there is only one."""
    return f"\n{next(iter(measured))}" if len(measured) == 1 else ""


def by_stage(measured: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Every stage with the indices of its units."""
    stages = measured["stage"]
    return [(s, [i for i, own in enumerate(stages) if own == s]) for s in sorted(set(stages))]


def ends(values: Sequence[Value]) -> str:
    """``1.2 - 8.5``: a value at the first and at the last unit."""
    return f"{short(values[0], 2)} - {short(values[-1], 2)}"


def short(value: Value, digits: int = 3) -> str:
    """A few digits, one if the value is tiny, or a dash if there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    # From 99.5 on two digits would be 1e+02.
    return f"{value:.0f}" if 99.5 <= abs(value) < 1e6 else f"{value:.{digits}g}"
