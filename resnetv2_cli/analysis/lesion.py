"""Which units matter: test error when units are deleted (F = 0) or change places.

BN uses its running statistics here, as in every evaluation. Source: Veit, Wilber and Belongie 2016,
for this kind of network; not from this paper.
"""

from copy import deepcopy
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnetv2_cli.analysis.draw import Measured, Panels, by_stage, named, of
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.topics import Table
from resnetv2_cli.analysis.trace import Trace
from resnetv2_cli.quantities import NONE
from resnetv2_cli.resnet import ResNet

CHUNK = 50  # images in one pass; the input of each unit is kept for them


class Deleted(nn.Module):
    """A unit with F = 0: x_{l+1} = f(h(x_l)).

    Shape: as the unit.
    """

    def __init__(self, unit: Any) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit.shared(x)
        none = torch.zeros_like(self.unit.shortcut.carry(x))
        return self.unit.after(self.unit.shortcut(x, none))


class Lesion(NamedTuple):
    """The units of a changed network, from the first changed one, ``start``, on."""

    start: int
    units: list[nn.Module]


def deleted(units: list[nn.Module], *places: int) -> Lesion:
    """Units with F = 0 in some places, counted from 0."""
    changed = [Deleted(u) if i in places else u for i, u in enumerate(units)]
    return Lesion(min(places), changed[min(places) :])


def swapped(units: list[nn.Module], i: int, j: int) -> Lesion:
    """Two units swapped."""
    changed = list(units)
    changed[i], changed[j] = units[j], units[i]
    return Lesion(min(i, j), changed[min(i, j) :])


@torch.no_grad()
def errors(net: ResNet, x: Tensor, labels: Tensor, lesions: list[Lesion]) -> list[float]:
    """The error of each lesion, percent. Units below its first changed one are not computed again.

    Shape: x (N, 3, H, W), labels (N,).
    """
    wrong = [0] * len(lesions)
    for images, names in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        entering = [net.stem(images)]
        for unit in net.units:
            entering.append(unit(entering[-1]))
        for i, lesion in enumerate(lesions):
            features = entering[lesion.start]
            for unit in lesion.units:
                features = unit(features)
            wrong[i] += int((net.head(features).argmax(1) != names).sum())
    return [100 * n / len(labels) for n in wrong]


def some_pairs(n: int, limit: int) -> list[tuple[int, int]]:
    """All pairs of n units, or ``limit`` of them, drawn uniformly; the same ones every time."""
    pairs = list(combinations(range(n), 2))
    if len(pairs) <= limit:
        return pairs
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:limit]
    return [pairs[i] for i in sorted(drawn.tolist())]


def measure(subject: Subject, trace: Trace) -> dict[str, Any]:
    """Test errors, percent: ``whole``; ``single``, without each unit; ``pairs``, [i, j, error]
    without both, of ``possible`` pairs; ``swaps``, [i, i + 1, error] with neighbors of the same
    shape swapped. Units count from 1."""
    net = deepcopy(subject.net).float().eval()
    units = net.units
    pairs = some_pairs(len(units), subject.batch.pairs)
    keeping = [u.keeps_shape for u in trace.units]
    swaps = [
        (i, i + 1)
        for i in range(len(units) - 1)
        if keeping[i] and keeping[i + 1] and trace.units[i].stage == trace.units[i + 1].stage
    ]
    lesions = [
        Lesion(0, units),
        *(deleted(units, i) for i in range(len(units))),
        *(deleted(units, *pair) for pair in pairs),
        *(swapped(units, *swap) for swap in swaps),
    ]
    found = errors(net, subject.test_x, subject.test_labels, lesions)
    single, rest = found[1 : len(units) + 1], found[len(units) + 1 :]

    def listed(places: list[tuple[int, int]], values: list[float]) -> list[list[float]]:
        return [[i + 1, j + 1, e] for (i, j), e in zip(places, values, strict=True)]

    return {
        "stage": [u.stage for u in trace.units],
        "images": len(subject.test_labels),
        "whole": found[0],
        "single": single,
        "pairs": listed(pairs, rest[: len(pairs)]),
        "possible": len(units) * (len(units) - 1) // 2,
        "swaps": listed(swaps, rest[len(pairs) :]),
    }


def worst(found: list[list[float]]) -> str:
    """``median, maximum (units)`` of lists of unit numbers that end in an error."""
    if not found:
        return NONE
    *places, most = max(found, key=lambda row: row[-1])
    return f"{median(row[-1] for row in found):.1f}, {most:.1f} ({'-'.join(map(str, places))})"


def table(measured: Measured) -> Table:
    """A line for each stage of each network; pairs and swaps by the stage of their first unit."""
    columns = ["stage", "whole", "without one", "without two", "two swapped"]
    rows, notes = [], []
    for label, m in measured.items():
        for stage, places in by_stage(m):
            single = [[i + 1, m["single"][i]] for i in places]
            inside = [[f for f in m[k] if f[0] - 1 in places] for k in ("pairs", "swaps")]
            rows.append(
                [
                    named(measured, label, stage),
                    f"{m['whole']:.1f}",
                    *map(worst, [single, *inside]),
                ]
            )
        if len(m["pairs"]) < m["possible"]:
            notes.append(f"{label}: {len(m['pairs'])} of {m['possible']:,} pairs, drawn at random")
    counts = sorted({m["images"] for m in measured.values()})
    images = " and ".join(f"{n:,}" for n in counts)
    title = f"Test error, % of {images} images, if F = 0: median, max (units){of(measured)}"
    return Table(title, columns, rows, tuple(notes))


def draw(measured: Measured, to: Path) -> None:
    """Errors over depth; a pair's is drawn at the first of its units."""
    titles = [
        "test error without unit l, % (dashed: the whole network)",
        "test error without l and a later unit, %",
    ]
    with_swaps = {label: m for label, m in measured.items() if m["swaps"]}
    if with_swaps:
        titles.append("test error with l and l+1 swapped, %")
    panels = Panels(measured, *titles)
    for label, m in measured.items():
        n = len(m["stage"])
        panels.over_depth(0, label, m["single"], "o-")
        panels.over_depth(0, label, [m["whole"]] * n, "--")
        for first, _, error in m["pairs"]:
            values: list[float | None] = [None] * n
            values[first - 1] = error
            panels.over_depth(1, label, values, ".")
    for label, m in with_swaps.items():
        swaps = {row[0]: row[2] for row in m["swaps"]}
        panels.over_depth(2, label, [swaps.get(i + 1) for i in range(len(m["stage"]))], "o-")
    panels.save(to)
