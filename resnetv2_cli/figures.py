"""The figures of whatever is found on disk: curves of ablations and runs, and analyses."""

from collections.abc import Iterator
from pathlib import Path

from resnetv2_cli.ablation.studies import slug
from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.inventory import Analysis, Found
from resnetv2_cli.plot import COLORS, panels

TOGETHER = len(COLORS)  # runs in one panel


def numbered(name: str, taken: set[str]) -> str:
    """The name, with a number appended if it is taken; it is added to ``taken``."""
    made, n = name, 1
    while made in taken:
        n += 1
        made = f"{name}-{n}"
    taken.add(made)
    return made


def curves(found: Found, to: Path, suffix: str, y: str) -> Iterator[Path]:
    """A picture of each ablation that has begun, and one of the runs that belong to none."""
    taken: set[str] = set()
    for ablation in found.ablations:
        name = numbered(ablation.study.name, taken)
        groups = {title: runs for title, runs in ablation.curves().items() if runs}
        if groups:
            file = to / f"{name}.{suffix}"
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


def of_analysis(
    analysis: Analysis, to: Path, suffix: str, name: str = "analysis"
) -> Iterator[tuple[str, Path]]:
    """A picture of each topic of an analysis, with the topic's name; ``name``: that of the files.

    Raises:
        UserError: it lacks what a picture needs, as one by another version may.
    """
    from resnetv2_cli.analysis.study import module  # imports torch: only if there is an analysis

    for topic, measured in analysis.found["topics"].items():
        if topic in TOPICS and measured:
            file = to / f"{name}-{topic}.{suffix}"
            try:
                module(topic).draw(measured, file)
            except (LookupError, TypeError, ValueError, AttributeError):
                raise analysis.strange from None
            yield topic, file


def every(found: Found, to: Path, suffix: str, y: str) -> Iterator[Path]:
    """All of these pictures."""
    yield from curves(found, to, suffix, y)
    taken: set[str] = set()
    for analysis in found.analyses:
        name = numbered(slug(analysis.name), taken)  # a/b and a-b give the same slug
        for _, file in of_analysis(analysis, to, suffix, name):
            yield file
