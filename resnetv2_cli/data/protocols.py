"""How photographs are cropped in evaluation, as data. To add a protocol, add a row to PROTOCOLS.

Nothing here needs torch, so that help and error messages appear at once.
"""

from typing import NamedTuple

from resnetv2_cli.errors import unknown

TRAINED = 224  # pixels: side of the training crops that the sizes below are meant for


class View(NamedTuple):
    """What a network sees of an image: crops of ``side`` pixels, which cover ``share`` of the
    image's shorter side; the one in the middle, or the ``ten`` of AlexNet."""

    side: int
    share: float = 1.0
    ten: bool = False

    @property
    def shorter(self) -> int:
        """The shorter side of the resized image, pixels."""
        return round(self.side / self.share)

    @property
    def crops(self) -> int:
        """The number of crops of each image."""
        return 10 if self.ten else 1


class Protocol(NamedTuple):
    """``crop``, ``shorter``: side of the crop and shorter side of the resized image, pixels, for
    networks that train on crops of 224; for others in proportion."""

    doc: str
    crop: int
    shorter: int
    ten: bool = False

    def view(self, trained: int) -> View:
        """The view for a network that trains on crops of ``trained`` pixels."""
        return View(round(self.crop * trained / TRAINED), self.crop / self.shorter, self.ten)


PROTOCOLS = {
    "224": Protocol("224x224 in the middle, shorter side 256", 224, 256),
    "320": Protocol("320x320 in the middle, shorter side 320 (Table 5)", 320, 320),
    "ten-crop": Protocol(
        "224x224 at corners and middle, and mirrored, shorter side 256; the mean of softmax",
        224,
        256,
        ten=True,
    ),
}


def listed(text: str) -> str:
    """Comma-separated names of protocols, without duplicates.

    Raises:
        UserError: there is no such protocol.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
    return ",".join(dict.fromkeys(names))
