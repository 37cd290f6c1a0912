"""Normalization and augmentation of whole batches, on the training device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetv2_cli.data.images import Split
from resnetv2_cli.data.order import PAD


def statistics(split: Split, normalize: str) -> tuple[Tensor, Tensor]:
    """mean and std of images scaled to 0..1. ``pixel-mean``: (3, 32, 32) and 1, as in [1], which
    subtracts the mean image; ``channel``: (3, 1, 1) each, as in the released Torch code."""
    pixel = torch.from_numpy(split.images.mean(0, dtype=np.float64) / 255).permute(2, 0, 1)
    mean = pixel.mean((1, 2), keepdim=True)
    if normalize == "pixel-mean":
        return pixel.float(), torch.ones(1, 1, 1)
    counts = np.stack([np.bincount(split.images[..., c].ravel(), minlength=256) for c in range(3)])
    squares = torch.from_numpy(counts * (np.arange(256) / 255) ** 2).sum(1) / counts[0].sum()
    return mean.float(), (squares[:, None, None] - mean**2).sqrt().float()


def take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook that runs before ``state`` is loaded, and gives the buffers its shapes: preprocessing
    belongs to the weights, whether they come with a mean image or with channel means."""
    for name, own in list(module.named_buffers()):
        if (given := state.get(prefix + name)) is not None and given.shape != own.shape:
            module.register_buffer(name, own.new_empty(given.shape))


class Normalize(nn.Module):
    """(x / 255 - mean) / std in channels-last layout; mean and std are saved in checkpoints.

    Shape: (N, H, W, 3) uint8 -> (N, 3, H, W) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_load_state_dict_pre_hook(take_shapes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype) - 255 * self.mean
        return x.div_(255 * self.std)  # in place: a batch of photographs takes a lot of memory


def augmented(normalize: Normalize, images: Tensor, views: Tensor) -> Tensor:
    """The batch that a network trains on: normalized, cropped and flipped.

    Shape: images (N, H, W, 3) uint8, views (N, 3) -> (N, 3, H, W) float32, channels last.
    """
    return crop_and_flip(normalize(images), views)


def in_one(normalize: Normalize, images: Tensor, views: Tensor) -> Tensor:
    """``augmented`` as one GPU kernel, for images held in memory.

    Raises:
        ImportError: Triton is not installed.
    """
    from resnetv2_cli import triton_augment

    return triton_augment.augmented(images, views, normalize.mean, normalize.std, PAD)


def crop_and_flip(x: Tensor, views: Tensor) -> Tensor:
    """Pad by 4 zeros on each side, crop at (top, left) and mirror where flip is 1.

    It comes after normalization, as in fb.resnet.torch, so that zero padding is the mean color.

    Shape: x (N, C, H, W), views (N, 3) of top and left in 0..8 and flip in 0..1 -> (N, C, H, W).
    """
    n, c, h, w = x.shape
    top, left, flip = views[:, :, None].unbind(1)
    across = torch.arange(w, device=x.device)
    rows = torch.arange(h, device=x.device) + top
    columns = torch.where(flip.bool(), w - 1 - across, across) + left
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, PAD, PAD, PAD, PAD))
    image = torch.arange(n, device=x.device)[:, None] * (h + 2 * PAD)
    pixels = (image + rows)[:, :, None] * (w + 2 * PAD) + columns[:, None, :]
    cropped = padded.reshape(-1, c).index_select(0, pixels.reshape(-1))
    return cropped.reshape(n, h, w, c).permute(0, 3, 1, 2)
