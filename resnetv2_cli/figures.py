"""The figures of whatever is found on disk: curves of ablations and runs, and analyses."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from resnetv2_cli.ablation.studies import slug
from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.inventory import Analysis, Found
from resnetv2_cli.plot import panels

TOGETHER = 12  # runs in one panel, as many as there are colours


def curves(found: Found, to: Path, suffix: str, y: str) -> Iterator[Path]:
    """A picture of each ablation that has begun, and one of the runs that belong to none."""
    taken: Counter[str] = Counter()
    for ablation in found.ablations:
        taken[ablation.study.name] += 1
        again = f"-{n}" if (n := taken[ablation.study.name]) > 1 else ""
        groups = {title: runs for title, runs in ablation.curves().items() if runs}
        if groups:
            file = to / f"{ablation.study.name}{again}.{suffix}"
            panels(groups, file, y)
            yield file
    begun = {run.name: run.folder.metrics for run in found.runs if run.series}
    if begun:
        names = list(begun)
        parts = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]
        groups = {
            f"runs {i + 1}" if len(parts) > 1 else "": {name: begun[name] for name in part}
            for i, part in enumerate(parts)
        }
        file = to / f"runs.{suffix}"
        panels(groups, file, y)
        yield file


def of_analysis(analysis: Analysis, to: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    """A picture of each topic of an analysis, with the topic's name."""
    from resnetv2_cli.analysis.study import module  # torch: only where there is an analysis

    for topic, measured in analysis.found["topics"].items():
        if topic in TOPICS and measured:
            file = to / f"{slug(analysis.name)}-{topic}.{suffix}"
            module(topic).draw(measured, file)
            yield topic, file


def every(found: Found, to: Path, suffix: str, y: str) -> Iterator[Path]:
    """All of them."""
    yield from curves(found, to, suffix, y)
    for analysis in found.analyses:
        for _, file in of_analysis(analysis, to, suffix):
            yield file
