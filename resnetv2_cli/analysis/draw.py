"""One picture a topic; several networks are laid over each other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from resnetv2_cli.plot import COLORS, save

Found = list[dict[str, Any]]


def depths(units: list[Any]) -> list[float]:
    """Where each unit stands between the first (0) and the last (1), for networks of any depth."""
    return [i / max(1, len(units) - 1) for i in range(len(units))]


def series(axes: Axes, color: str, units: list[dict], key: str, style: str, label: str) -> None:
    """A quantity along depth; a unit that has none leaves a gap."""
    values = [unit.get(key, float("nan")) for unit in units]
    axes.plot(depths(units), values, style, color=color, lw=1.4, label=label)


def forward(figure: plt.Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for color, one in zip(COLORS, found, strict=False):
        units = one["forward"]["units"]
        series(left, color, units, "x", "-", f"$x_l$, {one['network']}")
        series(left, color, units, "residual", ":", "$F(x_l)$")
        series(right, color, units, "truncated", "-", one["network"])
    left.set(title="Signal", ylabel="root mean square", yscale="log")
    right.set(title="$y_l < 0$: what a ReLU behind the addition cuts", ylabel="share", ylim=(0, 1))


def shortcuts(figure: plt.Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for color, one in zip(COLORS, found, strict=False):
        units = one["shortcuts"]["units"]
        product, products = 1.0, []
        for unit in units:
            product *= unit["gain"]
            products.append({"product": product or float("nan")})
        series(left, color, units, "gain", "-", one["network"])
        series(right, color, products, "product", "-", one["network"])
    left.set(title="Gain of the shortcut, $|h(x_l)| / |x_l|$", ylabel="gain", ylim=(0, None))
    right.set(title="Product of the gains up to here (Eq. 8)", ylabel="product", yscale="log")


def backward(figure: plt.Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for color, one in zip(COLORS, found, strict=False):
        units = one["backward"]["units"]
        series(left, color, units, "gradient", "-", one["network"])
        series(right, color, units, "direct", "-", f"direct, {one['network']}")
        series(right, color, units, "weights", ":", "through the weights")
    left.set(title="Gradient, $|\\partial E / \\partial x_l|$", ylabel="norm", yscale="log")
    right.set(title="Its two terms, from the end of the stage (Eq. 5)", yscale="log")


def paths(figure: plt.Figure, found: Found) -> None:
    axes = figure.subplots()
    for color, one in zip(COLORS, found, strict=False):
        lengths = one["paths"]["lengths"]
        x, y = [p["length"] for p in lengths], [p["share"] for p in lengths]
        axes.plot(x, y, "o-", color=color, label=one["network"])
    axes.set(
        title="Gradient at $x_1$ by length of path (Veit et al. 2016)",
        xlabel="residual branches on the path",
        ylabel="share",
        ylim=(0, None),
    )


def lesion(figure: plt.Figure, found: Found) -> None:
    left, right = figure.subplots(1, 2)
    for color, one in zip(COLORS, found, strict=False):
        made = one["lesion"]
        series(left, color, made["deleted"], "error", "o-", one["network"])
        left.axhline(made["intact"], color=color, ls="--", lw=1)
        series(right, color, made["swapped"], "error", "o-", one["network"])
        right.axhline(made["intact"], color=color, ls="--", lw=1)
    left.set(title="One unit deleted (dashed: intact)", ylabel="test error, %", ylim=(0, 100))
    right.set(title="A unit swapped with the next", ylabel="test error, %", ylim=(0, 100))


PICTURES: dict[str, Callable[[plt.Figure, Found], None]] = {
    "forward": forward,
    "shortcuts": shortcuts,
    "backward": backward,
    "paths": paths,
    "lesion": lesion,
}


def draw(topic: str, found: Found, to: Path) -> None:
    """The picture of a topic, of all networks."""
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    PICTURES[topic](figure, found)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if not axes.get_xlabel():
            axes.set_xlabel("depth: first unit (0) to last (1)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    save(figure, to)
