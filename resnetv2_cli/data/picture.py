"""Opening image files of strangers: formats that are pixels and nothing else, and every failure is
one clear error."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from resnetv2_cli.errors import UserError

# By content, whatever a file is called. Pillow knows more, among them EPS, which it hands to an
# interpreter of PostScript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

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


def rgb(source: Path | bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """An image of any mode as RGB; ``size``: the width and height that it must have.

    Raises:
        UserError: it cannot be read as an image, or has another size; says which.
    """
    if isinstance(source, Path) and not source.is_file():  # a pipe would never end
        raise UserError(f"{name} is no file", "images are plain files")
    try:
        opened = BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened, formats=FORMATS) as image:
            if size and image.size != size:  # before a single pixel of it is decoded
                found, wanted = ("x".join(map(str, s)) for s in (image.size, size))
                raise UserError(f"{name} is {found}, not {wanted}", "use --dataset folder for it")
            if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
                high = np.asarray(image).clip(0, 2**16 - 1) >> 8
                return Image.fromarray(high.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except BROKEN as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the image {name}: {line}", "copy it again") from None
