"""Colors of training photographs, changed at random.

Every change is linear in a pixel's color, with a constant that the mean color of the image decides:
all of them are one matrix for an image, which is made where it is decoded and used on the device
that trains. Nothing is cut off at black or white, as nothing is in fb.resnet.torch.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetv2_cli.data.augment import Normalize

Floats = NDArray[np.floating]

# Of the colors of ImageNet's training images, 0..1, as fb.resnet.torch has them: AlexNet [21] adds
# a draw of standard deviation TINT times each value along its component, a column.
COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
VALUES = np.array([0.2175, 0.0188, 0.0045])
TINT = 0.1
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue
MOST = 0.4  # by which jitter changes brightness, contrast and saturation


def change(image: Tensor, color: str, g: torch.Generator) -> Tensor:
    """A random change of an image's colors: ``lighting``, AlexNet's tint; or before it ``jitter``,
    fb.resnet.torch's brightness, contrast and saturation, in random order.

    Shape: (H, W, 3) uint8 -> (3, 4) float32, by which [red, green, blue, 1], 0..255, is multiplied.
    """
    matrix: Floats = np.eye(3, 4)  # NumPy's, as it is fast with few numbers
    if color == "jitter":
        mean = np.append(image.flatten(0, 1).float().mean(0).numpy(), 1)
        draws = torch.rand(3, generator=g).tolist()
        for which in torch.randperm(3, generator=g).tolist():
            matrix = blended(matrix, which, 1 + MOST * (2 * draws[which] - 1), mean)
    matrix[:, 3] += 255 * COMPONENTS @ (VALUES * TINT * torch.randn(3, generator=g).numpy())
    return torch.from_numpy(matrix.astype(np.float32))


def blended(matrix: Floats, which: int, factor: float, mean: Floats) -> Floats:
    """A change of brightness (0), contrast (1) or saturation (2) after another: ``factor`` parts of
    the color, the rest black, the mean grey of the image, or the grey of the pixel.

    Shape: (3, 4), the mean color before all of them and 1 (4,) -> (3, 4).
    """
    blend = factor * matrix
    grey = GREY @ matrix  # what makes the grey of a pixel of the color that it had at first
    if which == 1:
        blend[:, 3] += (1 - factor) * (grey @ mean)
    elif which == 2:
        blend += (1 - factor) * grey
    return blend


def recolored(normalize: Normalize, images: Tensor, changes: Tensor) -> Tensor:
    """What a network trains on: photographs with other colors, normalized.

    Shape: images (N, H, W, 3) uint8, changes (N, 3, 4) -> (N, 3, H, W) float32, channels last.
    """
    pixels = images.flatten(1, 2).float()
    with torch.autocast(images.device.type, enabled=False):
        changed = torch.baddbmm(changes[:, None, :, 3], pixels, changes[:, :, :3].mT)
    return normalize(changed.reshape(images.shape))
