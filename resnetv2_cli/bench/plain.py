"""The training loop that most people write: the baseline of the benchmarks."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnetv2_cli.bench.turns import timed
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.data.workers import decoded_by
from resnetv2_cli.resnet import ResNet

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
WORKERS = 2


class PilImages(Dataset):
    """Images as most loops read them: one PIL image at a time, with torchvision's transforms."""

    def __init__(self, split: images.Split) -> None:
        self.pictures = [Image.fromarray(image) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def plain_loader(split: images.Split, batch: int, workers: int = WORKERS) -> DataLoader:
    """A shuffling DataLoader of PIL images."""
    return DataLoader(PilImages(split), batch, shuffle=True, **decoded_by(workers))


def forever(loader: Any) -> Iterator[Any]:
    """The batches of a loader, epoch after epoch."""
    while True:
        yield from loader


def usual_sgd(net: nn.Module) -> torch.optim.SGD:
    """The optimizer as most people write it."""
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


class PlainLoop:
    """float32, NCHW, eager; a DataLoader with two workers; one ``.item()`` per iteration.

    ``waited``: seconds spent waiting for images in the last turn.
    """

    def __init__(
        self, experiment: Experiment, classes: int, split: images.Split, device: torch.device
    ) -> None:
        self.net = ResNet(**experiment.architecture, classes=classes).to(device)
        self.optimizer = usual_sgd(self.net)
        self.batches = forever(plain_loader(split, experiment.batch_size))
        self.device = device
        self.waits: list[float] = []
        self.waited = 0.0

    def step(self) -> None:
        asked = time.perf_counter()
        x, y = next(self.batches)
        self.waits.append(time.perf_counter() - asked)
        loss = nn.functional.cross_entropy(self.net(x.to(self.device)), y.to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    def __call__(self, steps: int) -> float:
        self.net.train()
        seconds = timed(self.step, self.device)(steps)
        self.waited = sum(self.waits[-steps:])  # without the warm-up
        return seconds
