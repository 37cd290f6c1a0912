"""How photographs are looked at in evaluation, as data. To add a way: one row in PROTOCOLS.

Nothing here needs torch, so that help and error messages come at once.
"""

from typing import NamedTuple

from resnetv2_cli.errors import unknown

TRAINED = 224  # pixels: side of the training crops that the sides below are for


class View(NamedTuple):
    """What a network sees of an image: crops of ``side`` pixels, each ``share`` of the shorter side
    of the image; the one in the middle, or the ``ten`` of AlexNet."""

    side: int
    share: float = 1.0
    ten: bool = False

    @property
    def shorter(self) -> int:
        """The shorter side that the image is resized to, pixels."""
        return round(self.side / self.share)

    @property
    def crops(self) -> int:
        """How many of each image."""
        return 10 if self.ten else 1


class Protocol(NamedTuple):
    """``crop``, ``shorter``: sides of the crop and of the resized image, pixels, for networks that
    train on crops of 224; for others they are in proportion."""

    doc: str
    crop: int
    shorter: int
    ten: bool = False

    def view(self, trained: int) -> View:
        """For a network that trains on crops of ``trained`` pixels."""
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
    """Names of protocols with commas between, each once.

    Raises:
        UserError: there is no such protocol.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROTOCOLS:
            raise unknown("protocol", name, PROTOCOLS)
    return ",".join(dict.fromkeys(names))
