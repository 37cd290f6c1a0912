"""The chart of a benchmark: one bar per arm."""

from collections.abc import Mapping
from pathlib import Path

from resnetv2_cli.plot import plt, save


def bars(title: str, values: Mapping[str, float], unit: str, to: Path) -> None:
    """Draw a horizontal bar for each value, labeled with its number, in the order given."""
    size = (7, 0.42 * len(values) + 1.2)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    names = list(values)
    drawn = axes.barh(names, [values[n] for n in names], color="C0", height=0.7)
    drawn[0].set_color("grey")  # the baseline
    axes.bar_label(drawn, [f" {values[n]:,.0f}" for n in names], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(unit, fontsize=8)
    save(figure, to)
