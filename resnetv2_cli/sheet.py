"""A contact sheet: small pictures, each with the class that a network predicts."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from resnetv2_cli.inference import Prediction
from resnetv2_cli.plot import as_is, save, short

MOST = 60  # pictures on one sheet


def sheet(predictions: Sequence[Prediction], to: Path) -> None:
    """Draw each picture as the network saw it, its file name above, its most likely class below.

    A file that cannot be read has its place too.
    """
    across = min(10, math.ceil(math.sqrt(len(predictions))))
    down = math.ceil(len(predictions) / across)
    size = (1.5 * across, 1.85 * down)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, prediction in zip(grid.flat, predictions, strict=False):
        axes.set_title(as_is(short(Path(prediction.name).name)), fontsize=6, color="gray")
        axes.imshow(prediction.pixels.numpy(), interpolation="nearest")
        if prediction.error:
            said, color = "not classified", "tab:red"
        else:
            (name, share), color = prediction.top[0], "black"
            said = f"{as_is(short(name, 18))} {100 * share:.0f} %"
        where = {"x": 0.5, "y": -0.05, "ha": "center", "va": "top"}
        axes.text(s=said, color=color, fontsize=7, transform=axes.transAxes, **where)
    save(figure, to)
