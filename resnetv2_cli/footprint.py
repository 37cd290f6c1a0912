"""How much memory a training step needs, counted before it runs, and how small parts fit."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import side
from resnetv2_cli.describe import counting, parameters, skeleton
from resnetv2_cli.errors import UserError
from resnetv2_cli.fused import made_again
from resnetv2_cli.joined import EACH, by_itself
from resnetv2_cli.plans import BLOCKS, STEMS, units_per_stage
from resnetv2_cli.quantities import size
from resnetv2_cli.resnet import ResNet

IMAGES = 2  # that are counted: BN asks for more than one value a channel
LIVE = 4  # of the largest tensor, at one time, beside what is kept: a unit's gradients in backward
COPIES = 3 * 4 + 2  # bytes a parameter: itself, its gradient and momentum; and in 16 bits
SPARE = 0.9  # share of the free memory that may be planned for


def _type(precision: str) -> torch.dtype:
    return torch.float32 if precision == "32-true" else torch.bfloat16


class Kept:
    """The storages that autograd keeps while it is entered, but for what is made again."""

    def __init__(self, net: ResNet) -> None:
        self.forgets = net.forget
        self.own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
        self.found: dict[int, Tensor] = {}  # by storage, which views share
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self.own and not (self.forgets and made_again(tensor)):
            self.found[storage] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.found.values())


def run(net: ResNet, x: Tensor, modules: Iterable[nn.Module]) -> tuple[Tensor, int]:
    """Through the modules in turn: what comes out, and the bytes that they keep for backward.

    Shape: x as the first takes it; what comes out as the last gives it.
    """
    kept = Kept(net)
    with kept.hooks:
        for module in modules:
            x = module(x)
    return x, kept.bytes()


def along_depth(experiment: Experiment, count: Callable[[Experiment], int]) -> int:
    """A count of a network, from its count in shallow ones, where every few units of a stage add
    the same: a deep network takes seconds to build."""
    e = experiment
    n = units_per_stage(e.depth, e.block_, e.stem_)[0]
    more = EACH if e.recompute_bn else 1
    if e.stem_ == "imagenet" or n <= 2 + more:
        return count(e)
    per_n = 3 * len(BLOCKS[e.block_].kernels)
    shallow = [replace(e, depth=k * per_n + 2, block=e.block_) for k in (2, 2 + more)]
    two, several = map(count, shallow)
    return two + (n - 2) * (several - two) // more


def activation_bytes(experiment: Experiment, precision: str, device: str = "cpu") -> int:
    """Bytes that a training step keeps of each image for its backward pass; weights are not in it.

    Counted on the meta device, with everything in 16 bits where the precision is a mixed one. Of
    segments that are computed again it is their inputs, and all of the largest. ``device``: the
    type of the one it trains on, whose compiled operations keep less.

    Raises:
        Uncounted: code of one's own does not run on the meta device.
    """
    with counting(experiment):
        if experiment.recompute:
            return _segmented(experiment, precision, device)
        return along_depth(experiment, lambda e: _whole(e, precision, device))


def _network(experiment: Experiment, precision: str, device: str) -> tuple[ResNet, Tensor]:
    """On the meta device, as it trains; and its input."""
    net = skeleton(experiment).to(_type(precision)).train()
    fused = not experiment.compile and by_itself(experiment.kernels, device)
    net.activate(fused, experiment.recompute_bn)
    across = side(experiment.dataset, experiment.stem_)
    return net, torch.empty(IMAGES, 3, across, across, device="meta", dtype=_type(precision))


def _whole(experiment: Experiment, precision: str, device: str) -> int:
    net, x = _network(experiment, precision, device)
    return run(net, x, [net.stem, net.body, net.head])[1] // IMAGES


def _segmented(experiment: Experiment, precision: str, device: str) -> int:
    """From the first two units of each stage: those behind them are as the second."""
    e = experiment
    counts = units_per_stage(e.depth, e.block_, e.stem_)
    if e.stem_ != "imagenet":
        few = min(2, counts[0]) * 3 * len(BLOCKS[e.block_].kernels) + 2
        e = replace(e, depth=few, block=e.block_)
    net, x = _network(e, precision, device)
    x, total = run(net, x, [net.stem])
    inputs: list[int] = []  # bytes, unit by unit
    inside: list[int] = []
    for stage, n in zip(net.body, counts, strict=True):
        first = len(inside)
        for unit in stage:  # type: ignore[attr-defined]
            inputs.append(x.untyped_storage().nbytes())
            x, kept = run(net, x, [unit])
            inside.append(kept)
        for units in (inputs, inside):
            units += units[-1:] * (n - (len(units) - first))
    step = -(-len(inside) // experiment.recompute)
    starts = range(0, len(inside), step)
    total += sum(inputs[::step]) + max(sum(inside[s : s + step]) for s in starts)
    return (total + run(net, x, [net.head])[1]) // IMAGES


def step_bytes(experiment: Experiment, precision: str, images: int, device: str = "cpu") -> int:
    """Bytes that a training step on so many images needs, beside the program and the dataset."""
    stem = STEMS[experiment.stem_]
    # Where the tensors are largest, before anything is pooled.
    across = side(experiment.dataset, experiment.stem_) // stem.stride
    widest = stem.channels * (1 if stem.pool else BLOCKS[experiment.block_].expansion)
    live = LIVE * widest * across**2 * _type(precision).itemsize
    weights = along_depth(experiment, lambda e: parameters(skeleton(e)))
    return images * (activation_bytes(experiment, precision, device) + live) + COPIES * weights


def part_size(experiment: Experiment, devices: int = 1) -> int:
    """Images of the largest micro-batch on one device."""
    return -(-experiment.batch_size // (experiment.accumulate * devices))


def split(
    experiment: Experiment,
    micro_batch: str,
    precision: str,
    free: int | None,
    device: str = "cpu",
    devices: int = 1,
) -> Experiment:
    """The same experiment with ``accumulate`` such that no micro-batch has more images on a device
    than that: a number, or ``auto``, the most that ``free`` bytes have room for.

    Raises:
        UserError: it is neither, or not even one image fits.
    """
    batch = -(-experiment.batch_size // devices)
    if micro_batch.isdecimal() and int(micro_batch) > 0:
        return replace(experiment, accumulate=-(-batch // min(batch, int(micro_batch))))
    if micro_batch != "auto":
        hint = "--micro-batch auto, or how many images at a time"
        raise UserError(f"a micro-batch is no {micro_batch!r}", hint)
    if free is None:
        raise UserError("this system does not tell its free memory", "--micro-batch N")
    one, two = (step_bytes(experiment, precision, n, device) for n in (1, 2))
    fitting = int((SPARE * free - (2 * one - two)) // (two - one))
    if fitting < 1:
        needs = f"it needs {size(one)}, and {size(free)} are free"
        raise UserError(f"not even one image fits: {needs}", "--recompute-bn, --recompute")
    return replace(experiment, accumulate=-(-batch // min(batch, fitting)))
