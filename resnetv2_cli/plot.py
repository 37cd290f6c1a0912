"""Pictures, in the style of the paper's figures."""

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from resnetv2_cli.errors import UserError
from resnetv2_cli.files import replacing
from resnetv2_cli.runfolder import read_metrics
from resnetv2_cli.scales import YS

COLORS = """
    #20262e #2b6cb0 #c2410c #2f855a #b7791f #97266d #0e7490 #7c5cd6 #9b2c2c #5f6b3a #d0619a #4a7fa5
""".split()  # Table 1 has eleven rows; the first is what the others are compared with
ERRORS = {"test_error": "test error", "val_error": "validation error"}  # columns of metrics files
FEW = 4  # curves that can be named inside a panel; the names of more go below it
LINE = 0.1  # inches of height for each name below: two share a line
ABOVE = 1.5  # times the median of the largest losses: a curve that explodes leaves the frame


def as_is(name: str) -> str:
    """Escape dollars for a figure, where they begin formulas; invalid text becomes ``?``."""
    return name.replace("$", r"\$").encode(errors="replace").decode()


def short(text: str, most: int = 22) -> str:
    """A text, cut in the middle if it is long."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def curves(runs: Mapping[str, Path], to: Path) -> None:
    """One panel: training loss (dashed) and error (solid) of each run's metrics file."""
    panels({"": runs}, to)


def panels(groups: Mapping[str, Mapping[str, Path]], to: Path, y: str = "paper") -> None:
    """A panel for each group of runs, in the style of Figs. 1, 3 and 6.

    Training loss (dashed, left axis) and those ERRORS that exist (solid, right) against iterations;
    ``groups``: title: {name of the run: its metrics file}; ``y``: one of YS.
    """
    across = min(2, len(groups))
    down = -(-len(groups) // across)
    most = max(map(len, groups.values()))
    size = (7 * across, (4.5 + (LINE * most if most > FEW else 0)) * down)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, (title, runs) in zip(grid.flat, groups.items(), strict=False):
        axes.set_title(as_is(title), fontsize=10)
        panel(axes, runs, y)
    save(figure, to)


def panel(left: Axes, runs: Mapping[str, Path], y: str) -> None:
    """Draw the curves of some runs, each in its own color."""
    loss_scale, error_scale = YS[y]
    right = left.twinx()
    losses, percents, lines, shown = [], [], {}, []
    for i, (name, path) in enumerate(runs.items()):
        series, color = read_metrics(path), COLORS[i % len(COLORS)]
        if "train_loss" in series:
            losses.append([loss for _, loss in series["train_loss"]])
            mark = "x" if len(series["train_loss"]) == 1 else None
            left.plot(
                *zip(*series["train_loss"], strict=True), "--", color=color, lw=1, marker=mark
            )
        for column, what in ERRORS.items():
            if error := series.get(column):
                percents.append([percent for _, percent in error])
                shown.append(what)
                mark = "o" if len(error) == 1 else None
                label = f"{as_is(name)}: {error[-1][1]:.2f} % {what}"
                [lines[label]] = right.plot(
                    *zip(*error, strict=True), color=color, lw=1.6, marker=mark
                )
    left.set(xlabel="iterations", ylabel="training loss (dashed)")
    left.set_yscale(fitting(loss_scale, losses))
    left.set_xlim(left=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    right.set(ylabel=f"{named(shown)}, % (solid)", yscale=fitting(error_scale, percents))
    label_numbers(left.yaxis)
    label_numbers(right.yaxis)
    largest = [most for one in losses if (most := max(one)) > 0]  # all 0: not counted
    if largest and max(largest) > (top := ABOVE * median(largest)):
        left.set_ylim(0.9 * min(loss for one in losses for loss in one if loss > 0), top)
    if right.get_yscale() == "linear":
        right.set_ylim(bottom=0)
    right.grid(axis="y", alpha=0.3)
    if lines:  # passed explicitly, since a label that begins with _ would be left out
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 2}
        place = below if len(lines) > FEW else {"loc": "best"}
        right.legend(lines.values(), lines.keys(), fontsize=8, **place)


def fitting(scale: str, curves: list[list[float]]) -> str:
    """The scale of an axis: as asked for, but linear if nothing has a logarithm."""
    return "linear" if curves and not any(y > 0 for curve in curves for y in curve) else scale


def named(errors: Iterable[str]) -> str:
    """The label of an axis with these errors, each named once."""
    return " and ".join(dict.fromkeys(errors)) or "error"


def label_numbers(axis: Axis) -> None:
    """Plain numbers; on a logarithmic axis only 1, 2, 5, 10, ..., which do not overlap."""
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def confusion(counts: list[list[int]], classes: tuple[str, ...], to: Path) -> None:
    """The confusion matrix: a row for each label, in percent of its images; blank without any."""
    shares = [[100 * n / (sum(row) or math.nan) for n in row] for row in counts]
    size = max(4.0, min(14.0, 0.5 * len(classes) + 2))
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 20:
        places, names = range(len(classes)), [as_is(short(name, 18)) for name in classes]
        axes.set_xticks(places, names, rotation=60, ha="right")
        axes.set_yticks(places, names)
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                said = "" if math.isnan(share) else f"{share:.0f}"
                ink = "white" if share > 50 else "black"
                axes.text(j, i, said, ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlabel="guess", ylabel="label")
    axes.set_title("% of each label's images", fontsize=10)
    save(figure, to)


def save(figure: plt.Figure, to: Path) -> None:
    """Write a picture in the format of its suffix. The same figure gives the same PNG, SVG or PDF
    every time.

    Raises:
        UserError: its suffix is not that of a picture.
        OSError: it cannot be written; an existing file is kept.
    """
    refuse_suffix(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(to.suffix)
    salt: Any = {"svg.hashsalt": "blueprint"}  # any salt: without, IDs in an SVG differ each time
    with replacing(to) as file, warnings.catch_warnings(), matplotlib.rc_context(salt):
        warnings.filterwarnings("ignore", "Glyph")  # a missing glyph is drawn as a box
        figure.savefig(file, format=to.suffix[1:] or "png", dpi=130, metadata=undated)
    plt.close(figure)


def refuse_suffix(to: Path) -> None:
    """Refuse a path that no picture can have.

    Raises:
        UserError: a file's suffix is not that of a picture, or it is a folder.
    """
    if to.is_dir():
        raise UserError(f"{to} is a folder", "name a file, such as picture.png")
    known = {*FigureCanvasAgg.get_supported_filetypes()} - {"pgf"}  # which needs a TeX
    if to.suffix and to.suffix[1:] not in known:
        hint = f"its name ends in one of {', '.join(f'.{name}' for name in sorted(known))}"
        raise UserError(f"{to} does not have the suffix of a picture", hint)
