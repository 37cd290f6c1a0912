"""What an ablation would cost: counts, activation memory, and time from a short measurement."""

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resnetv2_cli import graphs
from resnetv2_cli.ablation.arms import Ablation, Line
from resnetv2_cli.ablation.studies import identity, length
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.catalog import known_classes
from resnetv2_cli.describe import describe
from resnetv2_cli.footprint import activation_bytes
from resnetv2_cli.iteration import Iteration
from resnetv2_cli.machine import devices_of, precision, quiet
from resnetv2_cli.optim import sgd
from resnetv2_cli.task import Classification
from resnetv2_cli.telling import silent

PROBE_IMAGES = 32  # of a batch; more would show the same, but take longer
QUICK = 0.5  # seconds; below, costs that do not depend on the batch are a large part
PROBE_STEPS = 3


def step_seconds(experiment: Experiment) -> float:
    """Seconds of one training iteration here: the median of a few, measured on a part of the batch
    where it takes long."""
    device = devices_of(experiment)[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seconds, whole = 0.0, experiment.batch_size
    if device.type == "cpu" and whole > PROBE_IMAGES:  # a GPU takes as long for few as for many
        seconds = measured(experiment, device, PROBE_IMAGES)
    if seconds < QUICK:
        seconds = measured(experiment, device, whole)
    graphs.tidy(device)  # frees the CUDA graph, which ``measured`` held until it returned
    return seconds


def measured(experiment: Experiment, device: torch.device, most: int) -> float:
    """The seconds of one training iteration on a device, timed on ``most`` images at most."""
    n = min(most, -(-experiment.batch_size // experiment.accumulate))
    settled = replace(experiment, batch_size=n, accumulate=1)
    settled = replace(settled, precision=precision(settled))  # type: ignore[arg-type]
    names = tuple(map(str, range(known_classes(experiment.dataset, experiment.classes))))
    task = Classification(settled, names, Normalize(torch.zeros(3, 1, 1), torch.ones(1)))
    quiet()
    task.to(device).train()
    task.on_fit_start()
    task.engage(device, silent)
    optimizer = sgd(task.net, settled)
    task.record(optimizer)
    batch = task.noise()
    iteration = task.iteration or Iteration(task, optimizer, batch)
    taken = []
    for number in range(1 + PROBE_STEPS):
        began = time.perf_counter()
        iteration(batch, number).item()
        taken.append(time.perf_counter() - began)
    task.on_fit_end()
    return median(taken[1:]) * experiment.batch_size / n


def forecast(ablation: Ablation, measure: bool) -> list[dict[str, Any]]:
    """For each line: ``parameters``; ``macs`` of one image; ``activation_bytes`` that a batch keeps
    for the backward pass; ``done`` of ``planned`` runs; and ``seconds`` of training that remain,
    None if nothing is measured or the images cannot be counted. An experiment that several rows
    share is measured once.
    """

    @cache
    def timed(key: tuple[tuple[str, Any], ...]) -> float:
        return step_seconds(experiments[key])

    experiments: dict[tuple[tuple[str, Any], ...], Experiment] = {}

    def one(line: Line) -> dict[str, Any]:
        e = line.arms[0].experiment
        counts = describe(e, known_classes(e.dataset, e.classes))
        done = sum(arm.error is not None for arm in line.arms)
        experiments.setdefault(identity(e), e)
        left, steps = len(line.arms) - done, length(e)
        seconds = left * steps * timed(identity(e)) if measure and left and steps else None
        each = activation_bytes(e, precision(e), devices_of(e)[0].type)
        return {
            "parameters": counts["parameters"],
            "macs": counts["macs"],
            "activation_bytes": e.batch_size * each,
            "planned": len(line.arms),
            "done": done,
            "seconds": seconds if left else 0.0,
        }

    return [one(line) for line in ablation.lines]


def total(planned: Iterable[tuple[Ablation, list[dict[str, Any]]]], jobs: int) -> float | None:
    """Seconds of all remaining training, ``jobs`` at a time, of ablations with their forecasts; a
    run that several share counts once. None if any of it was not measured.

    Jobs on one device share its speed, so only the number of devices in use counts.
    """
    each: dict[Path, float | None] = {}
    for ablation, lines in planned:
        for line, counts in zip(ablation.lines, lines, strict=True):
            left = [arm.folder for arm in line.arms if arm.error is None]
            seconds = counts["seconds"]
            each |= dict.fromkeys(left, seconds and seconds / len(left))
    known = [seconds for seconds in each.values() if seconds is not None]
    if len(known) < len(each):
        return None
    devices = max(1, min(jobs, torch.cuda.device_count()))
    return sum(known) / devices
