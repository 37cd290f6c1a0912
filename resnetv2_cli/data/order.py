"""Which images each iteration takes, and how each is cropped: functions of (seed, epoch, index).

Nothing else matters: neither the number of workers or processes, nor how often a run was resumed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PAD = 4  # pixels on each side, before the random crop (appendix)
STREAMS = 2**20  # epochs per seed; any beyond would repeat draws of the next seed
FILES = 2**21  # images per epoch; any beyond would repeat draws of the next epoch
BITS = 32  # of a seed that PyTorch's generator uses; higher bits change nothing


class Epoch(NamedTuple):
    """order (N,) int64: indices of images; views (N, 3) int64, in the same order: top, left and
    flip of each crop."""

    order: Tensor
    views: Tensor


class Part(NamedTuple):
    """One process's part of a micro-batch: positions ``start`` to ``stop`` of ``epoch``.

    ``weight`` turns the mean over the part into its share of the mean over the whole batch, given
    that the framework averages equally over micro-batches and processes; 1 if all are equal.
    """

    epoch: int
    start: int
    stop: int
    weight: float


def generator(number: int) -> torch.Generator:
    """A random generator of its own for each ``number``, even for those of more than BITS bits."""
    if number >> BITS:
        [number] = np.random.SeedSequence(number).generate_state(1).tolist()
    return torch.Generator().manual_seed(number)


def epoch_order(images: int, seed: int, epoch: int, flip: bool = True) -> Epoch:
    """The order of one epoch, and how each image in it is cropped and flipped."""
    g = generator(seed * STREAMS + epoch)
    order = torch.randperm(images, generator=g)
    corners = torch.randint(2 * PAD + 1, (images, 2), generator=g)
    flips = torch.randint(2, (images, 1), generator=g) * int(flip)
    return Epoch(order, torch.cat([corners, flips], dim=1))


class Schedule:
    """The parts of every epoch that one process takes, iteration by iteration.

    Each epoch covers every image once. Its last batch is the remainder; if that is too small to
    give an image to every process in every micro-batch, it joins the batch before it.
    """

    def __init__(
        self, images: int, batch: int, micro: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        self.images, self.batch = images, min(batch, images)
        self.micro, self.rank, self.ranks = micro, rank, ranks
        full, rest = divmod(images, self.batch)
        self.steps_per_epoch = max(1, full + (rest >= micro * ranks))

    def parts(self, step: int) -> list[Part]:
        """One part for each micro-batch of iteration ``step``, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        start = i * self.batch
        last = i == self.steps_per_epoch - 1
        size = self.images - start if last else self.batch
        shares = self.micro * self.ranks
        cuts = [start + size * k // shares for k in range(shares + 1)]
        mine = range(self.rank, shares, self.ranks)
        return [
            Part(epoch, cuts[k], cuts[k + 1], (cuts[k + 1] - cuts[k]) * shares / size) for k in mine
        ]


def share(images: int, rank: int, ranks: int) -> range:
    """The images that one process evaluates; each image is in exactly one process's share."""
    return range(images * rank // ranks, images * (rank + 1) // ranks)
