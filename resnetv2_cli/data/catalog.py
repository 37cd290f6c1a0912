"""The datasets that ``--dataset`` names, as data. To add one in class folders, add a row to
DATASETS; one with an archive of its own also needs rows in ``data.archive``.

Nothing here needs torch, so that help and error messages appear at once.
"""

from typing import NamedTuple

from resnetv2_cli.plans import STEMS

SIZE = 32  # pixels: side of the images that are held decoded in memory
CIFAR10 = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)
DIGITS = tuple("0123456789")


class Dataset(NamedTuple):
    """What is known about a dataset before it is read."""

    doc: str
    classes: tuple[str, ...] = ()  # in the official order; empty: the names of the class folders
    train: int = 0  # number of images; 0: as many as are found
    test: int = 0
    flip: bool = True  # whether a mirrored image still shows its class
    decoded: bool = True  # held in memory as uint8; else decoded from files, batch by batch


def known_classes(dataset: str, asked: int | None) -> int:
    """The number of classes: the dataset's; for folders ``asked``, or ImageNet's 1000."""
    return len(DATASETS[dataset].classes) or asked or 1000


def side(dataset: str, stem: str) -> int:
    """Side of the images that a network trains on, pixels: whole images, or crops of photographs of
    the size that the stem is made for."""
    return SIZE if DATASETS[dataset].decoded else STEMS[stem].size


DATASETS = {
    "cifar10": Dataset("32x32 photographs, 10 classes", CIFAR10, 50_000, 10_000),
    "cifar100": Dataset("32x32 photographs, 100 classes", CIFAR100, 50_000, 10_000),
    "digits": Dataset(
        "scikit-learn's handwritten digits, scaled to 32x32; no download",
        DIGITS,
        1_437,
        360,
        flip=False,
    ),
    "imagenet": Dataset("ILSVRC-2012: train/ and val/ with 1000 class folders", decoded=False),
    "folder": Dataset("any images in class folders: train/ and val/ or test/", decoded=False),
}
