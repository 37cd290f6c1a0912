"""The machine that an experiment trains on: its arithmetic, its memory, and a Trainer for it."""

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from resnetv2_cli import footprint, memory
from resnetv2_cli.checkpoint import WholeFiles
from resnetv2_cli.cluster import (
    Launcher,
    NoHandlers,
    Steps,
    refuse_another_number,
    refuse_unfit,
)
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import Uncounted
from resnetv2_cli.errors import UserError
from resnetv2_cli.quantities import size
from resnetv2_cli.syncbn import FirstAverages, OverProcesses

LEAST = 0.7  # share of the estimate that a step takes at least: test_footprint.py has the bounds
CROWD = 4  # processes on one processor, at most: slow, but good enough to try things out


def uses_gpu(accelerator: str) -> bool:
    """Whether there is a GPU, and ``accelerator`` asks for it or takes what there is."""
    return torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")


def precision(experiment: Experiment) -> str:
    """The arithmetic that ``auto`` stands for on this machine: bf16 where the hardware has it.

    Raises:
        UserError: the requested one is not available here.
    """
    gpus = [device for device in devices_of(experiment) if device.type == "cuda"]
    if experiment.precision == "16-mixed" and not gpus:
        raise UserError("16-mixed needs a GPU", "use --precision bf16-mixed or 32-true")
    if experiment.precision != "auto":
        return experiment.precision
    if gpus:
        least = min(map(torch.cuda.get_device_capability, gpus))
        return "bf16-mixed" if least >= (8, 0) else "16-mixed"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has = [getattr(torch.cpu, name, lambda: False)() for name in names]
    return "bf16-mixed" if any(has) else "32-true"


def quiet() -> None:
    """Keep the framework's advice off the terminal; its errors still come through."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torchmetrics)\.")
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")  # Triton's own future
    # From CUDA graphs and DDP, which run their passes on streams of their own.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")


def trainer_of(
    experiment: Experiment, callbacks: Sequence[Callback] = (), **more: Any
) -> L.Trainer:
    """A Trainer for the machine that the experiment names.

    Raises:
        UserError: it asks for devices that are not there, or for a strategy that cannot be used.
    """
    quiet()
    refuse_unfit(experiment.strategy)
    refuse_another_number(processes(experiment), experiment.nodes)
    e, cuda = experiment, torch.cuda.is_available()
    try:
        devices: Any = e.devices
        # Accelerators other than CUDA lack float64, which sums over many images need.
        accelerator = "cpu" if e.accelerator == "auto" and not cuda else e.accelerator
        if e.devices == "auto" and not cuda:
            devices = 1
        elif e.devices.lstrip("-").isdigit():
            devices = int(e.devices)
            if not cuda and devices > CROWD * (os.cpu_count() or 1):
                raise ValueError(f"{devices} were asked for")
        # PyTorch's own synchronized BN is for GPUs only.
        shared = [OverProcesses()] if e.sync_bn and not uses_gpu(e.accelerator) else []
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=e.nodes,
            strategy=e.strategy,
            precision=precision(e),  # type: ignore[arg-type]
            sync_batchnorm=e.sync_bn and not shared,
            deterministic=e.deterministic,
            benchmark=not e.deterministic,
            use_distributed_sampler=False,  # it pads; ours count each image once
            plugins=[WholeFiles(), *shared],
            callbacks=[FirstAverages(), *callbacks],
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **more,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0].strip()
        hint = "see --devices, --accelerator and --strategy; this machine has "
        hint += f"{torch.cuda.device_count()} GPUs and {os.cpu_count()} processors"
        raise UserError(f"no such devices: {line}", hint) from None
    steps = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = Steps(trainer, steps.min_steps, steps.max_steps)
    trainer._signal_connector = NoHandlers(trainer)
    if isinstance(ddp := trainer.strategy, DDPStrategy) and ddp.cluster_environment:
        ddp._launcher = Launcher(ddp.cluster_environment, ddp.num_processes, ddp.num_nodes)
    return trainer


def ready(experiment: Experiment) -> torch.device:
    """The device that its Trainer would train on, which becomes the current one."""
    device = trainer_of(experiment, logger=False).strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def devices_of(experiment: Experiment) -> list[torch.device]:
    """The devices that it trains on, on one machine, one for each process: GPUs if there are any,
    unless the experiment says otherwise. Missing ones are left out: the Trainer refuses them."""
    asked, gpu = experiment.devices, uses_gpu(experiment.accelerator)
    most = torch.cuda.device_count() if gpu else CROWD * (os.cpu_count() or 1)
    if asked in ("auto", "-1"):
        numbers = [*range(most if gpu else 1)]
    elif "," in asked:
        parts = [int(part) for part in asked.split(",") if part.strip().isdecimal()]
        numbers = [number for number in parts if number < most]
    else:
        numbers = [*range(min(int(asked), most) if asked.isdecimal() else 1)]
    return [torch.device("cuda", n) if gpu else torch.device("cpu") for n in numbers or [0]]


def processes(experiment: Experiment) -> int:
    """How many processes share its batch, on all its machines."""
    return len(devices_of(experiment)) * experiment.nodes


def free_each(experiment: Experiment) -> int | None:
    """Bytes that each process can take: what is free on the first GPU, or an equal part of the
    memory that all processes on a CPU share. Asking another GPU would occupy memory on it."""
    first, *others = devices_of(experiment)
    free = memory.available(first)
    return free if free is None or first.type == "cuda" else free // (1 + len(others))


def in_parts(experiment: Experiment, micro_batch: str) -> Experiment:
    """The experiment with its batch split into micro-batches of this size, or as fits (``auto``).

    Raises:
        UserError: there is no such size.
    """
    device, shares = devices_of(experiment)[0].type, processes(experiment)
    arithmetic, free = precision(experiment), free_each(experiment)
    return footprint.split(experiment, micro_batch, arithmetic, free, device, shares)


def memory_line(experiment: Experiment) -> str:
    """A line on the memory that a training step will need, and what is free.

    Raises:
        UserError: it needs so much that the system would kill the process; names what would fit.
    """
    devices, free = devices_of(experiment), free_each(experiment)
    images, kind = footprint.part_size(experiment, processes(experiment)), devices[0].type
    try:
        needed = footprint.step_bytes(experiment, precision(experiment), images, kind)
    except Uncounted as error:
        return f"what a step needs is not known: {error}"
    parts = f", {experiment.accumulate} parts" if experiment.accumulate > 1 else ""
    line = f"a step needs about {size(needed)} ({images:,} images{parts})"
    if free is None:
        return line
    each = f" for each of {len(devices)} processes" if len(devices) > 1 else ""
    line += f"; {size(free)} are free{each}"
    if needed <= free:
        return line
    hint = fitting(experiment)
    if LEAST * needed > free + (memory.swap() // len(devices) if kind == "cpu" else 0):
        raise UserError(line, hint)
    return f"{line}: {hint}"


def fitting(experiment: Experiment) -> str:
    """The flags that make a step fit into the free memory, as a hint."""
    try:
        parts = in_parts(experiment, "auto")
    except UserError as error:  # not even one image does
        return error.hint
    fit = footprint.part_size(parts, processes(experiment))
    hint = f"--micro-batch {fit} would fit, which --micro-batch auto finds"
    return hint if experiment.recompute_bn else f"{hint}; or try --recompute-bn"
