"""How fast training is, beside the loop that most people write; alternating, in one process."""

import tempfile
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from resnetv2_cli.callbacks import Keeper, Leaver, Recorder
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.data.augment import crop_and_flip
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.data.order import Schedule, epoch_order
from resnetv2_cli.display import Display
from resnetv2_cli.errors import UserError
from resnetv2_cli.optim import schedule, sgd
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.run import build, loggers, precision, trainer_of
from resnetv2_cli.runfolder import RunFolder, environment
from resnetv2_cli.task import Classification

WARM = 2  # iterations before a stretch is timed: allocators, worker processes, kernels' choices
Arm = Callable[[int], float]  # iterations -> seconds an iteration


def finish(device: torch.device) -> None:
    """Wait for what the device still has to do, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PilImages(Dataset):
    """Images as most loops have them: PIL, one by one, through torchvision's transforms."""

    def __init__(self, split: images.Split, mean: list[float], std: list[float]) -> None:
        self.pictures = [Image.fromarray(image) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def plain_arm(
    experiment: Experiment, data: ImageData, split: images.Split, device: torch.device
) -> Arm:
    """float32, NCHW, eager; a DataLoader of two workers; one ``.item()`` an iteration."""
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    net = ResNet(**experiment.architecture, classes=len(data.classes)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        PilImages(split, mean, std), experiment.batch_size, shuffle=True, num_workers=2
    )
    criterion = nn.CrossEntropyLoss()

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()

    def run(steps: int) -> float:
        net.train()
        for i in range(WARM + steps):
            if i == WARM:
                finish(device)
                began = time.perf_counter()
            x, y = next(batches)
            loss = criterion(net(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        finish(device)
        return (time.perf_counter() - began) / steps

    return run


def bare_arm(
    task: Classification, data: ImageData, split: images.Split, device: torch.device
) -> Arm:
    """The tool's network, images, arithmetic and optimizer, without the Trainer around them."""
    e = task.experiment
    task = task.to(device)
    optimizer = sgd(task.net, e)
    scheduler = schedule(optimizer, e)
    pixels = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device)
    order = Schedule(data.train_images, e.batch_size)
    epoch = epoch_order(data.train_images, e.seed, 0, data.dataset.flip)
    mixed = precision(e)
    dtype = torch.float16 if mixed == "16-mixed" else torch.bfloat16

    def run(steps: int) -> float:
        task.train()
        for i in range(WARM + steps):
            if i == WARM:
                finish(device)
                began = time.perf_counter()
            [part] = order.parts(i % order.steps_per_epoch)
            chosen = epoch.order[part.start : part.stop].to(device)
            views = epoch.views[part.start : part.stop].to(device)
            with torch.autocast(device.type, dtype, enabled=mixed.endswith("mixed")):
                x = crop_and_flip(task.normalize(pixels[chosen]), views)
                loss = F.cross_entropy(task.net(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        finish(device)
        return (time.perf_counter() - began) / steps

    return run


class Clock(Callback):
    """When each iteration ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.ends) == WARM - 1 or trainer.global_step == trainer.max_steps:
            finish(trainer.strategy.root_device)
        self.ends.append(time.perf_counter())


def train_arm(task: Classification, data: ImageData, folder: Path) -> Arm:
    """What ``resnetv2 train`` runs: the Trainer with its callbacks, files and display."""

    def run(steps: int) -> float:
        place = RunFolder(folder / f"{time.monotonic_ns()}")
        place.checkpoints.mkdir(parents=True)
        write = loggers(task.experiment, place, data.scored)
        keeper, clock = Keeper(place, 0, choose=False), Clock()
        display = Display(Console(file=StringIO(), force_terminal=True))
        recorder = Recorder(write[0], write[1], task.experiment.log_every, data.scored)  # type: ignore[arg-type]
        trainer = trainer_of(
            task.experiment,
            max_steps=WARM + steps,
            limit_val_batches=0,
            logger=write,
            callbacks=[recorder, display, clock, keeper, Leaver(keeper, None)],
            default_root_dir=place.path,
        )
        trainer.fit(task, datamodule=data)
        return (clock.ends[-1] - clock.ends[WARM - 1]) / steps

    return run


def augmentation_seconds(
    data: ImageData, split: images.Split, device: torch.device, times: int = 50
) -> float:
    """Normalization and augmentation of one batch: the median."""
    n = data.experiment.batch_size
    pixels = torch.from_numpy(split.images[:n]).to(device)
    views, normalize = epoch_order(n, 0, 0).views.to(device), data.normalize.to(device)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        crop_and_flip(normalize(pixels), views)
        finish(device)
        taken.append(time.perf_counter() - began)
    return median(taken)


def bench(experiment: Experiment, rounds: int, steps: int) -> dict[str, Any]:
    """Images a second of each arm, and the ratio of each to the plain loop: median, least, most.

    The arms take turns, ``steps`` iterations each, ``rounds`` times, so that a machine whose speed
    drifts slows all of them; ratios are taken within a round.

    Raises:
        UserError: the dataset is not one of small decoded images, or batches are split.
    """
    if experiment.accumulate > 1 or experiment.devices not in ("1", "auto"):
        raise UserError("bench times whole batches on one device", "leave out what splits them")
    task, data = build(experiment)
    split = data.train
    if not isinstance(split, images.Split):
        raise UserError("bench needs small images", "--dataset cifar10, cifar100 or digits")
    device = trainer_of(experiment, logger=False).strategy.root_device
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_arm(build(experiment)[0], data, split, device)
        arms = {
            "plain loop": plain_arm(experiment, data, split, device),
            "bare step": bare,
            "resnetv2 train": train_arm(task, data, Path(folder)),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                times[name].append(arm(steps))
    rows = {}
    for name, taken in times.items():
        ratios = [p / t for p, t in zip(times["plain loop"], taken, strict=True)]
        rows[name] = {
            "images_per_second": experiment.batch_size / median(taken),
            "ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        }
    overhead = [t / b - 1 for t, b in zip(times["resnetv2 train"], times["bare step"], strict=True)]
    return {
        "network": experiment.name,
        "batch_size": experiment.batch_size,
        "precision": precision(experiment),
        "rounds": rounds,
        "steps": steps,
        "arms": rows,
        "trainer_overhead": median(overhead),
        "augmentation": augmentation_seconds(data, split, device) / median(times["bare step"]),
        "environment": environment(),
    }
