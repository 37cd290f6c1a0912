"""torch.compile of a network's units, in training: once for each shape of unit, whatever the depth.

A network as one graph takes longer to compile the deeper it is; its units have six shapes. The cost
and the gain of compiling are in RESULTS.md.
"""

import logging
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from resnetv2_cli.resnet import ResNet

SHAPES = 64  # limit of unit shapes: by stage, stride and activation, for each micro-batch size


def why_not(device: torch.device) -> str:
    """Why nothing can be compiled for a device, such as no compiler; empty if compiling works."""
    if device.type == "cpu":  # the compiler looks for CUDA too, and logs that it found no GPU
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
    """Have each unit compiled when it is first called; units of one shape share the compiled code.

    Beyond its limit of shapes, by default 8, torch.compile continues without compiling.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    for unit in net.units:
        unit.compile(dynamic=False)


def eager() -> AbstractContextManager[None]:
    """Compile nothing inside: an evaluation has other shapes, and ends before they are compiled."""
    return torch.compiler.set_stance("force_eager")
