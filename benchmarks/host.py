"""What one iteration of ``train`` asks of the host beside the network, milliseconds.

    python benchmarks/host.py DATA_DIR [DEPTH ...]

The network's place is taken by one operation that has its parameters and gives each a gradient, as
a recorded network is on a GPU; with --graphs a recorded iteration's by a count of images. On a CPU
the optimizer's and the gradients' arithmetic is in the first figure, too.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import Callback

from resnetv2_cli import graphs, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.iteration import Iteration
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.task import Classification

SKIPPED, TIMED = 100, 600  # iterations


class StandIn(torch.autograd.Function):
    """Logits and gradients that lie there already."""

    @staticmethod
    def forward(ctx, x, logits, gradients, *parameters):
        ctx.gradients = gradients
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, *[g.detach() for g in ctx.gradients]


class Clock(Callback):
    """When each iteration ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())


def through(task: Classification, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(task, "stand_in"):
        parameters = list(task.net.parameters())
        gradients = [1e-5 * torch.randn_like(p) for p in parameters]
        task.stand_in = torch.randn(len(x), 10), gradients, *parameters
    return StandIn.apply(x, *task.stand_in)


def measured(depth: int, data_dir: str, recorded: bool) -> float:
    clock, folder = Clock(), RunFolder(Path(tempfile.mkdtemp()) / "run")
    e = Experiment(
        depth=depth, data_dir=data_dir, steps=SKIPPED + TIMED, batch_size=2, accelerator="cpu",
        eval_every=1e6, graphs=recorded,
    )  # fmt: skip
    run.train(e, folder, display=[clock])
    pairs = zip(clock.ends[SKIPPED:], clock.ends[SKIPPED + 1 :], strict=False)
    return 1000 * median(b - a for a, b in pairs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Classification.through = through
    Classification.validation_step = lambda task, batch, i: None if i else task._evaluate(batch)
    graphs.why_not = lambda device, **parts: ""
    Iteration.record = lambda self: setattr(self, "replay", lambda: self.task.sums.add_(1)) or ""
    for depth in map(int, sys.argv[2:] or (20, 110)):
        times = [f"{measured(depth, sys.argv[1], recorded):.2f}" for recorded in (False, True)]
        print(f"ResNet-{depth}: {times[0]} ms call by call, {times[1]} as one recorded iteration")
