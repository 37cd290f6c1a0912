"""Pictures of Residual Units, in the style of the paper's Figs. 2 and 4."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from resnetv2_cli.anatomy import Anatomy
from resnetv2_cli.plot import plt, save

INK, PATH, WEIGHT, OTHER = "#20262e", "#9aa3ad", "#fde7c7", "#e4ecf5"
WIDE, HIGH, GAP = 1.9, 0.5, 0.28  # size of a box, and the gap between two
SHORTCUT, RESIDUAL = 0.0, 2.4  # x of the two paths
LEFT, RIGHT, TOP = -1.1, 3.5, 0.75  # edges of a drawing, which begins at 0
INCH = 0.5  # inches for one of the units above
ACROSS = 6  # Residual Units side by side


def blueprint(units: Mapping[str, Anatomy], to: Path) -> None:
    """Draw units side by side, each with the shortcut on the left, in gray, and F on the right."""
    across = min(ACROSS, len(units))
    rows = [list(units.items())[i : i + across] for i in range(0, len(units), across)]
    tall = [TOP + max(height(a) for _, a in row) for row in rows]
    size = (INCH * (RIGHT - LEFT) * across, INCH * sum(tall) + 0.5 * len(rows))
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text in an SVG
        figure, grid = plt.subplots(
            len(rows), across, figsize=size, layout="constrained", squeeze=False, height_ratios=tall
        )
        for row, places, high in zip(rows, grid, tall, strict=True):
            for axes in places:
                axes.set_axis_off()
            for axes, (title, anatomy) in zip(places, row, strict=False):
                axes.set_title(title, fontsize=9, color=INK)
                axes.set(xlim=(LEFT, RIGHT), ylim=(TOP - high, TOP), aspect="equal")
                draw(axes, anatomy)
        save(figure, to)


def height(a: Anatomy) -> float:
    """The height of a unit's drawing."""
    beside = max(len(a.residual) + bool(a.scale), len(a.shortcut))
    return (len(a.shared) + beside + len(a.after)) * (HIGH + GAP) + 2.0


def draw(axes: Axes, a: Anatomy) -> None:
    """Draw one unit, from x_l at the top to x_{l+1}."""
    axes.text(SHORTCUT, 0.2, "$x_l$", ha="center", va="bottom", fontsize=10, color=INK)
    y = column(axes, SHORTCUT, 0.15, a.shared)
    line(axes, [(SHORTCUT, y), (SHORTCUT, y - GAP)])
    split = y - GAP
    on_f = (*a.residual, *((f"× {a.scale}",) if a.scale else ()))
    line(axes, [(SHORTCUT, split), (RESIDUAL, split)])
    ends = column(axes, RESIDUAL, split, on_f) - GAP
    meets = column(axes, SHORTCUT, split, a.shortcut, PATH)
    add = min(ends, meets - GAP) - 0.3
    arrow(axes, (SHORTCUT, meets), (SHORTCUT, add + 0.2), PATH, 3.0)
    line(axes, [(RESIDUAL, ends + GAP), (RESIDUAL, add)])
    arrow(axes, (RESIDUAL, add), (SHORTCUT + 0.2, add), INK, 1.1)
    axes.add_patch(Circle((SHORTCUT, add), 0.2, fc="white", ec=INK, lw=1.1, zorder=3))
    axes.text(SHORTCUT, add - 0.01, "+", ha="center", va="center", fontsize=9, zorder=4)
    below = column(axes, SHORTCUT, add - 0.2, a.after)
    arrow(axes, (SHORTCUT, below), (SHORTCUT, below - 0.45), INK, 1.1)
    axes.text(SHORTCUT, below - 0.5, "$x_{l+1}$", ha="center", va="top", fontsize=10, color=INK)


def column(axes: Axes, x: float, top: float, boxes: tuple[str, ...], color: str = INK) -> float:
    """Draw a column of boxes, each with an arrow to it; return where the last one ends."""
    y, wide = top, 3.0 if color == PATH else 1.1
    for text in boxes:
        arrow(axes, (x, y), (x, y - GAP), color, wide)
        y -= GAP
        fill = WEIGHT if text.startswith("weight") else OTHER
        corner = (x - WIDE / 2, y - HIGH)
        style = "round,pad=0,rounding_size=0.1"
        axes.add_patch(FancyBboxPatch(corner, WIDE, HIGH, style, fc=fill, ec=INK, lw=0.8, zorder=2))
        small = 7.5 if len(text) < 15 else 6
        box = axes.text(x, y - HIGH / 2, text, ha="center", va="center", fontsize=small, zorder=3)
        box.set_parse_math(False)  # a formula of the user's own may have any characters
        y -= HIGH
    return y


def line(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Draw a line through points."""
    axes.plot(*zip(*points, strict=True), color=INK, lw=1.1, zorder=1, solid_capstyle="butt")


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, wide: float
) -> None:
    """Draw an arrow."""
    how = {"arrowstyle": "-|>", "color": color, "lw": wide, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=how | {"mutation_scale": 8}, zorder=1)
