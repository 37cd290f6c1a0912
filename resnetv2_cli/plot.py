"""Pictures, in the style of the paper's figures."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from resnetv2_cli.runfolder import read_metrics


def curves(runs: Mapping[str, Path], to: Path) -> None:
    """Training loss (dashed, left axis) and test error (solid, right) against iterations, for
    each run's metrics file, as in Figs. 1, 3 and 6."""
    figure, left = plt.subplots(figsize=(7, 4.5), layout="constrained")
    right = left.twinx()
    for i, (name, path) in enumerate(runs.items()):
        series, color = read_metrics(path), f"C{i}"
        if "train_loss" in series:
            left.plot(*zip(*series["train_loss"], strict=True), "--", color=color, lw=1)
        for split in ("test", "val"):
            if error := series.get(f"{split}_error"):
                mark = "o" if len(error) == 1 else None
                label = f"{name}: {error[-1][1]:.2f} % {split} error"
                right.plot(*zip(*error, strict=True), color=color, lw=1.6, marker=mark, label=label)
    left.set(xlabel="iterations", ylabel="training loss (dashed)", yscale="log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    for ticks in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda y, _: f"{y:g}"))
    right.set(ylabel="test error, % (solid)")
    right.set_ylim(bottom=0)
    right.grid(axis="y", alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="upper right", fontsize=8)
    save(figure, to)


def confusion(counts: list[list[int]], classes: tuple[str, ...], to: Path) -> None:
    """The confusion matrix: a row for each label, in percent of its images."""
    shares = [[100 * n / max(1, sum(row)) for n in row] for row in counts]
    size = max(4.0, min(14.0, 0.5 * len(classes) + 2))
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                ink = "white" if share > 50 else "black"
                axes.text(j, i, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set(xlabel="guess", ylabel="label", title="% of each label's images")
    save(figure, to)


def save(figure: plt.Figure, to: Path) -> None:
    """Write a picture; the format is the suffix's."""
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=130)
    plt.close(figure)
