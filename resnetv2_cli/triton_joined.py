"""The functions of ``pointwise.c`` and ``conv3x3.c`` for a GPU, in Triton: BN, ReLU and the
following convolution of stride 1, forward and backward, on bf16 laid out channels last.

With narrow convolutions the cuDNN and BN kernels of a network leave a GPU idle: each small tensor
is read and written by ten of them. Here x is activated as it is loaded, once for each tap. Many
programs share a sum over pixels; their parts are added up in a fixed order, for the same bits each
time.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 128  # that share the rows of a sum, about one for each multiprocessor of an H100
NUMBERS = 4096  # in a block, half as many for the gradient: both as measured on an H200
SUMS = 8192  # numbers that one program adds up at a time
LARGEST = 2**31  # limit of the numbers in a tensor, as offsets have 32 bits
# Triton's interpreter, which needs no GPU, would multiply the bits of bf16 as integers.
DOT = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16


@triton.jit
def _at_least(least, z):
    """The maximum; a NaN stays one, so that it shows in the loss."""
    return tl.maximum(z, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _dot(left, right, DOT: tl.constexpr):
    return tl.dot(left.to(DOT), right.to(DOT))


@triton.jit
def _activated(x, scale, shift, least, inside):
    """max(scale x + shift, least) as bf16, and 0 outside the image."""
    z = _at_least(least, x.to(tl.float32) * scale + shift)
    return tl.where(inside, z, 0.0).to(tl.bfloat16)


@triton.jit
def _neighbours(rows, dr, dc, H: tl.constexpr, W: tl.constexpr, N_ROWS):
    """The rows of the pixels at (+dr, +dc), and which of these are inside their image."""
    h, w = rows % (H * W) // W + dr, rows % W + dc
    inside = (rows < N_ROWS) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return rows + dr * W + dc, inside


@triton.jit
def _moments(x, parts, N_ROWS, C: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """parts (PARTS, 2, C): sums of x - origin and of its square; origin is the first row."""
    c, at = tl.arange(0, C), tl.program_id(0)
    origin = tl.load(x + c).to(tl.float32)
    s, q = tl.zeros((BLOCK, C), tl.float32), tl.zeros((BLOCK, C), tl.float32)
    for first in range(at * BLOCK, N_ROWS, PARTS * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = (rows < N_ROWS)[:, None]
        v = tl.load(x + rows[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, v - origin, 0.0)
        s += d
        q += d * d
    tl.store(parts + at * 2 * C + c, tl.sum(s, 0))
    tl.store(parts + at * 2 * C + C + c, tl.sum(q, 0))


@triton.jit
def _statistics(
    parts, x, gamma, beta, running_mean, running_var, saved, N_ROWS, momentum, eps,
    C: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write saved (5, C): mean, 1 / std, scale, shift, least; and update the running statistics."""
    c, p = tl.arange(0, C), tl.arange(0, ROOM)
    origin, g, b = tl.load(x + c).to(tl.float32), tl.load(gamma + c), tl.load(beta + c)
    old_mean, old_var = tl.load(running_mean + c), tl.load(running_var + c)
    s, q = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for first in tl.static_range(0, PARTS, ROOM):
        at = parts + (first + p)[:, None] * 2 * C + c
        s += tl.sum(tl.load(at), 0)
        q += tl.sum(tl.load(at + C), 0)
    off = s / N_ROWS
    var = _at_least(0.0, q / N_ROWS - off * off)
    mean, inverse = origin + off, 1 / tl.sqrt(var + eps)
    scale = g * inverse
    tl.store(saved + c, mean)
    tl.store(saved + C + c, inverse)
    tl.store(saved + 2 * C + c, scale)
    tl.store(saved + 3 * C + c, b - mean * scale)
    tl.store(saved + 4 * C + c, tl.zeros((C,), tl.float32))
    tl.store(running_mean + c, old_mean + momentum * (mean - old_mean))
    tl.store(running_var + c, old_var + momentum * (var * N_ROWS / (N_ROWS - 1) - old_var))


