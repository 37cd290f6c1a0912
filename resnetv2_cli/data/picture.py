"""Opening untrusted image files: only formats that hold nothing but pixels are opened, and every
failure is one clear error."""

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

# Formats, recognized by content whatever a file is called, and the suffixes it should have. Pillow
# knows more formats, among them EPS, which it hands to a PostScript interpreter.
FORMATS = {"PNG": {".png"}, "JPEG": {".jpg", ".jpeg", ".jfif"}, "WEBP": {".webp"}, "BMP": {".bmp"}}

SUFFIXES = set[str]().union(*FORMATS.values())

# Photographs may have as many pixels as this warns about; Pillow itself refuses twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Warnings about broken EXIF, on which no pixel depends.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")

# What decoders raise on bytes that are not an image.
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


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its suffix, and not of another program, by a dot before its
    name."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


class Unreadable(UserError):
    """An image that cannot be read. ``why``: the reason, without the image's name."""

    # A message alone must be enough to make one: from that torch recreates the error of a worker
    # process. Its message is then the worker's traceback, which includes the hint as a note.
    def __init__(self, message: str, hint: str = "", why: str = "") -> None:
        super().__init__(message, hint)
        self.why = why or message
        if hint:
            self.add_note(f"hint: {hint}")


@contextmanager
def opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet.

    Raises:
        Unreadable: it cannot be read as an image, here or where it is used; the message names it.
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
    """The error for an image that cannot be read: one line that says why."""
    why = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, UnidentifiedImageError):
        why = f"cannot identify image file: none of {', '.join(FORMATS)}"
    return Unreadable(f"cannot read the image {name}: {why}", hint, why)


def refuse_pipe(path: Path, name: str) -> None:
    """Refuse what is not a plain file, such as a pipe, which never ends.

    Raises:
        Unreadable: it is missing, not a plain file, or its path cannot be one of a file.
    """
    try:
        plain = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        plain = False
    except (OSError, ValueError) as error:  # a name longer than the system allows
        raise unreadable(name, error) from None
    if not plain:
        raise Unreadable(f"{name} is no file", "images are plain files")


def content(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        Unreadable: it cannot be read; the message names it.
    """
    refuse_pipe(path, str(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(str(path), error) from None


def saved_pixels(content: bytes, name: str) -> NDArray[np.uint8]:
    """The pixels of an array that NumPy saved, without copying them.

    Shape: (height, width, 3) uint8.

    Raises:
        Unreadable: it is another array, or none; the message names it.
    """
    try:
        file = BytesIO(content)
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or by_columns or len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise ValueError("the array does not hold the pixels of an image")
        return np.frombuffer(content, np.uint8, offset=file.tell()).reshape(shape)
    except Exception as error:  # an untrusted header may fail in any way
        raise unreadable(name, error) from None


def converted(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert would clip at 255
        high = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # else Pillow would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def rgb(source: Path | bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An image of any mode as RGB; ``size``: the width and height that it must have.

    Raises:
        UserError: it cannot be read as an image, or has another size; the message names it.
    """
    with opened(source, name) as image:
        if size and image.size != size:  # before any pixel is decoded
            found, wanted = ("x".join(map(str, s)) for s in (image.size, size))
            raise UserError(f"{name} is {found}, not {wanted}", "use --dataset folder for it")
        return converted(image)
