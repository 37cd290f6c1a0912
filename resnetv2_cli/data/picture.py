"""Opening image files of strangers: formats that are pixels and nothing else, and every failure is
one clear error."""

import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from resnetv2_cli.errors import UserError

# By content, whatever a file is called; and how it should be. Pillow knows more formats, among them
# EPS, which it hands to an interpreter of PostScript.
FORMATS = {"PNG": {".png"}, "JPEG": {".jpg", ".jpeg", ".jfif"}, "WEBP": {".webp"}, "BMP": {".bmp"}}

# Photographs may have so many pixels; Pillow refuses twice as many by itself.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Of broken EXIF, on which no pixel depends.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")

# What decoders raise on bytes that are no image.
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Unreadable(UserError):
    """An image that cannot be read. ``why``: what the message says behind its name."""

    # The message is enough: torch makes the error of a worker process again from that alone, with
    # its traceback, in which the hint is a note.
    def __init__(self, message: str, hint: str = "", why: str = "") -> None:
        super().__init__(message, hint)
        self.why = why or message
        if hint:
            self.add_note(f"hint: {hint}")


@contextmanager
def opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet.

    Raises:
        Unreadable: it cannot be read as an image, here or where it is used; says which.
    """
    if isinstance(source, Path):
        refuse_pipe(source, name)
    try:
        file = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=tuple(FORMATS)) as image:
            yield image
    except BROKEN as error:
        raise unreadable(name, error) from None


def unreadable(name: str, error: Exception | str, hint: str = "copy it again") -> Unreadable:
    """One line that says why."""
    why = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, UnidentifiedImageError):
        why = f"cannot identify image file: none of {', '.join(FORMATS)}"
    return Unreadable(f"cannot read the image {name}: {why}", hint, why)


def refuse_pipe(path: Path, name: str) -> None:
    """Raises Unreadable: it is no plain file, as a pipe, which never ends; or cannot be one."""
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        plain = False
    except (OSError, ValueError) as error:  # a name longer than the system allows
        raise unreadable(name, error) from None
    if not plain:
        raise Unreadable(f"{name} is no file", "images are plain files")


def content(path: Path) -> bytes:
    """What a file of an image holds.

    Raises:
        Unreadable: it cannot be read; says which.
    """
    refuse_pipe(path, str(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from None


def saved_pixels(content: bytes, name: str) -> NDArray[np.uint8]:
    """The pixels that NumPy has saved, which are not copied.

    Shape: (height, width, 3) uint8.

    Raises:
        Unreadable: it is another array, or none; says which.
    """
    try:
        file = BytesIO(content)
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or by_columns or len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise ValueError("the array has not the pixels of an image")
        return np.frombuffer(content, np.uint8, offset=file.tell()).reshape(shape)
    except Exception as error:  # a header of a stranger's fails in any way
        raise unreadable(name, error) from None


def converted(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
        high = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # of which Pillow would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def rgb(source: Path | bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An image of any mode as RGB; ``size``: the width and height that it must have.

    Raises:
        UserError: it cannot be read as an image, or has another size; says which.
    """
    with opened(source, name) as image:
        if size and image.size != size:  # before a single pixel of it is decoded
            found, wanted = ("x".join(map(str, s)) for s in (image.size, size))
            raise UserError(f"{name} is {found}, not {wanted}", "use --dataset folder for it")
        return converted(image)
