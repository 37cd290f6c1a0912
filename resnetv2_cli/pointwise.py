"""BN, ReLU and the 1x1 convolution of stride 1 behind them as one operation, in training, on bf16.

What is activated is neither written to memory nor kept. A bottleneck's wide tensors are passed over
as often as its narrow ones are, and these passes are half of what a step takes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetv2_cli import native
from resnetv2_cli.fused import LANES, fits, rows_of

LAST = torch.channels_last
MOST = 2**17  # weights; PyTorch's own is as fast from 2**18 on, where they no longer lie in a cache


def joins(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Module) -> bool:
    """Whether BN-ReLU of x and this convolution can be one operation: bf16 by autocast on a CPU."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
        and conv.out_channels % LANES == 0
        and conv.weight.numel() <= MOST
        and conv.weight.is_contiguous()
        and x.dtype == torch.bfloat16
        and (x.is_meta or (conv.weight.dtype == torch.float32 and _mixed()))
        and fits(x, norm)
        and native.multiplies()
    )


def _mixed() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


class _Pointwise(torch.autograd.Function):
    """By the functions of ``pointwise.c``. x comes out again: its gradient is added as dx is
    written."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plus: Tensor | None, gamma: Tensor, beta: Tensor, w: Tensor, norm: Any
    ) -> tuple[Tensor, Tensor]:
        (rows, c), n, threads = rows_of(x), w.shape[0], torch.get_num_threads()
        y = torch.empty(
            x.shape[0], n, *x.shape[2:], dtype=x.dtype, device=x.device, memory_format=LAST
        )
        saved = torch.empty(4, c, device=x.device)
        sums, packed = (
            torch.empty(threads, 2, c, dtype=torch.float64),
            torch.empty(n, c, dtype=x.dtype),
        )
        if plus is not None:
            plus = plus.to(y.dtype).contiguous(memory_format=LAST)
        running = [norm.running_mean, norm.running_var]
        tensors = [x, plus, y, gamma, beta, w, *running, saved, sums, packed]
        numbers = [rows, c, n, norm.momentum, norm.eps, threads]
        native.call("pointwise_forward", tensors, *numbers)
        ctx.save_for_backward(x, saved, w)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, plus: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return plus, None, None, None, None, None
        x, saved, w = ctx.saved_tensors
        (rows, c), n, threads = rows_of(x), w.shape[0], torch.get_num_threads()
        dy = dy.to(x.dtype).contiguous(memory_format=LAST)
        if plus is not None:
            plus = plus.to(x.dtype).contiguous(memory_format=LAST)
        dx, dw, dgamma, dbeta = torch.empty_like(x), torch.empty_like(w), *torch.empty(2, c)
        sums, packed = (
            torch.empty(threads, 2, c, dtype=torch.float64),
            torch.empty(n, c, dtype=x.dtype),
        )
        parts = torch.empty(threads - 1, n, c)
        tensors = [dy, x, plus, dx, saved, w, dgamma, dbeta, dw, parts, sums, packed]
        native.call("pointwise_backward", tensors, rows, c, n, threads)
        return dx, dy if ctx.needs_input_grad[1] else None, dgamma, dbeta, dw, None


def bn_relu_conv(
    x: Tensor, plus: Tensor | None, norm: nn.BatchNorm2d, conv: nn.Conv2d
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(BN(x)), with ``plus`` added if there is one; and x.

    Who goes on with the x that comes out saves the addition of two gradients.

    Shape: x (N, c_in, H, W), plus (N, c_out, H, W) -> y (N, c_out, H, W), x.
    """
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
    return _Pointwise.apply(x, plus, norm.weight, norm.bias, conv.weight, norm)
