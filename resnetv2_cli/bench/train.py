"""Whole training: ``resnetv2 train``, its bare step, and the loop that most people write."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch.nn import functional as F

from resnetv2_cli import graphs, trust
from resnetv2_cli.bench.plain import PlainLoop
from resnetv2_cli.bench.turns import WARM, Arm, finish, in_turns, rows, timed
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.data.augment import augmented
from resnetv2_cli.data.module import Batch, EpochMaker, ImageData, Parts, Stream
from resnetv2_cli.data.order import Schedule, epoch_order
from resnetv2_cli.display import Display
from resnetv2_cli.errors import UserError
from resnetv2_cli.leaving import Leaver
from resnetv2_cli.machine import precision, ready
from resnetv2_cli.manifest import environment
from resnetv2_cli.optim import schedule, sgd
from resnetv2_cli.run import build, trainer_for
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.task import Classification
from resnetv2_cli.telling import Tell, silent

PLAIN, BARE, TRAIN = "plain loop", "bare step", "resnetv2 train"
PATIENCE = 600.0  # seconds that a new process may take until its first step is done


def bare_arm(
    task: Classification, data: ImageData, split: images.Split, device: torch.device
) -> Arm:
    """An arm with the tool's network, images, arithmetic and optimizer, but no Trainer."""
    e = task.experiment
    task = task.to(device).train()
    task.on_fit_start()
    optimizer = sgd(task.net, e)
    scheduler = schedule(optimizer, e)
    task.record(optimizer)
    n, done = data.train_images, 0
    epoch = EpochMaker(n, e.seed, data.dataset.flip, e.augment)
    batches = iter(Stream(split, Parts(Schedule(n, e.batch_size), 0, 10**9), epoch, device))

    def step() -> None:
        nonlocal done
        batch = next(batches)
        if task.iteration and task.iteration.fits(batch):
            task.iteration(batch, done)
        else:
            with graphs.arithmetic(device, precision(e)):
                pixels, labels, views, _ = batch
                x = task.normalize(pixels)
                if views is not None:
                    x = task.augmented(task.normalize, pixels, views)
                loss = F.cross_entropy(task.through(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        done += 1

    return timed(step, device)


class Clock(Callback):
    """Records when each iteration ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if len(self.ends) == WARM - 1 or trainer.global_step == trainer.max_steps:
            finish(trainer.strategy.root_device)
        self.ends.append(time.perf_counter())


class Waited:
    """Training batches, and the seconds spent waiting for each."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.stream)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.seconds.append(time.perf_counter() - asked)
            yield batch


class WholeTrain:
    """What ``resnetv2 train`` runs: the Trainer with its callbacks, files and display.

    ``waited``: seconds spent waiting for images in the last turn.
    """

    def __init__(self, task: Classification, data: ImageData, folder: Path) -> None:
        self.task, self.data, self.folder = task, data, folder
        self.stream = data.train_dataloader
        self.waited = 0.0

    def __call__(self, steps: int) -> float:
        data = self.data
        place = RunFolder(self.folder / f"{time.monotonic_ns()}")
        place.checkpoints.mkdir(parents=True)
        display, clock = Display(Console(file=StringIO(), force_terminal=True)), Clock()
        trainer, files = trainer_for(
            self.task,
            data,
            place,
            Leaver(),
            [display, clock],
            max_steps=WARM + steps,
            limit_val_batches=0,
        )
        for file in files:
            file.start(0)
        waited: list[Waited] = []

        def watched() -> Waited:
            waited.append(Waited(self.stream()))  # type: ignore[arg-type]
            return waited[-1]

        data.train_dataloader = watched  # type: ignore[method-assign, assignment]
        trainer.fit(self.task, datamodule=data)
        self.waited = sum(waited[-1].seconds[WARM : WARM + steps])
        return (clock.ends[-1] - clock.ends[WARM - 1]) / steps


def augmentation_seconds(data: ImageData, split: images.Split, device: torch.device) -> float:
    """Seconds to normalize and augment one batch: the median of 50."""
    n = data.experiment.batch_size
    pixels = torch.from_numpy(split.images[:n]).to(device)
    views, normalize = epoch_order(n, 0, 0).views.to(device), data.normalize.to(device)
    taken = []
    for _ in range(50):
        began = time.perf_counter()
        augmented(normalize, pixels, views)
        finish(device)
        taken.append(time.perf_counter() - began)
    return median(taken)


def first_step_seconds(experiment: Experiment, folder: Path) -> float:
    """Seconds from the start of a ``train`` process to the end of its first iteration.

    Raises:
        UserError: the process ended without one, or took longer than ``PATIENCE``.
    """
    config, output = folder / "first.yaml", folder / "first"
    config.write_text(experiment.dump(), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "resnetv2_cli", "train", "--config", str(config)]
    command += [*trust.flags(experiment.own.values()), "--output", str(output), "--log-every", "1"]
    began = time.perf_counter()
    with open(folder / "first.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            lines = RunFolder(output).metrics
            while not (lines.exists() and lines.read_text(encoding="utf-8").count("\n") > 1):
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    log.seek(0)
                    raise UserError("train completed no first step", log.read().strip()[-300:])
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def bench_train(experiment: Experiment, rounds: int, steps: int, tell: Tell) -> dict[str, Any]:
    """Images per second of each arm, and the ratio of each to the plain loop.

    ``waiting``: the share of an arm's time spent waiting for images. ``trainer_overhead``: what
    the Trainer, its files and callbacks add to the bare step, as a share of its time.
    ``augmentation``: the share of normalization and augmentation in the bare step.
    ``first_step_seconds``: from the start of a new ``train`` process.

    Raises:
        UserError: the dataset is not one of small decoded images, or batches are split.
    """
    if experiment.accumulate > 1 or experiment.devices not in ("1", "auto"):
        raise UserError(
            "bench times whole batches on one device", "leave out --accumulate and --devices"
        )
    experiment = replace(experiment, devices="1")
    task, data = build(experiment)
    split = data.train
    if not isinstance(split, images.Split):
        raise UserError("bench train needs small images", "--dataset cifar10, cifar100 or digits")
    device = ready(experiment)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = first_step_seconds(experiment, folder)
        plain = PlainLoop(experiment, len(data.classes), split, device)
        bare_task = build(experiment)[0]
        task.engage(device, silent)
        bare_task.engage(device, tell)
        whole = WholeTrain(task, data, folder)
        bare = bare_arm(bare_task, data, split, device)
        arms: dict[str, Arm] = {PLAIN: plain, BARE: bare, TRAIN: whole}
        turns = in_turns(arms, rounds, steps, device)
    made = rows(turns, PLAIN, experiment.batch_size)
    for arm, waited in ((PLAIN, plain.waited), (TRAIN, whole.waited)):
        made[arm]["waiting"] = waited / (turns[arm][-1].seconds * steps)
    pairs = zip(turns[TRAIN], turns[BARE], strict=True)
    return {
        "bench": "train",
        "network": experiment.name,
        "batch_size": experiment.batch_size,
        "precision": precision(experiment),
        "rounds": rounds,
        "steps": steps,
        "arms": made,
        "trainer_overhead": median(t.seconds / b.seconds - 1 for t, b in pairs),
        "augmentation": augmentation_seconds(data, split, device) / made[BARE]["seconds"],
        "first_step_seconds": first,
        "environment": environment([device]),
    }
