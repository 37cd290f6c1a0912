"""BN folded into the convolution directly before it, and the network that is exported."""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.layers import SEQUENCES
from resnetv2_cli.task import Classification


class Exported(nn.Module):
    """Normalization and network: what is exported needs no preprocessing except a resize.

    Shape: RGB images (N, 3, H, W) float32, 0 to 1 -> logits (N, classes).
    """

    def __init__(self, normalize: Normalize, net: nn.Module) -> None:
        super().__init__()
        self.normalize, self.net = normalize, net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.normalize.mean) / self.normalize.std)


def exported(task: Classification, fold: bool) -> tuple[Exported, list[str]]:
    """A copy of a network on the CPU, in eval mode, and the names of the BN layers folded."""
    net = copy.deepcopy(task.net).cpu().eval().to(memory_format=torch.contiguous_format)
    for weight in net.parameters():
        weight.requires_grad_(False)
    folded = folded_into(net) if fold else []
    return Exported(copy.deepcopy(task.normalize).cpu(), net).eval(), folded


def folded_into(net: nn.Module) -> list[str]:
    """Fold each BN after a convolution that feeds nothing else; return the names of the folded BN.

    A convolution feeds only the next layer of its sequence. Where an addition comes between, as
    before the BN of ``bn-after-add`` and of pre-activation, there is nothing to fold into.
    """
    gone = []
    for conv, norm in pairs(net):
        module, bn = net.get_submodule(conv), net.get_submodule(norm)
        assert isinstance(module, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        # In float64, so that products of float32 factors are rounded only once.
        fused = fuse_conv_bn_eval(module.double(), bn.double()).float()
        net.set_submodule(conv, fused)
        net.set_submodule(norm, nn.Identity())
        gone.append(norm)
    return gone


def pairs(net: nn.Module) -> list[tuple[str, str]]:
    """The names of each convolution and the BN directly after it."""
    found = []
    for name, module in net.named_modules():
        parent = net.get_submodule(name.rpartition(".")[0])
        if type(module) not in SEQUENCES or type(parent) in SEQUENCES:
            continue  # part of a longer sequence, which is searched as a whole
        layers = list(chain(module, name))
        for (first, conv), (second, bn) in pairwise(layers):
            # Subclasses may compute something else with their weights.
            plain = type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d
            if plain and bn.track_running_stats:
                found.append((first, second))
    return found


def chain(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a sequence and of the sequences nested in it, in the order they run."""
    if type(module) in SEQUENCES:
        for child, part in module.named_children():
            yield from chain(part, f"{name}.{child}")
    else:
        yield name, module


def blank(model: Exported) -> Exported:
    """A copy with its numbers erased, so that they have to come from the file that is read."""
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
    return other
