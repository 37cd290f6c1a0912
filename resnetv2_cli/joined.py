"""BN, ReLU and the convolution of stride 1 behind them as one operation, in training, on bf16.

What is activated is neither written to memory nor kept. Between convolutions that use the processor
well, passes over memory are half of what a step takes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetv2_cli import native
from resnetv2_cli.fused import LANES, fits

LAST = torch.channels_last
MOST = 2**17  # weights; PyTorch's own is as fast from 2**18 on, where they no longer lie in a cache
ROOM = 2**17  # numbers of an image with its border, which a 3x3 convolution keeps in a cache
NAMES = {1: "pointwise", 3: "conv3x3"}  # of the functions, by the kernel


def joins(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Module) -> bool:
    """Whether BN-ReLU of x and this convolution can be one operation: bf16 by autocast on a CPU."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size in ((1, 1), (3, 3))
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == tuple(k // 2 for k in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.bias is None
        and conv.out_channels % LANES == 0
        and conv.weight.numel() <= MOST
        and (conv.kernel_size == (1, 1) or _images_fit(x, conv))
        and x.dtype == torch.bfloat16
        and (x.is_meta or _lies(conv.weight))
        and fits(x, norm)
        and native.multiplies()
    )


def _images_fit(x: Tensor, conv: nn.Conv2d) -> bool:
    (h, w), c = x.shape[2:], max(conv.in_channels, conv.out_channels)
    return w % 8 == 0 and (h + 2) * (w + 1) * c <= ROOM


def _lies(weight: Tensor) -> bool:
    last = weight.is_contiguous(memory_format=LAST)
    return weight.dtype == torch.float32 and last and _mixed()


def _mixed() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class _Joined(torch.autograd.Function):
    """By the functions of ``pointwise.c`` and ``conv3x3.c``. x comes out again: its gradient is
    added as dx is written."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plus: Tensor | None, gamma: Tensor, beta: Tensor, w: Tensor, norm: Any
    ) -> tuple[Tensor, Tensor]:
        images, c, *sides = x.shape
        n, threads = w.shape[0], torch.get_num_threads()
        y = torch.empty_like(x[:, :1].expand(-1, n, -1, -1), memory_format=LAST)
        saved = torch.empty(4, c, device=x.device)
        sums = torch.empty(threads, 2, c, dtype=torch.float64)
        packed = torch.empty(w.shape, dtype=x.dtype)
        if plus is not None:
            plus = plus.to(y.dtype).contiguous(memory_format=LAST)
        running = [norm.running_mean, norm.running_var]
        tensors = [x, plus, y, gamma, beta, w, *running, saved, sums, packed]
        numbers = [images, *sides, c, n, norm.momentum, norm.eps, threads]
        native.call(f"{NAMES[w.shape[-1]]}_forward", tensors, *numbers)
        ctx.save_for_backward(x, saved, w)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, plus: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return plus, None, None, None, None, None
        x, saved, w = ctx.saved_tensors
        images, c, *sides = x.shape
        n, threads = w.shape[0], torch.get_num_threads()
        dy = dy.to(x.dtype).contiguous(memory_format=LAST)
        if plus is not None:
            plus = plus.to(x.dtype).contiguous(memory_format=LAST)
        dx, dw, dgamma, dbeta = torch.empty_like(x), torch.empty_like(w), *torch.empty(2, c)
        sums = torch.empty(threads, 2, c, dtype=torch.float64)
        packed = torch.empty(w.shape, dtype=x.dtype)
        parts = torch.empty(threads - 1, *w.shape)
        tensors = [dy, x, plus, dx, saved, w, dgamma, dbeta, dw, parts, sums, packed]
        name = f"{NAMES[w.shape[-1]]}_backward"
        native.call(name, tensors, images, *sides, c, n, threads)
        return dx, dy if ctx.needs_input_grad[1] else None, dgamma, dbeta, dw, None


def bn_relu_conv(
    x: Tensor, plus: Tensor | None, norm: nn.BatchNorm2d, conv: nn.Conv2d
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(BN(x)), with ``plus`` added if there is one; and x.

    Who goes on with the x that comes out saves the addition of two gradients.

    Shape: x (N, c_in, H, W), plus (N, c_out, H, W) -> y (N, c_out, H, W), x.
    """
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
    return _Joined.apply(x, plus, norm.weight, norm.bias, conv.weight, norm)
