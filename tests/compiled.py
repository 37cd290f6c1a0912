"""Shared by tests of compiled operations: what they need to run, and bounds on their error."""

import copy
import platform

import pytest
import torch
from torch.nn import functional as F

from resnetv2_cli import native

LAST = torch.channels_last
MODES = {"eager": (False, False), "compiled": (True, False), "forget": (True, True)}
MODES |= {"plain-forget": (False, True)}
BOUND = 2**-8  # of the norm: half a unit in the last place of bf16, for results rounded to it
BOUNDS = {torch.bfloat16: BOUND, torch.float32: 2e-6}

needs_gcc = pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.why_not()}")
needs_x86 = pytest.mark.skipif(  # for x86 flags of the compiler
    platform.machine() not in ("x86_64", "AMD64"), reason="no x86"
)
needs_products = pytest.mark.skipif(
    not native.multiplies(), reason=f"no products of bf16: {native.why_not() or 'the processor'}"
)
DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not native.multiplies(dtype), reason="no products")
    )
    for dtype in BOUNDS
]


def bf16(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).to(memory_format=LAST)


def trained_step(net, mode, mixed=False, seed=3):
    """Logits, gradients and buffers after one training step in the network's dtype."""
    net = copy.deepcopy(net).train()
    net.activate(*MODES[mode])
    net.to(memory_format=LAST)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, 32, 32, generator=g).to(net.head.fc.weight.dtype)
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        logits = net(x.contiguous(memory_format=LAST))
        loss = F.cross_entropy(logits, torch.arange(8))
    loss.backward()
    gradient = torch.cat([p.grad.double().flatten() for p in net.parameters()])
    return logits.detach().double(), gradient, dict(net.named_buffers())


def distance(a, b):
    return float((a - b).norm() / b.norm())


def conv3x3(kind):
    """The file of C functions for 3x3 convolutions of bf16 or float."""
    return "conv3x3" if kind == "bf16" and native.has("conv3x3_forward_bf16") else "winograd"
