"""BN and ReLU as one operation in training: fewer passes over memory, and less of it kept.

Only x is kept for backward. The mask of ReLU is recomputed from it. Inside ``forgetting()`` so is
the output, for the backward pass of the following convolution: if a tensor has a function that
recomputes it (``remember``), only that function is kept there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetv2_cli import native

LANES, MOST = 16, 4096  # channels: a multiple of the first, at most the second (vectors.h)
NOWHERE, BEFORE, AFTER = 0, 1, 2  # where ReLU is: before or after the addition (kernels.c)
ONE_VALUE = "Expected more than 1 value per channel when training"  # PyTorch's words
_AGAIN = "_resnetv2_again"  # of a tensor: the function that recomputes it, and its version then
Kept = Tensor | Callable[[], Tensor]


def fits(x: Tensor, norm: nn.BatchNorm2d | None) -> bool:
    """Whether the compiled functions can take x: on a CPU, not empty, channels last, bf16 or
    float32.

    On the meta device, where memory is counted, layout and the weights' type do not matter.
    """
    lies = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return (
        x.numel() > 0
        and (x.is_meta or (lies and (norm is None or norm.weight.dtype == torch.float32)))
        and native.kind_of(x.dtype) is not None
        and x.shape[1] % LANES == 0
        and x.shape[1] <= MOST
        and (norm is None or norm.num_features == x.shape[1])
        and native.library() is not None
    )


def _call(name: str, dtype: torch.dtype, tensors: list[Tensor], *numbers: float) -> None:
    native.call(f"{name}_{native.kind_of(dtype)}", tensors, *numbers)


def made_again(tensor: Tensor) -> Callable[[], Tensor] | None:
    """The function that recomputes this tensor; None if it has none, or has been written to
    since."""
    again, version = getattr(tensor, _AGAIN, (None, None))
    return again if again is not None and tensor._version == version else None


def remember(tensor: Tensor, again: Callable[[], Tensor] | None) -> Tensor:
    """The tensor, with the function that recomputes it attached if there is one."""
    if again is not None:
        setattr(tensor, _AGAIN, (again, tensor._version))
    return tensor


def pack(tensor: Tensor) -> Kept:
    """The function that recomputes a tensor if it has one, else the tensor."""
    return made_again(tensor) or tensor.detach()


def unpack(kept: Kept) -> Tensor:
    """The tensor that ``pack`` was given."""
    return kept if isinstance(kept, Tensor) else kept()


def rows_of(x: Tensor) -> tuple[int, int]:
    """Rows (the pixels of all images) and channels."""
    n, c, h, w = x.shape
    return n * h * w, c


def spread(plus: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``plus`` broadcast to the shape of the sum, as PyTorch's addition does: a user's own shortcut
    may carry one number per channel. A tensor of that shape is returned itself, and so keeps the
    function that recomputes it."""
    return plus if plus.shape == shape else plus.expand(shape)


def _activated(x: Tensor, saved: Tensor, where: int) -> Tensor:
    y = torch.empty_like(x)
    _call("again", x.dtype, [x, y, saved], *rows_of(x), where, torch.get_num_threads())
    return y


class _Compiled(torch.autograd.Function):
    """By the functions of ``kernels.c``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plus: Tensor | None, gamma: Tensor, beta: Tensor, norm: Any, where: int
    ) -> Tensor:
        x = x.detach()  # x itself is kept: else each recomputation of y would recompute x too
        (rows, c), threads = rows_of(x), torch.get_num_threads()
        y, saved = torch.empty_like(x), torch.empty(4, c, device=x.device)
        sums = torch.empty(threads, 2, c, dtype=torch.float64)
        if plus is not None:
            plus = plus.to(x.dtype).contiguous(memory_format=torch.channels_last)
        running = [norm.running_mean, norm.running_var]
        tensors = [x, plus, y, gamma, beta, *running, saved, sums]
        _call("forward", x.dtype, tensors, rows, c, norm.momentum, norm.eps, where, threads)
        ctx.save_for_backward(x, saved, y if where == AFTER else None)
        ctx.where = where
        return y if plus is not None else remember(y, partial(_activated, x, saved, where))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, y = ctx.saved_tensors
        (rows, c), threads = rows_of(x), torch.get_num_threads()
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty(c), torch.empty(c)
        dplus = dy if y is None else torch.empty_like(x)
        sums = torch.empty(threads, 2, c, dtype=torch.float64)
        tensors = [dy, x, y, dx, dplus, saved, dgamma, dbeta, sums]
        _call("backward", x.dtype, tensors, rows, c, ctx.where, threads)
        return dx, dplus if ctx.needs_input_grad[1] else None, dgamma, dbeta, None, None


def _normalized(x: Tensor, mean: Tensor, inverse: Tensor, norm: Any, relu: bool) -> Tensor:
    variance = inverse**-2 - norm.eps
    y = nn.functional.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return y.relu_() if relu else y


class _Plain(torch.autograd.Function):
    """The same by PyTorch's own operations: slower, on any device and in any dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, norm: Any, relu: bool) -> Tensor:
        x, running = x.detach(), (norm.running_mean, norm.running_var)  # kept, as above
        y, mean, inverse = torch.native_batch_norm(
            x, gamma, beta, *running, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(x, gamma, mean, inverse)
        ctx.again = partial(_normalized, x, mean, inverse, norm, relu)
        ctx.eps, ctx.relu = norm.eps, relu
        return remember(y.relu_() if relu else y, ctx.again)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, inverse = ctx.saved_tensors
        if ctx.relu:
            dy = torch.ops.aten.threshold_backward(dy, ctx.again(), 0)
        wanted = [True, True, True]
        gradients = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, inverse, True, ctx.eps, wanted
        )
        return *gradients, None, None


def count(x: Tensor, norm: nn.BatchNorm2d) -> None:
    """Count another batch that passes BN.

    Raises:
        ValueError: as PyTorch's BN: the variance of one value is undefined, and would stay in the
            running statistics.
    """
    if rows_of(x)[0] == 1:
        raise ValueError(f"{ONE_VALUE}, got input size {x.shape}")
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]


def bn_relu(x: Tensor, norm: nn.BatchNorm2d, relu: bool, compiled: bool) -> Tensor:
    """BN with the batch's statistics, which update the running ones, and then ReLU if ``relu``.

    ``compiled``: by ``kernels.c``, for an x that ``fits``.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """
    count(x, norm)
    if compiled:
        return _Compiled.apply(x, None, norm.weight, norm.bias, norm, BEFORE if relu else NOWHERE)
    return _Plain.apply(x, norm.weight, norm.bias, norm, relu)


def bn_sum(x: Tensor, plus: Tensor, norm: nn.BatchNorm2d, where: int) -> Tensor:
    """BN(x) + plus by ``kernels.c``, for an x that ``fits``; with ReLU on BN(x) (``BEFORE``), on
    the sum (``AFTER``), or ``NOWHERE``.

    Shape: x (N, C, H, W), plus the same or broadcast to it -> (N, C, H, W).
    """
    count(x, norm)
    return _Compiled.apply(x, spread(plus, x.shape), norm.weight, norm.bias, norm, where)


@contextmanager
def forgetting() -> Iterator[None]:
    """Inside, autograd keeps of a tensor that can be recomputed only the function that does so."""
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
