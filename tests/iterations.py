"""The parts of one iteration, for separate use: the LightningModule, a batch, a stand-in for the
trainer, and a recorder that needs no GPU.

The recorder keeps each operation with the tensors it ran on. A replay runs the operations again on
the same tensors, without the iteration's Python code, as a CUDA graph does.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resnetv2_cli.config import Experiment
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.module import Batch
from resnetv2_cli.task import Classification


def task(**given) -> Classification:
    torch.manual_seed(given.get("seed", 0))
    experiment = Experiment(**{"dataset": "digits", "depth": 8, **given})
    return Classification(
        experiment, tuple("0123456789"), Normalize(torch.zeros(3, 1, 1), torch.ones(1))
    )


def batch(n: int = 16, weight: float = 1.0) -> Batch:
    g = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8, generator=g)
    views = torch.tensor([[4, 4, 0]] * n)
    return Batch(pixels, torch.arange(n) % 10, views, weight)


class FakeTrainer:
    """The attributes of a trainer that the DataModule reads."""

    def __init__(self, rank: int = 0, ranks: int = 1, step: int = 0) -> None:
        self.global_rank, self.world_size, self.global_step = rank, ranks, step
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


class Tape(TorchDispatchMode):
    """Records every operation, with its arguments and its output."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, given))
        return given

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, before in self.done:
            if operation.is_view:
                continue
            now = operation(*args, **kwargs)
            for place, value in zip(tensors(before), tensors(now), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def tensors(given):
    if isinstance(given, torch.Tensor):
        return [given]
    return [t for each in given for t in tensors(each)] if isinstance(given, (list, tuple)) else []


def on_tape(step):
    step()
    with Tape() as tape:
        step()
    return tape.replay


class Tapes:
    """A network's forward and backward pass, each on a tape, for weights at a fixed address and
    batches of one shape."""

    ran = 0  # replays of the forward pass, over all instances

    def __init__(self, call, samples, pool):
        x, *weights = samples
        self.x = x.clone()
        with Tape() as self.ahead:
            self.y = call(self.x, *weights)
        self.dy = torch.zeros_like(self.y)
        with Tape() as self.back:
            self.gradients = torch.autograd.grad(self.y, weights, self.dy)

    def __call__(self, x, *weights):
        return Replayed.apply(self, x, *weights)


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tapes, x, *weights):
        ctx.tapes = tapes
        tapes.x.copy_(x)
        tapes.ahead.replay()
        Tapes.ran += 1
        return tapes.y.detach().clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.tapes.dy.copy_(dy)
        ctx.tapes.back.replay()
        return None, None, *(g.clone() for g in ctx.tapes.gradients)
