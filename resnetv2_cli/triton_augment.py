"""Normalization, crop and flip of a batch as one kernel for a GPU, in Triton.

In PyTorch they are some twenty launches, for a tensor that a GPU writes in a few microseconds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers that a program writes


@triton.jit
def _augmented(
    images, views, mean, std, x, numbers, mean_c, mean_h, mean_w, std_c, std_h, std_w,
    H: tl.constexpr, W: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (N, H, W, 3): each number from the pixel that its view shows, 0 beyond the image."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < numbers
    c, column, row, n = i % 3, i // 3 % W, i // (3 * W) % H, i // (3 * W * H)
    top = tl.load(views + 3 * n, mask=real, other=0).to(tl.int32)
    left = tl.load(views + 3 * n + 1, mask=real, other=0).to(tl.int32)
    flip = tl.load(views + 3 * n + 2, mask=real, other=0) != 0
    h = row + top - PAD
    w = tl.where(flip, W - 1 - column, column) + left - PAD
    inside = real & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    pixel = tl.load(images + ((n * H + h) * W + w) * 3 + c, mask=inside, other=0).to(tl.float32)
    m = tl.load(mean + c * mean_c + h * mean_h + w * mean_w, mask=inside, other=0.0)
    s = tl.load(std + c * std_c + h * std_h + w * std_w, mask=inside, other=1.0)
    normal = tl.div_rn(pixel - 255 * m, 255 * s)
    tl.store(x + i, tl.where(inside, normal, 0.0), mask=real)


def augmented(images: Tensor, views: Tensor, mean: Tensor, std: Tensor, pad: int) -> Tensor:
    """As ``augment.in_one``, with the mean and std of ``Normalize``, (3, H, W) or (3, 1, 1)."""
    n, h, w, c = images.shape
    x = torch.empty(n, h, w, c, device=images.device)
    mean, std = mean.expand(c, h, w), std.expand(c, h, w)
    _augmented[(triton.cdiv(x.numel(), BLOCK),)](
        images, views, mean, std, x, x.numel(), *mean.stride(), *std.stride(), h, w, pad, BLOCK
    )
    return x.permute(0, 3, 1, 2)
