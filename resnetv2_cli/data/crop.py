"""Crops of a picture, resized in the same way whatever the file's format. Of a JPEG, only what they
need is decoded, at the smallest scale that suffices.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional as F

from resnetv2_cli.data import picture, turbo
from resnetv2_cli.data.turbo import Box

PIXELS = b"\x93NUMPY"  # the first bytes of an array that NumPy saved
SCALES = (8, 4, 2, 1)  # a JPEG can be decoded at 1 over each of these

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Choose = Callable[[int, int], list[Rectangle]]  # takes a picture's width and height


class Settled(NamedTuple):
    """Crops in whole pixels of the picture at 1/``scale`` of its size."""

    boxes: list[Box]
    scale: int

    @property
    def around(self) -> Box:
        """The smallest box that contains all of them."""
        sides = list(zip(*self.boxes, strict=True))
        return Box(min(sides[0]), min(sides[1]), max(sides[2]), max(sides[3]))


def settled(
    chosen: list[Rectangle], size: tuple[int, int], side: int, scales: tuple[int, ...] = SCALES
) -> Settled:
    """Crops at the smallest scale at which each still has ``side`` pixels a side, so that none is
    enlarged unless it would be at full scale too. ``size``: width and height of the picture."""
    least = min(min(right - left, bottom - top) for left, top, right, bottom in chosen)
    scale = next((s for s in scales if least >= s * side), 1)

    def whole(low: float, high: float, most: int) -> tuple[int, int]:
        length = min(max(1, round((high - low) / scale)), most)
        start = min(max(0, round(low / scale)), most - length)
        return start, start + length

    boxes = []
    for left, top, right, bottom in chosen:
        across = whole(left, right, size[0] // scale)
        down = whole(top, bottom, size[1] // scale)
        boxes.append(Box(across[0], down[0], across[1], down[1]))
    return Settled(boxes, scale)


def crops(content: bytes, name: str, choose: Choose, side: int) -> Tensor:
    """The crops of an encoded picture that ``choose`` returns, resized to ``side``: bicubic,
    antialiased.

    Shape: (crops, side, side, 3) uint8.

    Raises:
        Unreadable: it cannot be read as an image; the message names it.
    """
    if content.startswith(PIXELS):
        whole = picture.saved_pixels(content, name)
        plan = settled(choose(whole.shape[1], whole.shape[0]), whole.shape[1::-1], side, (1,))
        box = plan.around
        return resized(whole[box.top : box.bottom, box.left : box.right].copy(), plan, side)
    jpeg = turbo.plain(content, Image.MAX_IMAGE_PIXELS or 0)
    if jpeg is not None:
        plan = settled(choose(*jpeg.size), jpeg.size, side)
        found = jpeg.region(plan.around, plan.scale)
        if found is not None:
            return resized(found, plan, side)
    with picture.opened(content, name) as image:
        size = image.size
        plan = settled(choose(*size), size, side, SCALES if is_jpeg(image) else (1,))
        if plan.scale > 1:
            image.draft(None, (size[0] // plan.scale, size[1] // plan.scale))
        box = plan.around
        found = np.array(picture.converted(image))[box.top : box.bottom, box.left : box.right]
    return resized(found, plan, side)


def is_jpeg(image: Image.Image) -> bool:
    """Whether an image can be decoded at a smaller scale."""
    return isinstance(image, JpegImageFile)


def resized(pixels: NDArray[np.uint8], plan: Settled, side: int) -> Tensor:
    """Each crop of ``plan``, resized, from the pixels of the box around them all.

    Shape: (height, width, 3) -> (crops, side, side, 3).
    """
    x = torch.from_numpy(pixels[None]).permute(0, 3, 1, 2)
    around = plan.around
    made = []
    for box in plan.boxes:
        rows = slice(box.top - around.top, box.bottom - around.top)
        columns = slice(box.left - around.left, box.right - around.left)
        # A copy has the strides of a channels-last tensor, which a view into a larger picture
        # lacks: resizing a copy is twice as fast, and keeps the layout.
        crop = x[..., rows, columns].clone(memory_format=torch.channels_last)
        small = F.interpolate(crop, (side, side), mode="bicubic", antialias=True)
        made.append(small.permute(0, 2, 3, 1))
    return torch.cat(made)
