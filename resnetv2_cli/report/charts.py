"""The data of a page's charts: curves of ablations and runs, thinned to what a screen shows."""

from collections.abc import Iterable
from typing import Any

from resnetv2_cli.ablation.arms import Ablation
from resnetv2_cli.figures import TOGETHER
from resnetv2_cli.inventory import Found, Run
from resnetv2_cli.plot import COLORS, ERRORS, named
from resnetv2_cli.runfolder import read_metrics

MOST_POINTS = 300  # of one curve; fewer if there are very many curves
ALL_POINTS = 60_000  # of a whole page: about half of the 2 MB that it may have

Series = dict[str, list[tuple[int, float]]]


def charts(ablation: Ablation) -> list[dict[str, Any]]:
    """A chart for each panel of an ablation, with all seeds; a curve has the color of its row."""
    panels = ablation.study.table.panels or {"": tuple(line.row.name for line in ablation.lines)}
    color = {line.row.name: i % len(COLORS) for i, line in enumerate(ablation.lines)}
    made = []
    for title, names in panels.items():
        lines = [line for line in ablation.trainings if line.row.name in names]
        curves = [
            curve
            for line in lines
            for arm in line.arms
            for curve in of(
                read_metrics(arm.run.metrics),
                line.row.name,
                color[line.row.name],
                f"seed {arm.experiment.seed}" if len(line.arms) > 1 else "",
            )
        ]
        if curves:
            made.append(chart(f"{ablation.study.name} {title}".strip(), title, curves))
    return made


def of_runs(runs: list[Run]) -> list[dict[str, Any]]:
    """Charts of runs that belong to no ablation, with as many runs in each as there are colors."""
    begun = [run for run in runs if run.series]
    made = []
    for first in range(0, len(begun), TOGETHER):
        part = begun[first : first + TOGETHER]
        curves = [c for i, run in enumerate(part) for c in of(run.series, run.name, i)]
        made.append(chart(f"runs {first}", "", curves))
    return made


def chart(key: str, title: str, curves: list[dict[str, Any]]) -> dict[str, Any]:
    """One chart; ``names``: its rows in order, each with its color; ``error``: the kinds of error
    that it shows."""
    names = {c["name"]: c["color"] for c in curves}
    return {
        "key": key,
        "title": title,
        "names": [{"name": name, "color": color} for name, color in names.items()],
        "error": named(c["what"] for c in curves if c["kind"] == "error"),
        "curves": curves,
    }


def of(series: Series, name: str, color: int, seed: str = "") -> Iterable[dict[str, Any]]:
    """The curves of one run: training loss, in nats, and test or validation error, in percent."""
    for column, what in {"train_loss": "training loss", **ERRORS}.items():
        if points := series.get(column):
            yield {
                "name": name,
                "color": color,
                "seed": seed,
                "kind": "error" if column in ERRORS else "loss",
                "what": what,
                "steps": [step for step, _ in points],
                "values": [float(f"{value:.5g}") for _, value in points],
            }


def thin(made: list[dict[str, Any]]) -> None:
    """Thin out the points of curves if a page would have too many; the last ones stay."""
    curves = [curve for one in made for curve in one["curves"]]
    most = min(MOST_POINTS, max(2, ALL_POINTS // max(1, len(curves))))
    for curve in curves:
        for key in ("steps", "values"):
            points = curve[key]
            every = -(-len(points) // most)
            curve[key] = points[::-1][::every][::-1]


def everything(found: Found) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Charts of each ablation, and of the other runs, thinned together."""
    ablations = [charts(ablation) for ablation in found.ablations]
    runs = of_runs(found.runs)
    thin([one for some in [*ablations, runs] for one in some])
    return ablations, runs
