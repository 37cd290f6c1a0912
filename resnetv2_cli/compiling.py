"""torch.compile of a network's units, in training: once for each shape of unit, whatever the depth.

A network as one graph takes the longer to compile the deeper it is; its units have six shapes. What
compiling costs, and what it is worth, is in RESULTS.md.
"""

import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from resnetv2_cli.resnet import ResNet

SHAPES = 64  # of units: by stage, stride and activation, of each size of micro-batch


def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for a device, as where it has no compiler; empty where it can."""
    if device.type == "cpu":  # the compiler looks for CUDA's, and says that it found no GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(_trial)(torch.ones(16, device=device))
    except Exception as error:  # whatever the compiler's many parts raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return ""


def _trial(x: Tensor) -> Tensor:
    return x.relu() + 1


def compile_units(net: ResNet) -> None:
    """Have each unit compiled when it is first called; those of one shape share what is made.

    Above its limit of shapes torch.compile goes on without compiling: the usual one is 8.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    for unit in net.units:
        unit.compile(dynamic=False)


def eager() -> AbstractContextManager[None]:
    """Nothing is compiled inside: an evaluation has other shapes, and is over before they are."""
    return torch.compiler.set_stance("force_eager")
