"""Precise BN: statistics that are means over many training images, as in the authors' released
models and in fb.resnet.torch's, instead of the moving averages of training's last iterations.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.checkpoint import PRECISE
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.errors import UserError
from resnetv2_cli.evaluation import restore_as
from resnetv2_cli.machine import trainer_of
from resnetv2_cli.task import Classification

Tick = Callable[[int, int], None]
KEPT = ("experiment", "classes", "global_step", "data", "imported")  # keys that stay


def precise(
    path: Path, images: int | None, tick: Tick = lambda done, all: None, **overrides: Any
) -> tuple[dict[str, Any], int]:
    """A checkpoint with BN's statistics recomputed from ``images`` training images (all, if None),
    in whole batches; and how many images those are. ``tick``: called with the batches done and
    their total.

    Raises:
        UserError: the file is no checkpoint of this tool, or its network has no BN to recompute;
            the images are missing or fewer; or a statistic is not finite.
    """
    saved = checkpoints.network(path)
    experiment = checkpoints.experiment_of(saved, **overrides, devices="1")
    experiment = replace(experiment, batch_size=min(experiment.batch_size, images or 2**31))
    task, data = restore_as(path, replace(experiment, steps=1, warmup=0))
    if images and images > data.train_images:
        hint = f"--images {data.train_images} or fewer"
        raise UserError(f"there are {data.train_images:,} training images, not {images:,}", hint)
    size = experiment.batch_size
    batches = (images or data.train_images) // size
    data.experiment = replace(data.experiment, steps=batches)
    task.setup("fit")  # keeps frozen parts as they are
    found = statistics(task, data, tick)
    if not found:
        raise UserError(f"{path} has no BN that averages", "there is nothing to recompute")
    if wild := [name for name, value in found.items() if not value.isfinite().all()]:
        raise UserError(f"{wild[0]} is not finite", "did this network diverge?")
    kept = {name: saved[name] for name in KEPT if name in saved}
    made = {**kept, "state_dict": saved["state_dict"] | found, PRECISE: batches * size}
    return made, batches * size


@torch.no_grad()
def statistics(task: Classification, data: ImageData, tick: Tick) -> dict[str, torch.Tensor]:
    """Mean and variance of each BN that is not frozen, by name as in a checkpoint: the averages of
    those of all batches, weighted equally."""
    trainer = trainer_of(data.experiment, logger=False)
    data.trainer, device = trainer, trainer.strategy.root_device
    task.to(device)
    norms: dict[str, nn.Module] = {
        name: module
        for name, module in task.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    }
    for norm in norms.values():
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]
    for number, batch in enumerate(data.batches(0)):
        task.draw(number, 0)
        with trainer.precision_plugin.forward_context():
            task.through(task.pixels(trainer.strategy.batch_to_device(batch, device)))
        tick(number + 1, data.experiment.steps)
    names = [f"{name}.{what}" for name in norms for what in ("running_mean", "running_var")]
    return {name: task.get_buffer(name).cpu() for name in names}
