"""Which units matter: test error after units are deleted or swapped (Veit et al. 2016; not in
the paper)."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from resnetv2_cli.resnet import ResNet

PAIRS = 30  # pairs that are tried; all of them where there are no more


class Deleted(nn.Module):
    """A unit whose F is 0: f(h(x)).

    Shape: as the unit's.
    """

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        unit: Any = self.unit
        shared = unit.shared(x)
        zero = torch.zeros_like(unit.shortcut.carry(shared))
        return unit.after(unit.shortcut(shared, zero))


def error(net: ResNet, units: list[nn.Module], x: Tensor, labels: Tensor) -> float:
    """Error in percent of what these units and the head make of x."""
    for unit in units:
        x = unit(x)
    guesses = net.head(x).argmax(1)
    return 100 * float((guesses != labels).double().mean())


@torch.no_grad()
def lesion(net: ResNet, images: Tensor, labels: Tensor, seed: int = 0) -> dict[str, Any]:
    """Test error, in percent: intact; with each unit deleted; with pairs deleted; with
    neighbours of the same shape swapped. The network is in evaluation mode.

    Shape: images (N, 3, H, W), normalized; labels (N,).
    """
    net.eval()
    units = net.units
    names = [
        f"{stage_name}.{name}"
        for stage_name, stage in net.body.named_children()
        for name, _ in stage.named_children()
    ]
    every = [(i, j) for j in range(len(units)) for i in range(j)]
    pairs = sorted(random.Random(seed).sample(every, min(PAIRS, len(every))))
    deleted, paired, swapped = [], [], []
    x = net.stem(images)
    intact = error(net, units, x, labels)
    for i, unit in enumerate(units):  # x comes from the units before, which are as they were
        following = units[i + 1 :]
        deleted.append(
            {"unit": names[i], "error": error(net, [Deleted(unit), *following], x, labels)}
        )
        for _, j in (pair for pair in pairs if pair[0] == i):
            both = [Deleted(u) if i + k in (i, j) else u for k, u in enumerate(units[i:])]
            found = error(net, both, x, labels)
            paired.append({"units": [names[i], names[j]], "error": found})
        out = unit(x)
        if following and x.shape == out.shape == following[0](out).shape:
            other = [following[0], unit, *following[1:]]
            found = error(net, other, x, labels)
            swapped.append({"units": [names[i], names[i + 1]], "error": found})
        x = out
    return {
        "images": len(labels),
        "intact": intact,
        "deleted": deleted,
        "pairs_of": len(every),
        "pairs": paired,
        "swapped": swapped,
    }
