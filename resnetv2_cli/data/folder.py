"""Photographs in class folders (ImageNet, or your own), decoded from files batch by batch."""

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from resnetv2_cli.data import colors, picture
from resnetv2_cli.data.crop import Choose, Rectangle, crops
from resnetv2_cli.data.images import Split
from resnetv2_cli.data.order import FILES, STREAMS, generator
from resnetv2_cli.data.picture import is_image
from resnetv2_cli.data.protocols import TRAINED, View
from resnetv2_cli.data.shards import BEGUN, Member, index_of, read_index
from resnetv2_cli.errors import UserError
from resnetv2_cli.telling import Tell, silent

NAMES = f"image names end in {', '.join(sorted(picture.SUFFIXES))}"
CHECK = "resnetv2 data check lists all files that cannot be read"
SHORTER = (256, 480)  # pixels: range of the random shorter side ("scale" of Table 5, from [1])
DRAWS = 40  # random numbers for a training crop: four for each of ten tries

MIDDLE = 4  # index of the middle crop among ten crops

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet's training images, 0..1
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Folder(NamedTuple):
    """The files of one split and their classes, sorted by name."""

    files: Sequence[Path | Member]
    labels: Tensor
    classes: tuple[str, ...]


def classes_in(place: Path) -> list[str]:
    """The names of the class folders in a folder. Here and below, names that begin with a dot are
    left out: they belong to other programs."""
    return sorted(p.name for p in place.iterdir() if p.is_dir() and p.name[0] != ".")


def files_in(place: Path) -> list[Path]:
    """The files directly in a folder, sorted by name."""
    with os.scandir(place) as inside:  # it tells folders from files without a stat of each
        names = sorted(e.name for e in inside if e.name[0] != "." and not e.is_dir())
    return [place / name for name in names]


