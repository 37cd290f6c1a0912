"""How much memory a training step needs, counted before it runs, and the micro-batch that fits."""

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

IMAGES = 2  # in the batch that is counted: BN needs more than one value per channel
LIVE = 4  # largest tensors alive at one time, beside what is kept: a unit's gradients in backward
COPIES = 3 * 4 + 2  # bytes per parameter: itself, its gradient and momentum; and a 16-bit copy
SPARE = 0.9  # share of the free memory that a step may use


def _type(precision: str) -> torch.dtype:
    return torch.float32 if precision == "32-true" else torch.bfloat16


class Kept:
    """The storages that autograd keeps inside ``hooks``, except what is recomputed."""

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
    """Run the modules in sequence; return the output, and the bytes they keep for backward.

    Shape: x as the first module takes it -> the output as the last one returns it.
    """
    kept = Kept(net)
    with kept.hooks:
        for module in modules:
            x = module(x)
    return x, kept.bytes()


def along_depth(experiment: Experiment, count: Callable[[Experiment], int]) -> int:
    """The ``count`` of a network, extrapolated from shallow ones, in which every few units of a
    stage add the same: a deep network takes seconds to build."""
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
    """Bytes that a training step keeps per image for its backward pass, without the weights.

    Counted on the meta device, with everything in 16 bits if the precision is a mixed one. With
    recomputed segments it is the inputs of all, and everything inside the largest. ``device``: the
    type of device that trains; with compiled operations less is kept.

    Raises:
        Uncounted: the user's own code does not run on the meta device.
    """
    with counting(experiment):
        if experiment.recompute:
            return _segmented(experiment, precision, device)
        return along_depth(experiment, lambda e: _whole(e, precision, device))


def _network(experiment: Experiment, precision: str, device: str) -> tuple[ResNet, Tensor]:
    """The network as it trains, on the meta device, and its input."""
    net = skeleton(experiment).to(_type(precision)).train()
    fused = not experiment.compile and by_itself(experiment.kernels, device)
    net.activate(fused, experiment.recompute_bn)
    across = side(experiment.dataset, experiment.stem_)
    return net, torch.empty(IMAGES, 3, across, across, device="meta", dtype=_type(precision))


def _whole(experiment: Experiment, precision: str, device: str) -> int:
    net, x = _network(experiment, precision, device)
    return run(net, x, [net.stem, net.body, net.head])[1] // IMAGES


def _segmented(experiment: Experiment, precision: str, device: str) -> int:
    """Counted from the first two units of each stage, as later ones are like the second."""
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
    """Bytes that a training step on ``images`` needs, beside the program and the dataset."""
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
    """The same experiment with ``accumulate`` such that no micro-batch has more than
    ``micro_batch`` images on a device: a number, or ``auto``, as many as fit in ``free`` bytes.

    Raises:
        UserError: it is neither, or not even one image fits.
    """
    batch = -(-experiment.batch_size // devices)
    if micro_batch.isdecimal() and int(micro_batch) > 0:
        return replace(experiment, accumulate=-(-batch // min(batch, int(micro_batch))))
    if micro_batch != "auto":
        hint = "--micro-batch auto, or how many images at a time"
        raise UserError(f"{micro_batch!r} is not a micro-batch size", hint)
    if free is None:
        raise UserError("this system does not report its free memory", "--micro-batch N")
    one, two = (step_bytes(experiment, precision, n, device) for n in (1, 2))
    fitting = int((SPARE * free - (2 * one - two)) // (two - one))
    if fitting < 1:
        needs = f"it needs {size(one)}, and {size(free)} are free"
        raise UserError(f"not even one image fits: {needs}", "--recompute-bn, --recompute")
    return replace(experiment, accumulate=-(-batch // min(batch, fitting)))
