"""Each way from stored images to batches of a network's input, alone: images a second.

To add one: a row in PATHS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from resnetv2_cli.bench.plain import forever, plain_loader
from resnetv2_cli.bench.turns import Arm, in_turns, rows, timed
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.data.augment import crop_and_flip
from resnetv2_cli.data.module import EpochMaker, ImageData, Parts, Stream
from resnetv2_cli.data.order import Schedule
from resnetv2_cli.errors import UserError
from resnetv2_cli.manifest import environment
from resnetv2_cli.run import build, trainer_of

Make = Callable[[ImageData, torch.device], Arm]


class InputPath(NamedTuple):
    """One way to read images. ``make(data, device)``: its arm, an iteration of which is a batch."""

    doc: str
    decoded: bool  # for images that are whole in memory; else for files
    make: Make


def small(data: ImageData) -> images.Split:
    """The training images, which are whole in memory."""
    assert isinstance(data.train, images.Split)
    return data.train


def from_memory(data: ImageData, device: torch.device) -> Arm:
    """What ``train`` does: uint8 on the device; one indexing, and the views of a whole batch."""
    e, n = data.experiment, data.train_images
    parts = Parts(Schedule(n, e.batch_size), 0, 10**9)
    stream = iter(Stream(small(data), parts, EpochMaker(n, e.seed, True, True), device))
    normalize = data.normalize.to(device)

    def step() -> torch.Tensor:
        batch = next(stream)
        assert batch.views is not None
        return crop_and_flip(normalize(batch.images), batch.views)

    return timed(step, device)


def from_pil(workers: int) -> Make:
    """torchvision's transforms on PIL images, in a DataLoader."""

    def make(data: ImageData, device: torch.device) -> Arm:
        batches = forever(plain_loader(small(data), data.experiment.batch_size, workers))
        return timed(lambda: [part.to(device) for part in next(batches)], device)

    return make


PATHS = {
    "torchvision, in the process": InputPath("PIL images, no worker", True, from_pil(0)),
    "torchvision, 2 workers": InputPath("PIL images, two workers", True, from_pil(2)),
    "resnetv2": InputPath("uint8 on the device, batch by batch", True, from_memory),
}


def bench_data(experiment: Experiment, rounds: int, steps: int) -> dict[str, Any]:
    """Images a second of each way to read the dataset, and their ratios to the first of PATHS.

    Raises:
        UserError: no row of PATHS reads such a dataset.
    """
    _, data = build(experiment)
    device = trainer_of(experiment, logger=False).strategy.root_device
    paths = {name: p for name, p in PATHS.items() if p.decoded == data.dataset.decoded}
    if not paths:
        raise UserError("bench data needs small images", "--dataset cifar10, cifar100 or digits")
    arms = {name: path.make(data, device) for name, path in paths.items()}
    turns = in_turns(arms, rounds, steps, device)
    return {
        "bench": "data",
        "dataset": experiment.dataset,
        "batch_size": experiment.batch_size,
        "rounds": rounds,
        "steps": steps,
        "arms": rows(turns, next(iter(arms)), experiment.batch_size),
        "environment": environment(),
    }