@triton.jit
def _forward(
    x, plus, y, w, saved, N_ROWS, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    TAPS: tl.constexpr, DOT: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """y = a * W + plus; w: (N, TAPS, C) in bf16."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BC)
    total, side = tl.zeros((BLOCK, BN), tl.float32), TAPS // 9
    for c0 in range(0, C, BC):
        c = c0 + k
        scale, shift = tl.load(saved + 2 * C + c), tl.load(saved + 3 * C + c)
        least = tl.load(saved + 4 * C + c)
        for tap in tl.static_range(TAPS):
            at, inside = _neighbours(rows, tap // 3 - side, tap % 3 - side, H, W, N_ROWS)
            v = tl.load(x + at[:, None] * C + c, mask=inside[:, None], other=0.0)
            a = _activated(v, scale, shift, least, inside[:, None])
            total += _dot(a, tl.load(w + n * (TAPS * C) + tap * C + c[:, None]), DOT)
    at, real = rows[:, None] * N + n, (rows < N_ROWS)[:, None]
    if ADDS:
        total += tl.load(plus + at, mask=real, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(tl.bfloat16), mask=real)


@triton.jit
def _gradient(
    dy, w, x, g, parts, saved, N_ROWS, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    TAPS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """g = dy * W' where a > least; parts (blocks, 2, C): sums of g and of g (x - mean)."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    c, k = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BN)
    total, side = tl.zeros((BLOCK, BC), tl.float32), TAPS // 9
    for n0 in range(0, N, BN):
        n = n0 + k
        for tap in tl.static_range(TAPS):
            at, inside = _neighbours(rows, side - tap // 3, side - tap % 3, H, W, N_ROWS)
            d = tl.load(dy + at[:, None] * N + n, mask=inside[:, None], other=0.0)
            total += _dot(d, tl.load(w + n[:, None] * (TAPS * C) + tap * C + c), DOT)
    at, real = rows[:, None] * C + c, (rows < N_ROWS)[:, None]
    v = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    z = tl.load(saved + 2 * C + c) * v + tl.load(saved + 3 * C + c)
    total = tl.where(real & ~(z <= tl.load(saved + 4 * C + c)), total, 0.0)
    tl.store(g + at, total.to(tl.bfloat16), mask=real)
    tl.store(parts + block * 2 * C + c, tl.sum(total, 0))
    tl.store(parts + block * 2 * C + C + c, tl.sum(total * (v - tl.load(saved + c)), 0))


@triton.jit
def _slopes(
    parts, saved, slopes, dgamma, dbeta, blocks, N_ROWS, C: tl.constexpr, ROOM: tl.constexpr
):
    """slopes (2, C): slope and offset, of dx = scale g + slope x + offset; dgamma and dbeta."""
    c, p = tl.arange(0, C), tl.arange(0, ROOM)
    s, q = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for first in range(0, blocks, ROOM):
        there = (first + p < blocks)[:, None]
        at = parts + (first + p)[:, None] * 2 * C + c
        s += tl.sum(tl.load(at, mask=there, other=0.0), 0)
        q += tl.sum(tl.load(at + C, mask=there, other=0.0), 0)
    mean, inverse = tl.load(saved + c), tl.load(saved + C + c)
    scale = tl.load(saved + 2 * C + c)
    slope = -scale * inverse * inverse * q / N_ROWS
    tl.store(slopes + c, slope)
    tl.store(slopes + C + c, -scale * s / N_ROWS - slope * mean)
    tl.store(dgamma + c, q * inverse)
    tl.store(dbeta + c, s)


@triton.jit
def _normalized(
    g, x, plus, saved, slopes, numbers, C: tl.constexpr, BLOCK: tl.constexpr,
    ADDS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """dx = scale g + slope x + offset + plus, written over g."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, real = i % C, i < numbers
    d = tl.load(g + i, mask=real, other=0.0).to(tl.float32)
    if not ALONE:
        v = tl.load(x + i, mask=real, other=0.0).to(tl.float32)
        d = tl.load(saved + 2 * C + c) * d + tl.load(slopes + c) * v + tl.load(slopes + C + c)
    if ADDS:
        d += tl.load(plus + i, mask=real, other=0.0).to(tl.float32)
    tl.store(g + i, d.to(tl.bfloat16), mask=real)


@triton.jit
def _weights(
    dy, x, parts, saved, N_ROWS, H: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    TAPS: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """parts (PARTS, N, TAPS, C): dW = dy' * a, each over a part of the rows. The three taps of a
    row of the kernel are done at once: a stays in place, and dy is shifted."""
    part, tiles = tl.program_id(0), C // BC
    c = tl.program_id(2) % tiles * BC + tl.arange(0, BC)
    n = tl.program_id(2) // tiles * BN + tl.arange(0, BN)
    scale, shift = tl.load(saved + 2 * C + c), tl.load(saved + 3 * C + c)
    least = tl.load(saved + 4 * C + c)
    left, total = tl.zeros((BN, BC), tl.float32), tl.zeros((BN, BC), tl.float32)
    right = tl.zeros((BN, BC), tl.float32)
    dr = 1 - tl.program_id(1) if TAPS == 9 else 0
    for first in range(part * BLOCK, N_ROWS, PARTS * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        real = (rows < N_ROWS)[:, None]
        v = tl.load(x + rows[:, None] * C + c, mask=real, other=0.0)
        a = _activated(v, scale, shift, least, real)
        at, inside = _neighbours(rows, dr, 0, H, W, N_ROWS)
        d = tl.load(dy + at[:, None] * N + n, mask=inside[:, None], other=0.0)
        total += _dot(tl.trans(d), a, DOT)
        if TAPS == 9:
            at, inside = _neighbours(rows, dr, 1, H, W, N_ROWS)
            d = tl.load(dy + at[:, None] * N + n, mask=inside[:, None], other=0.0)
            left += _dot(tl.trans(d), a, DOT)
            at, inside = _neighbours(rows, dr, -1, H, W, N_ROWS)
            d = tl.load(dy + at[:, None] * N + n, mask=inside[:, None], other=0.0)
            right += _dot(tl.trans(d), a, DOT)
    to = parts + ((part * N + n[:, None]) * TAPS) * C + c
    if TAPS == 9:
        to += tl.program_id(1) * 3 * C
        tl.store(to, left)
        tl.store(to + C, total)
        tl.store(to + 2 * C, right)
    else:
        tl.store(to, total)


@triton.jit
def _added(parts, total, numbers, PARTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all parts."""
    i, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROOM)
    there = (p < PARTS)[:, None] & (i < numbers)
    s = tl.sum(tl.load(parts + p[:, None] * numbers + i, mask=there, other=0.0), 0)
    tl.store(total + i, s, mask=i < numbers)


def _shape(x: Tensor, w: Tensor, numbers: int = NUMBERS) -> dict[str, Any]:
    images, c, height, width = x.shape
    n, taps = w.shape[0], w.shape[2] * w.shape[3]
    return {
        "N_ROWS": images * height * width, "H": height, "W": width, "C": c, "N": n,
        "BC": min(c, 64), "BN": min(n, 64), "BLOCK": max(32, min(256, numbers // c)),
        "TAPS": taps, "DOT": DOT, "num_warps": 4,
    }  # fmt: skip


def joins(x: Tensor, norm: Any, conv: Any) -> bool:
    """Whether these functions can compute it: 1x1 or 3x3 of stride 1, x not empty, and powers of
    two as numbers of channels."""
    sides = (conv.in_channels, conv.out_channels)
    return (
        conv.stride == (1, 1)
        and conv.kernel_size in ((1, 1), (3, 3))
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(16 <= c <= 256 and c & (c - 1) == 0 for c in sides)
        and 0 < x.numel() // conv.in_channels * max(sides) < LARGEST
        and (norm is None or norm.weight.dtype == torch.float32)
    )


def forward(
    x: Tensor, plus: Tensor | None, w: Tensor, saved: Tensor, own: list[Any],
    numbers: tuple[float, float], again: bool = False,
) -> Tensor:  # fmt: skip
    """As ``joined._forward``; w: channels last."""
    s = _shape(x, w)
    c, rows = s["C"], s["N_ROWS"]
    if not again:
        parts = torch.empty(PROGRAMS, 2, c, device=x.device)
        _moments[(PROGRAMS,)](x, parts, rows, c, max(16, NUMBERS // c), PROGRAMS)
        room = min(PROGRAMS, max(16, SUMS // c))
        _statistics[(1,)](parts, x, *own, saved, rows, *numbers, c, PROGRAMS, room, num_warps=8)
    y = torch.empty_like(x[:, :1].expand(-1, s["N"], -1, -1), memory_format=torch.channels_last)
    grid = (triton.cdiv(rows, s["BLOCK"]), s["N"] // s["BN"])
    _forward[grid](x, y if plus is None else plus, y, w, saved, **s, ADDS=plus is not None)
    return y


def backward(
    dy: Tensor, x: Tensor, plus: Tensor | None, saved: Tensor, w: Tensor, alone: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """As ``joined._backward``; w: bf16, channels last."""
    s = _shape(x, w, NUMBERS // 2)
    rows, c, n, taps, numbers = s["N_ROWS"], s["C"], s["N"], s["TAPS"], x.numel()
    blocks = triton.cdiv(rows, s["BLOCK"])
    dx, dw = torch.empty_like(x), torch.empty_like(w, dtype=torch.float32)
    parts = torch.empty(blocks, 2, c, device=x.device)
    _gradient[(blocks, c // s["BC"])](dy, w, x, dx, parts, saved, **s)
    of_bn = torch.empty(4, c, device=x.device)  # slope and offset, dgamma and dbeta
    if not alone:
        room = max(16, SUMS // c)
        _slopes[(1,)](parts, saved, of_bn, of_bn[2], of_bn[3], blocks, rows, c, room, num_warps=8)
    if not alone or plus is not None:
        _normalized[(triton.cdiv(numbers, NUMBERS),)](
            dx, x, dx if plus is None else plus, saved, of_bn, numbers, c, NUMBERS,
            ADDS=plus is not None, ALONE=alone, num_warps=8,
        )  # fmt: skip
    tiles, groups = (c // s["BC"]) * (n // s["BN"]), 3 if taps == 9 else 1
    s = _shape(x, w)
    blocks = triton.cdiv(rows, s["BLOCK"])
    many = max(1, min(blocks, PROGRAMS, 8 * PROGRAMS // (groups * tiles)))
    sums = torch.empty(many, dw.numel(), device=x.device)
    _weights[(many, groups, tiles)](dy, x, sums, saved, **s, PARTS=many)
    room = triton.next_power_of_2(many)
    _added[(triton.cdiv(dw.numel(), 64),)](sums, dw, dw.numel(), many, room, 64)
    return dx, dw, (None, None) if alone else (of_bn[2], of_bn[3])
