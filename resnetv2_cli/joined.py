"""BN, ReLU and the following convolution as one operation; or a convolution alone, or after a ReLU.

The activated tensor is neither written to memory nor kept. With convolutions that use the processor
well, the passes over memory between them take half of a step.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetv2_cli import native
from resnetv2_cli.fused import LANES, count, fits, made_again, pack, remember, spread, unpack

LAST = torch.channels_last
# Most weights; with more, PyTorch's own convolution is as fast. For a CPU: by floats per vector.
MOST = {"cuda": 2**17, 16: 2**18, 8: 2**16}
MOST_BY_WINOGRAD = {16: 2**18, 8: 2**20}
# Most bytes of an image with its border, which a thread keeps: conv3x3.c in a cache.
KEPT = {"conv3x3": 2**18, "winograd": 2**26, "patches": 2**26}
EACH = 8  # one in so many sums along a shortcut is kept, where the others are recomputed


def joins(x: Tensor, norm: nn.BatchNorm2d | None, conv: nn.Module) -> bool:
    """Whether this convolution of x, after BN and ReLU, ReLU or neither, can be one operation: in
    bf16 by autocast, on a CPU that multiplies bf16 or a GPU with Triton; in float32 on a CPU."""
    return (
        type(conv) is nn.Conv2d
        and x.dim() == 4
        and x.shape[1] == conv.in_channels
        and _square(conv.kernel_size)
        and _square(conv.stride)
        and conv.kernel_size[0] % 2 == 1
        and conv.padding == tuple(k // 2 for k in conv.kernel_size)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
        and conv.bias is None
        and (x.is_meta or _lies(x, conv.weight))
        and (_fits_gpu(x, norm, conv) if x.is_cuda else _fits_cpu(x, norm, conv))
    )


def _square(sides: Sequence[int]) -> bool:
    return len(set(sides)) == 1


def _part(x: Tensor, w: Tensor, stride: int) -> str:
    """The file of C functions that compute it."""
    if stride > 1:
        return "patches"
    if w.shape[-1] == 1:
        return "pointwise"
    tiles = x.dtype == torch.bfloat16 and native.has("conv3x3_forward_bf16")  # AMX
    return "conv3x3" if tiles else "winograd"


def _fits_gpu(x: Tensor, norm: nn.BatchNorm2d | None, conv: nn.Conv2d) -> bool:
    small = x.dtype == torch.bfloat16 and conv.weight.numel() <= MOST["cuda"]
    return small and _on_gpu() is not None and _on_gpu().joins(x, norm, conv)


def _fits_cpu(x: Tensor, norm: nn.BatchNorm2d | None, conv: nn.Conv2d) -> bool:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    part = _part(x, conv.weight, stride)
    most = MOST_BY_WINOGRAD if part == "winograd" else MOST
    return (
        conv.out_channels % LANES == 0
        and conv.weight.numel() <= most.get(native.lanes(), 0)
        # PyTorch's are as fast for large kernels of stride 1, and where pixels are skipped that no
        # BN needs either.
        and (kernel <= 3 or stride > 1)
        and (kernel >= stride or norm is not None)
        and _images_fit(x, conv, part)
        and fits(x, norm)
        and native.multiplies(x.dtype)
    )


@cache
def _on_gpu() -> Any:
    """The module of functions for a GPU; None without Triton."""
    try:
        from resnetv2_cli import triton_joined
    except ImportError:
        return None
    return triton_joined


def by_itself(kernels: str, device: str) -> bool:
    """Whether a network without torch.compile uses these operations on a type of device when it is
    run call by call. On a GPU only replays of CUDA graphs do, which is where they were measured."""
    return kernels == "auto" and device == "cpu"


def why_not(device: torch.device) -> str:
    """Why a device has none of these operations; empty if it has."""
    if device.type == "cuda":
        return "" if _on_gpu() else "there is no Triton"
    return native.why_not()


def _images_fit(x: Tensor, conv: nn.Conv2d, part: str) -> bool:
    """Whether the functions of a file can compute these images, and fast. Except in pointwise.c,
    threads take whole images, so that PyTorch evaluates fewer images than threads; in training as
    much is kept for backward whatever their number."""
    if part == "pointwise":
        return True
    (h, w), border = x.shape[2:], conv.kernel_size[0] - 1
    c = conv.in_channels if part == "patches" else max(conv.in_channels, conv.out_channels)
    size = x.itemsize if part == "conv3x3" else 4
    return (
        (part != "conv3x3" or w % 8 == 0)
        and (h + border) * (w + border) * c * size <= KEPT[part]
        and (torch.is_grad_enabled() or len(x) >= torch.get_num_threads())
    )


def _lies(x: Tensor, weight: Tensor) -> bool:
    last = weight.is_contiguous(memory_format=LAST)
    return weight.dtype == torch.float32 and last and x.dtype == _arithmetic(x.device.type)


def _arithmetic(kind: str) -> torch.dtype:
    """The dtype that a convolution would compute in."""
    mixed = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if mixed else torch.float32


class Sum:
    """Recomputes x_l + F(x_l), by the last convolution of F alone, from an x_l that may be such a
    sum itself. That x_l is kept until backward asks for it, which it does next."""

    def __init__(self, plus: Tensor, added_to: Callable[[Tensor], Tensor]) -> None:
        self.plus, self.added_to = pack(plus), added_to
        self.length: int = 1 + (self.plus.length if isinstance(self.plus, Sum) else 0)
        self.made: Tensor | None = None

    @classmethod
    def of(cls, plus: Tensor, added_to: Callable[[Tensor], Tensor]) -> Self | None:
        """The function for a sum; None for one that is kept, from which the next are recomputed."""
        made = cls(plus, added_to)
        return made if made.length < EACH else None

    def __call__(self) -> Tensor:
        made, self.made = self._stays(), None
        return made

    def _stays(self) -> Tensor:
        if self.made is None:
            plus = self.plus._stays() if isinstance(self.plus, Sum) else unpack(self.plus)
            self.made = self.added_to(plus)
        return self.made


def _forward(
    x: Tensor,
    plus: Tensor | None,
    w: Tensor,
    saved: Tensor,
    own: list[Tensor | None],
    numbers: tuple[float, float],
    stride: int,
    again: bool = False,
) -> Tensor:
    """y; ``saved`` is written, or read if y is computed ``again``. ``own``: BN's parameters and
    running statistics; ``numbers``: its momentum and eps.

    Shape: x (N, c_in, H, W), plus as y, w (c_out, c_in, k, k), saved (5, c_in) -> y
    (N, c_out, H/stride, W/stride).
    """
    if x.is_cuda:
        return _on_gpu().forward(x, plus, w, saved, own, numbers, again)
    threads = torch.get_num_threads()
    shape = _shape(x, w, stride)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=LAST)
    sums = torch.empty(threads, 2, x.shape[1], dtype=torch.float64)
    tensors = [x, plus, y, *own[:2], w, *own[2:], saved, sums]
    _call("forward", tensors, x, w, stride, *numbers, threads, again)
    return y


def _shape(x: Tensor, w: Tensor, stride: int) -> tuple[int, ...]:
    """The shape of y."""
    return len(x), len(w), *((side - 1) // stride + 1 for side in x.shape[2:])


def _call(
    way: str, tensors: list[Tensor | None], x: Tensor, w: Tensor, stride: int, *numbers: float
) -> None:
    """Call the library's function for this convolution."""
    part, (images, c, *sides), n, kernel = _part(x, w, stride), x.shape, len(w), w.shape[-1]
    taps = 36 if part == "winograd" else kernel**2
    packed = torch.empty(taps, c, n, dtype=torch.float32)  # room for weights as functions read them
    sizes = [images, *sides, c, n, kernel, stride][: native.SIZES[part]]
    name = f"{part}_{way}_{native.kind_of(x.dtype)}"
    native.call(name, [*tensors, packed], *sizes, *numbers)