def below(place: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file in a folder and its subfolders, sorted by name. Links are followed, except to a
    folder ``above``, which would never end."""
    above = (*above, place.resolve())
    for path in sorted(place.iterdir()):
        if path.name[0] == ".":
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from below(path, above)


def images_in(place: Path) -> list[Path]:
    """The images directly in a folder, sorted by name."""
    return [path for path in files_in(place) if is_image(path)]


def left_out(count: int, place: Path) -> str:
    """The message about files that are not images."""
    files, are, images = ("file", "is", "an image") if count == 1 else ("files", "are", "images")
    return f"{count:,} {files} in {place} {are} not read as {images}: {NAMES}"


def loose(place: Path, split: str, tell: Tell) -> dict[str, list[Path]]:
    """The images of each class folder.

    Raises:
        UserError: some images are outside class folders, or a training class has none.
    """
    if bare := images_in(place):
        hint = "images go into one folder per class"
        if split == "test":  # as the official archive has it
            hint = f"resnetv2 data sort-val {quote(str(place.parent))} --labels FILE"
            hint += ", which has the class of each image"
        raise UserError(f"{len(bare):,} images in {place} are in no class folder", hint)
    every = {name: files_in(place / name) for name in classes_in(place)}
    found = {name: [path for path in files if is_image(path)] for name, files in every.items()}
    if others := sum(map(len, every.values())) - sum(map(len, found.values())):
        tell(left_out(others, place))
    empty = [name for name, files in found.items() if not files]
    if split == "train" and empty and any(found.values()):
        raise UserError(
            f"classes of {place} have no images: {', '.join(empty[:3])}",
            f"{NAMES}; remove folders that are not classes",
        )
    return found


def scan(
    root: Path,
    split: str,
    classes: tuple[str, ...] = (),
    of: str = "train",
    tell: Tell = silent,
) -> Folder:
    """The images of ``root/split/<class>/``, or of prepared shards. ``classes``: those that ``of``
    (the other split, or a checkpoint) has. ``tell`` is called with a line about files or folders
    that are left out, and if there is only one training class.

    Raises:
        UserError: the folder is missing or not fully prepared, it has no images or some outside
            class folders, a class is not in ``classes``, or a training class has no images.
    """
    names = ("val", "test") if split == "test" else (split,)
    index = next((i for n in names if (i := index_of(root, n)).is_file()), None)  # of shards
    place = index or next((root / n for n in names if (root / n).is_dir()), None)
    if place is None:
        if (root / BEGUN).is_file():
            raise UserError(f"{root} is not fully prepared", "run resnetv2 data prepare again")
        wanted = " or ".join(str(root / n) for n in names)
        raise UserError(
            f"there is no folder {wanted}",
            "it has one folder for each class; --data-dir names the folder above it",
        )
    if place == root / "val" and (root / "test").is_dir():
        tell(f"{root / 'test'} is not read: {place} is there")
    found: Mapping[str, Sequence[Path | Member]]
    found = read_index(place) if index else loose(place, split, tell)
    if index and classes:  # an index lists all training classes, even those without images here
        found = {name: files for name, files in found.items() if files}
    if strange := sorted(set(found) - set(classes)) if classes else []:
        lacking = f"{place} has classes that {of} lacks: {', '.join(strange[:3])}"
        raise UserError(lacking, "both need one folder for each class, with the same names")
    classes = classes or tuple(found)
    pairs = [(file, i) for i, name in enumerate(classes) for file in found.get(name, ())]
    if not pairs:
        raise UserError(f"no images in {place}/<class>/", "images go into one folder per class")
    if split == "train" and len(classes) == 1:
        tell(f"{root} has one class to learn, {classes[0]}, and none to tell it from")
    files, labels = zip(*pairs, strict=True)
    return Folder(list(files), torch.tensor(labels), classes)


def content_of(file: Path | Member) -> bytes:
    """The content of an image file.

    Raises:
        Unreadable: it cannot be read; the message names it.
    """
    return file.read() if isinstance(file, Member) else picture.content(file)


def digest(*splits: Folder) -> str:
    """Digest of classes, labels and file names; not of contents: all would have to be read."""
    made = hashlib.sha256()
    for split in splits:
        names = "\n".join([*split.classes, *(path.name for path in split.files)])
        made.update(names.encode(errors="surrogateescape"))  # names need not be valid text
        made.update(split.labels.numpy().tobytes())
    return made.hexdigest()


def random_box(width: int, height: int, crop: str, draws: Sequence[float]) -> Rectangle:
    """A training crop before it is resized: left, top, right, bottom, in pixels.
    ``draws``: DRAWS numbers, uniform from 0 to 1.

    ``scale``: a square whose side is 224/480 to 224/256 of the shorter side. This is the 224 x 224
    crop of an image whose shorter side is resized to a random 256..480 ([1]).
    ``scale-aspect``: 8 to 100 % of the area, aspect ratio 3/4 to 4/3, whose logarithm is uniform as
    in torchvision (fb.resnet.torch: the ratio itself).
    """
    if crop == "scale-aspect":
        for i in range(0, DRAWS, 4):
            area = width * height * (0.08 + 0.92 * draws[i])
            aspect = math.exp((2 * draws[i + 1] - 1) * math.log(4 / 3))
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            if w <= width and h <= height:
                left, top = draws[i + 2] * (width - w), draws[i + 3] * (height - h)
                return left, top, left + w, top + h
        return center_box(width, height, 1.0)
    shorter = SHORTER[0] + draws[0] * (SHORTER[1] - SHORTER[0])
    side = min(width, height) * TRAINED / shorter
    left, top = draws[1] * (width - side), draws[2] * (height - side)
    return left, top, left + side, top + side


def center_box(width: int, height: int, share: float) -> Rectangle:
    """The centered square whose side is ``share`` of the shorter side."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def boxes(width: int, height: int, view: View) -> list[Rectangle]:
    """The crops that a view takes of an image: the middle; for ten crops, the corners, then the
    middle."""
    middle = center_box(width, height, view.share)
    if not view.ten:
        return [middle]
    side = middle[2] - middle[0]
    corners = itertools.product((0.0, height - side), (0.0, width - side))
    return [*((left, top, left + side, top + side) for top, left in corners), middle]


class FolderImages(Dataset):
    """Image ``index`` as epoch ``epoch`` sees it; epoch -1 is the test view.

    Random draws follow from seed, epoch and index alone.

    Shape: key (index, epoch) -> (size, size, 3) uint8, label, and if ``color`` is not ``none`` the
    (3, 4) of ``colors.change``. Test view: (side, side, 3), or (10, side, side, 3) with five crops
    followed by the same five mirrored; and the label.
    """

    def __init__(
        self, folder: Folder, size: int, crop: str, seed: int, view: View, color: str = "none"
    ) -> None:
        self.folder, self.size, self.crop, self.seed = folder, size, crop, seed
        self.view, self.color = view, color

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        index, epoch = key
        label = self.folder.labels[index]
        if epoch < 0:
            found = self._crops(index, lambda w, h: boxes(w, h, self.view), self.view.side)
            return torch.cat([found, found.flip(2)]) if self.view.ten else found[0], label
        g = generator((self.seed * STREAMS + epoch) * FILES + index)
        flip, *draws = torch.rand(1 + DRAWS, generator=g, dtype=torch.float64).tolist()
        [image] = self._crops(index, lambda w, h: [random_box(w, h, self.crop, draws)], self.size)
        image = image.flip(1) if flip < 0.5 else image
        if self.color == "none":
            return image, label
        return image, label, colors.change(image, self.color, g)

    def _crops(self, index: int, choose: Choose, side: int) -> Tensor:
        file = self.folder.files[index]
        content = content_of(file)
        try:
            return crops(content, str(file), choose, side)
        except picture.Unreadable as error:  # raised without knowing where the image is stored
            hint = file.anew if isinstance(file, Member) else CHECK
            raise picture.Unreadable(str(error), hint, error.why) from None


def chosen(split: Split | Folder, n: int, view: View) -> tuple[Tensor, Tensor]:
    """n evenly spaced images, or all if there are fewer. Images are sorted by class, so each class
    has its share. ``view``: for photographs.

    Shape: (n, H, W, 3) uint8, (n,).
    """
    count = len(split.labels)
    n = min(n, count)
    rows = (2 * np.arange(n) + 1) * count // (2 * n)
    if isinstance(split, Split):
        return torch.from_numpy(split.images[rows]), torch.from_numpy(split.labels[rows])
    views = FolderImages(split, view.side, "scale", 0, view)
    images, labels = zip(*(views[int(i), -1] for i in rows), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])


class Keys:
    """Batches of (index, epoch) keys, which the workers of a DataLoader decode."""

    def __init__(self, batches: Iterable[list[tuple[int, int]]], length: int) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return self.length
