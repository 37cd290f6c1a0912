"""Random color changes of training photographs.

Each change is linear in a pixel's color, plus a constant that depends on the image's mean color, so
all changes of an image are one matrix. It is computed where the image is decoded, and applied on
the training device. As in fb.resnet.torch, nothing is clipped at black or white.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetv2_cli.data.augment import Normalize

Floats = NDArray[np.floating]

# Principal components (columns) and eigenvalues of the colors, 0..1, of ImageNet's training images,
# from fb.resnet.torch. Along each component, AlexNet [21] adds a normal draw whose standard
# deviation is TINT times the eigenvalue.
COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
VALUES = np.array([0.2175, 0.0188, 0.0045])
TINT = 0.1
GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue
MOST = 0.4  # largest relative change of brightness, contrast or saturation by jitter


def change(image: Tensor, color: str, g: torch.Generator) -> Tensor:
    """A random change of an image's colors. ``lighting``: AlexNet's tint; ``jitter``: the same tint
    after fb.resnet.torch's changes of brightness, contrast and saturation, in random order.

    Shape: (H, W, 3) uint8 -> (3, 4) float32, by which [red, green, blue, 1], 0..255, is multiplied.
    """
    matrix: Floats = np.eye(3, 4)  # NumPy, because it is fast with few numbers
    if color == "jitter":
        mean = np.append(image.flatten(0, 1).float().mean(0).numpy(), 1)
        draws = torch.rand(3, generator=g).tolist()
        for which in torch.randperm(3, generator=g).tolist():
            matrix = blended(matrix, which, 1 + MOST * (2 * draws[which] - 1), mean)
    matrix[:, 3] += 255 * COMPONENTS @ (VALUES * TINT * torch.randn(3, generator=g).numpy())
    return torch.from_numpy(matrix.astype(np.float32))


def blended(matrix: Floats, which: int, factor: float, mean: Floats) -> Floats:
    """``matrix`` followed by a change of brightness (0), contrast (1) or saturation (2): the color
    times ``factor``, plus 1 - ``factor`` times black, the image's mean grey, or the pixel's grey.

    Shape: matrix (3, 4); mean (4,), the image's mean color before any change, and 1 -> (3, 4).
    """
    blend = factor * matrix
    grey = GREY @ matrix  # maps a pixel's original color to the grey of its changed color
    if which == 1:
        blend[:, 3] += (1 - factor) * (grey @ mean)
    elif which == 2:
        blend += (1 - factor) * grey
    return blend


def recolored(normalize: Normalize, images: Tensor, changes: Tensor) -> Tensor:
    """The batch that a network trains on: photographs with changed colors, normalized.

    Shape: images (N, H, W, 3) uint8, changes (N, 3, 4) -> (N, 3, H, W) float32, channels last.
    """
    pixels = images.flatten(1, 2).float()
    with torch.autocast(images.device.type, enabled=False):
        changed = torch.baddbmm(changes[:, None, :, 3], pixels, changes[:, :, :3].mT)
    return normalize(changed.reshape(images.shape))
