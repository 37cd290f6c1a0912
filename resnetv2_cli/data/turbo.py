"""Decode only the part of a JPEG that a crop needs, by TurboJPEG: what is below the crop is not
read, what is beside it is not transformed, and the transform itself scales by 1, 1/2, 1/4 or 1/8.

The library is the system's, or comes with the package ``turbojpeg``; only version 3 and later can
crop. Only plain files are read here: a caller that gets None must read the file another way.
"""

import ctypes
import threading
from ctypes.util import find_library
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DECOMPRESS = 1  # argument of tj3Init; the next line has parameters of tj3Get
SUBSAMPLING, WIDTH, HEIGHT, PRECISION, COLORS, PROGRESSIVE, ARITHMETIC = 4, 5, 6, 7, 8, 12, 14
YCBCR_OR_GREY = (1, 2)
MCU = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}  # width of a minimum coded unit, by subsampling
RGB = 0  # a pixel format
MARGIN = 2  # pixels around a crop that its chroma is interpolated from
END = b"\xff\xd9"  # the end marker, which a file that is cut off lacks


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


class Box(NamedTuple):
    """A rectangle in whole pixels; ``right`` and ``bottom`` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@cache
def library() -> Any:
    """The TurboJPEG library, or None if there is none that can crop."""
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
        except (OSError, AttributeError):  # it cannot be loaded, or has an older interface
            continue
    return None


def _places() -> list[str]:
    """Where the library may be. The system's comes first, because the system updates it."""
    found = [name] if (name := find_library("turbojpeg")) else []
    try:
        files = metadata.files("turbojpeg") or []
    except metadata.PackageNotFoundError:
        files = []
    return found + [str(f.locate()) for f in files if f.name.startswith("libturbojpeg")]


class _Thread(threading.local):
    """What each thread has of its own: a decoder, and a buffer for pixels, which is reused."""

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
    """A plain JPEG: 8 bits, YCbCr or grey, sequential, not cut off. ``size``: width, height;
    ``unit``: width of a minimum coded unit."""

    def __init__(self, content: bytes, size: tuple[int, int], unit: int) -> None:
        self.content, self.size, self.unit = content, size, unit

    def region(self, box: Box, scale: int) -> NDArray[np.uint8] | None:
        """The pixels of ``box`` at 1/``scale`` of the size, ``box`` being in scaled pixels; None if
        the file is damaged. They are valid until this thread's next call.

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
    """A plain JPEG of at most ``most`` pixels, to crop from; None if it is anything else."""
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
