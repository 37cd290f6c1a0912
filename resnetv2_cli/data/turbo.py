"""The part of a JPEG that a crop needs, by TurboJPEG: what lies below it is not read, what lies
beside it is not transformed, and its scale is one of the transform: 1, 1/2, 1/4 or 1/8.

The library is the system one, or comes with the package ``turbojpeg``; version 3 or later, which
can crop. Plain files alone are read here: whoever gets None reads the file in another way.
"""

import ctypes
import threading
from ctypes.util import find_library
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DECOMPRESS = 1  # of tj3Init; what follows are parameters of tj3Get
SUBSAMPLING, WIDTH, HEIGHT, PRECISION, COLORS, PROGRESSIVE, ARITHMETIC = 4, 5, 6, 7, 8, 12, 14
YCBCR_OR_GREY = (1, 2)
MCU = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}  # width of what is coded together, by subsampling
RGB = 0  # a pixel format
MARGIN = 2  # pixels beside a crop that its chroma is interpolated from
END = b"\xff\xd9"  # a file that is cut off lacks it


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


class Box(NamedTuple):
    """A rectangle, in whole pixels; right and bottom are the first that are outside."""

    left: int
    top: int
    right: int
    bottom: int


@cache
def library() -> Any:
    """TurboJPEG, or None where there is none, or none that can crop."""
    for path in _places():
        try:
            found = ctypes.CDLL(path)
            pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
            found.tj3Init.argtypes, found.tj3Init.restype = [number], pointer
            found.tj3Get.argtypes = [pointer, number]
            found.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
            found.tj3SetScalingFactor.argtypes = [pointer, _Factor]
            found.tj3SetCroppingRegion.argtypes = [pointer, _Region]
            found.tj3Decompress8.argtypes = [
                pointer,
                ctypes.c_char_p,
                size,
                pointer,
                number,
                number,
            ]
            return found
        except (OSError, AttributeError):  # not to be loaded, or of an older interface
            continue
    return None


def _places() -> list[str]:
    """Where the library may be: the system's own gets its repairs."""
    found = [name] if (name := find_library("turbojpeg")) else []
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    return found + [str(f.locate()) for f in files if f.name.startswith("libturbojpeg")]


class _Thread(threading.local):
    """What each thread has of its own: a decoder, and room for pixels, which is used again."""

    def __init__(self) -> None:
        self.decoder = library().tj3Init(DECOMPRESS)
        self.room = np.empty(0, np.uint8)

    def pixels(self, height: int, width: int) -> NDArray[np.uint8]:
        n = height * width * 3
        if len(self.room) < n:
            self.room = np.empty(n, np.uint8)
        return self.room[:n].reshape(height, width, 3)


@cache
def _thread() -> _Thread:
    return _Thread()


class Jpeg:
    """A plain JPEG: 8 bits, YCbCr or grey, sequential, with its end. ``size``: width, height."""

    def __init__(self, content: bytes, size: tuple[int, int], unit: int) -> None:
        self.content, self.size, self.unit = content, size, unit

    def region(self, box: Box, scale: int) -> NDArray[np.uint8] | None:
        """The pixels of ``box`` at 1/``scale`` of the size, ``box`` being in these pixels; None
        where the file is not as it should be. They are good until the next call of this thread.

        Shape: (box height, box width, 3).
        """
        tj, mine = library(), _thread()
        width, height = (-(-side // scale) for side in self.size)
        unit = self.unit // scale
        left = max(0, box.left - MARGIN) // unit * unit
        right = min(width, box.right + MARGIN)
        top, bottom = max(0, box.top - MARGIN), min(height, box.bottom + MARGIN)
        pixels = mine.pixels(bottom - top, right - left)
        wrong = (
            tj.tj3DecompressHeader(mine.decoder, self.content, len(self.content))
            or tj.tj3SetScalingFactor(mine.decoder, _Factor(1, scale))
            or tj.tj3SetCroppingRegion(mine.decoder, _Region(left, top, right - left, bottom - top))
            or tj.tj3Decompress8(
                mine.decoder,
                self.content,
                len(self.content),
                pixels.ctypes.data,
                pixels.strides[0],
                RGB,
            )
        )
        if wrong:
            return None
        return pixels[box.top - top : box.bottom - top, box.left - left : box.right - left]


def plain(content: bytes, most: int) -> Jpeg | None:
    """A JPEG of at most so many pixels as something to crop from; None if it is anything else."""
    tj = library()
    if tj is None or END not in content[-16:]:
        return None
    decoder = _thread().decoder
    if tj.tj3DecompressHeader(decoder, content, len(content)):
        return None
    wanted = (WIDTH, HEIGHT, SUBSAMPLING, PRECISION, COLORS, PROGRESSIVE, ARITHMETIC)
    width, height, sub, bits, colors, *others = (tj.tj3Get(decoder, name) for name in wanted)
    if bits != 8 or colors not in YCBCR_OR_GREY or any(others) or sub not in MCU:
        return None
    return Jpeg(content, (width, height), MCU[sub]) if 0 < width * height <= most else None