def _added(x: Tensor, saved: Tensor, w: Tensor, stride: int, plus: Tensor | None) -> Tensor:
    """The y of ``_Joined``, from x, plus and the statistics that it saved."""
    if plus is not None:
        plus = plus.to(x.dtype).contiguous(memory_format=LAST)
    return _forward(x, plus, w, saved, [None] * 4, (0.0, 0.0), stride, again=True)


class _Joined(torch.autograd.Function):
    """The operation by the functions in C or those of ``triton_joined.py``. It also returns x,
    so that the gradient from x's other use is added as dx is written. Without ``norm``, gamma and
    beta there is no BN, and no ReLU unless ``relu``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plus: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        w: Tensor,
        norm: Any,
        relu: bool,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        if plus is not None:
            plus = plus.to(x.dtype).contiguous(memory_format=LAST)
        w = w.to(x.dtype) if x.is_cuda else w  # the functions for a CPU cast and pack them
        if norm is None:
            saved = _unchanged(x.shape[1], relu, x.device)
            y = _added(x, saved, w, stride, plus)
        else:
            saved = torch.empty(5, x.shape[1], device=x.device, dtype=torch.float32)
            own = [gamma, beta, norm.running_mean, norm.running_var]
            y = _forward(x, plus, w, saved, own, (norm.momentum, norm.eps), stride)
        ctx.alone, ctx.stride = norm is None, stride
        ctx.save_for_backward(x, saved, w)
        ctx.set_materialize_grads(False)
        if plus is not None and ctx.needs_input_grad[1]:
            remember(y, Sum.of(plus, partial(_added, x.detach(), saved, w.detach(), stride)))
        return y, remember(x.view_as(x), made_again(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, plus: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return plus, *[None] * 7
        x, saved, w = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=LAST)
        if plus is not None:
            plus = plus.to(x.dtype).contiguous(memory_format=LAST)
        back = _on_gpu().backward if x.is_cuda else partial(_backward, ctx.stride)
        dx, dw, of_bn = back(dy, x, plus, saved, w, ctx.alone)
        return dx, dy if ctx.needs_input_grad[1] else None, *of_bn, dw, None, None, None


def _backward(
    stride: int,
    dy: Tensor,
    x: Tensor,
    plus: Tensor | None,
    saved: Tensor,
    w: Tensor,
    alone: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """dx with ``plus`` added, dW, dgamma and dbeta; these two are None if ``alone``, without BN.

    Shape: dy (N, c_out, H/stride, W/stride), x and plus (N, c_in, H, W), saved (5, c_in), w (c_out,
    c_in, k, k) -> dx as x, dW as w, both others (c_in,).
    """
    c, threads = x.shape[1], torch.get_num_threads()
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    dgamma, dbeta = torch.empty(2, c, dtype=torch.float32)
    sums = torch.empty(threads, 2, c, dtype=torch.float64)
    parts = torch.empty(threads - 1, *w.shape, dtype=torch.float32)
    tensors = [dy, x, plus, dx, saved, w, dgamma, dbeta, dw, parts, sums]
    _call("backward", tensors, x, w, stride, threads, alone)
    return dx, dw, (None, None) if alone else (dgamma, dbeta)


def bn_relu_conv(
    x: Tensor, plus: Tensor | None, norm: nn.BatchNorm2d | None, relu: bool, conv: nn.Conv2d
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(BN(x)), of relu(x) or of x, with ``plus`` added if there is one; and
    x. BN uses the batch's statistics in training, and its running ones in evaluation, which has no
    gradient.

    A caller that uses the returned x in place of its own saves the addition of two gradients.

    Shape: x (N, c_in, H, W), plus as y or broadcast to it -> y (N, c_out, H/stride, W/stride), x.
    """
    stride = conv.stride[0]
    if plus is not None:
        plus = spread(plus, _shape(x, conv.weight, stride))
    if norm is None:
        return _Joined.apply(x, plus, None, None, conv.weight, None, relu, stride)
    if not norm.training:
        return _added(x, _running(norm), conv.weight, stride, plus), x
    count(x, norm)
    return _Joined.apply(x, plus, norm.weight, norm.bias, conv.weight, norm, True, stride)


def _running(norm: Any) -> Tensor:
    """Mean, 1 / std, scale, shift and least from the running statistics, laid out as a training
    pass saves them."""
    inverse = (norm.running_var + norm.eps).rsqrt()
    scale = norm.weight * inverse
    shift = norm.bias - norm.running_mean * scale
    return torch.stack([norm.running_mean, inverse, scale, shift, torch.zeros_like(shift)])


@cache
def _unchanged(channels: int, relu: bool, device: torch.device) -> Tensor:
    """The same without BN, for ReLU or for nothing. For nothing ``least`` is a NaN on a CPU, so
    that the gradient passes at -inf too."""
    least = 0.0 if relu else -math.inf if device.type == "cuda" else math.nan
    with torch.inference_mode(False):  # it is cached, and saved for later backward passes
        rows = torch.tensor([0.0, 1.0, 1.0, 0.0, least], device=device)
        return rows[:, None].repeat(1, channels)
