"""What a step is compared with: PyTorch's convolutions alone, and the bytes it must move."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnetv2_cli.bench.turns import Arm, finish, timed
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import side
from resnetv2_cli.describe import skeleton

COPY = 2**26  # float32s in the copy that measures bandwidth: 256 MiB, more than any cache


class Weights(NamedTuple):
    """A convolution of a network.

    ``read``, ``written``: shapes (C, H, W) of its input and output; ``first``: it is the network's
    first, whose input needs no gradient.
    """

    c_out: int
    kernel: int
    stride: int
    read: tuple[int, ...]
    written: tuple[int, ...]
    first: bool


def convolutions(experiment: Experiment) -> list[Weights]:
    """Every convolution of a network, in the order they run."""
    net = skeleton(experiment).eval()
    found: list[Weights] = []

    def note(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        kernel, stride = module.kernel_size[0], module.stride[0]
        read, written = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
        found.append(Weights(module.out_channels, kernel, stride, read, written, not found))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    size = side(experiment.dataset, experiment.stem_)
    with torch.no_grad():
        net(torch.empty(1, 3, size, size, device="meta"))
    return found


def convolution(
    w: Weights, images: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Callable[[], None]:
    """A callable that runs a convolution and both its gradients on tensors allocated once."""
    x = torch.randn(images, *w.read, device=device, dtype=dtype)
    shape = (w.c_out, w.read[0], w.kernel, w.kernel)
    weight = torch.randn(shape, device=device, dtype=dtype) / w.kernel
    gradient = torch.randn(images, *w.written, device=device, dtype=dtype)
    x, weight, gradient = (t.contiguous(memory_format=layout) for t in (x, weight, gradient))
    stride, padding = [w.stride] * 2, [w.kernel // 2] * 2
    wanted = [not w.first, True, False]

    def run() -> None:
        torch.nn.functional.conv2d(x, weight, None, stride, padding)
        torch.ops.aten.convolution_backward(
            gradient, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return run


def convolutions_alone(
    experiment: Experiment, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Arm:
    """An arm that runs every convolution of a training step, and nothing else.

    Convolutions of the same shape share their input, so it is in cache more often than in a
    network. That can only lower the floor, which must not be too high.
    """
    every = convolutions(experiment)
    n = experiment.batch_size
    made = {w: convolution(w, n, dtype, layout, device) for w in set(every)}

    def step() -> None:
        for w in every:
            made[w]()

    return timed(step, device)


def bytes_moved(experiment: Experiment, dtype: torch.dtype) -> int:
    """Bytes that a training step moves if BN, ReLU and additions move none of their own.

    Each convolution reads its input and writes its output; in backward it reads its input and the
    gradient of its output, and writes the gradient of its input. Weights are not counted.
    """
    numbers = 0
    for w in convolutions(experiment):
        read, written = torch.Size(w.read).numel(), torch.Size(w.written).numel()
        numbers += (2 if w.first else 3) * read + 2 * written
    return numbers * dtype.itemsize * experiment.batch_size


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a copy of 256 MiB: median of 5, after a warm-up."""
    source = torch.zeros(COPY, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        finish(device)
        taken.append(time.perf_counter() - began)
    return 2 * COPY * source.itemsize / median(taken[1:])


def floor(experiment: Experiment, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """``bytes``, ``copy_bytes_per_second`` and the ``seconds`` that the bytes take at this rate."""
    moved, rate = bytes_moved(experiment, dtype), copy_bandwidth(device)
    return {"bytes": moved, "copy_bytes_per_second": rate, "seconds": moved / rate}
