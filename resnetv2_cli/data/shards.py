"""Prepared photographs: tar shards in WebDataset's format, and an index of where each image is.

For each image, a shard has ``KEY.jpg`` (or ``KEY.npy``, its pixels) and ``KEY.cls``, the number of
its class. Thanks to the index any image takes one read, so the order remains a function of seed and
epoch.
"""

import errno
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnetv2_cli.data.picture import unreadable
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import replacing

BEGUN = "prepared.json"  # the settings and images that a folder of shards was begun with
AGAIN = "resnetv2 data prepare makes it again"
MORE = "ulimit -n 4096 lets a process have more files open"


class Member(NamedTuple):
    """An image in a shard: its offset there and its size, in bytes."""

    shard: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    @property
    def anew(self) -> str:
        """What to do if its bytes are not an image: data prepare itself does not look at them."""
        return f"remove {self.shard}: {AGAIN}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            Unreadable: they cannot be read; the message names it.
        """
        # The shard is opened for each image, which takes microseconds: the next image may be in any
        # of a thousand shards, more than a process may have open.
        try:
            shard = os.open(self.shard, os.O_RDONLY)
            try:
                content = os.pread(shard, self.size, self.offset)
            finally:
                os.close(shard)
        except OSError as error:
            hints = {errno.EMFILE: MORE, errno.ENFILE: MORE, errno.ENOENT: AGAIN}
            hint = hints.get(error.errno or 0, self.anew)
            raise unreadable(str(self), error.strerror or error, hint) from None
        if len(content) < self.size:
            raise unreadable(str(self), f"{self.shard} is cut off", self.anew)
        return content


def index_of(root: Path, split: str) -> Path:
    """The path of a split's index; if it exists, the split is complete."""
    return root / f"{split}.index.npz"


def refuse_shards(root: Path) -> None:
    """Refuse a folder of shards where one of images is needed.

    Raises:
        UserError: data prepare made the folder, or began it.
    """
    splits = ("train", "val", "test")
    begun = (root / BEGUN).is_file() and not any((root / split).is_dir() for split in splits)
    if begun or any(index_of(root, split).is_file() for split in splits):
        raise UserError(
            f"{root} has shards that data prepare made, for train and eval to read",
            "name the folder of images that they were made from",
        )


def members(shard: Path, rows: Sequence[tuple[str, int]]) -> list[tuple[Member, int]]:
    """The images of a shard, and the numbers of their classes. ``rows``: the name and class number
    of each image that belongs in it.

    Raises:
        UserError: the shard lacks any of them, or has anything else.
    """
    made = []
    try:
        with tarfile.open(shard, "r:") as tar:
            # Iteration ends silently at zeros, or where a copy was cut off between two images.
            inside = iter(tar)
            for (name, label), image, number in zip(rows, inside, inside, strict=True):
                if (image.name, number.name) != (name, f"{Path(name).stem}.cls"):
                    raise ValueError(f"{image.name} is not {name}")
                if not (image.isreg() and number.isreg() and image.size and number.size < 20):
                    raise ValueError(f"{name} is a link, a folder, or empty")
                if tar.extractfile(number).read() != str(label).encode():  # type: ignore[union-attr]
                    raise ValueError(f"{name} is of another class")
                made.append((Member(shard, image.offset_data, image.size, name), label))
    except Exception:  # untrusted headers may fail in any way
        raise UserError(
            f"{shard} is damaged, or not of these images", f"remove it: {AGAIN}"
        ) from None
    return made


def write_index(path: Path, classes: tuple[str, ...], found: list[tuple[Member, int]]) -> None:
    """Write where each image is, sorted by class and name."""
    found = sorted(found, key=lambda pair: (pair[1], pair[0].name))
    shards = sorted({m.shard.name for m, _ in found})
    number = {name: i for i, name in enumerate(shards)}
    with replacing(path) as out:
        np.savez_compressed(
            out,
            shards=np.array(shards),
            shard=np.array([number[m.shard.name] for m, _ in found], np.int32),
            place=np.array([(m.offset, m.size) for m, _ in found], np.int64),
            name=np.array([m.name for m, _ in found]),
            label=np.array([label for _, label in found], np.int64),
            classes=np.array(json.dumps(list(classes))),
        )


def read_index(path: Path) -> dict[str, list[Member]]:
    """The images of each class of a prepared split.

    Raises:
        UserError: the index is damaged, or a shard is missing or cut off.
    """
    try:
        shards, classes, names, numbers = kept(path)
    except Exception:  # an untrusted file may fail in any way
        raise UserError(f"{path} is damaged", AGAIN) from None
    if missing := [s for s in shards if not s.is_file()]:
        raise UserError(f"the shard {missing[0]} is missing", AGAIN)
    shard, offset, size, _ = numbers
    ends = np.array([s.stat().st_size for s in shards], np.int64)
    if len(cut := shard[size > ends[shard] - offset]):
        short = f"the shard {shards[cut[0]]} is cut off: {path.name} has images beyond its end"
        raise UserError(short, f"remove it: {AGAIN}")
    found: dict[str, list[Member]] = {name: [] for name in classes}
    for i, start, n, label, name in zip(*numbers.tolist(), names, strict=True):
        found[classes[label]].append(Member(shards[i], start, n, name))
    return found


def kept(path: Path) -> tuple[list[Path], list[str], list[str], NDArray[np.int64]]:
    """What an index holds: shards, classes, names of images, and numbers: for each image the number
    of its shard, its offset there and its size in bytes, and the number of its class.

    Shape of the numbers: (4, images).

    Raises:
        Exception: of any kind: something is missing or invalid.
    """
    with np.load(path, allow_pickle=False) as file:
        shards = [path.parent / Path(str(name)).name for name in file["shards"]]
        classes, names = json.loads(str(file["classes"])), file["name"]
        numbers = np.stack([file["shard"], *file["place"].T, file["label"]])
    if [*dict.fromkeys(map(str, classes))] != classes:
        raise ValueError("classes that are not names, or a duplicate")
    kinds = (names.dtype.kind, names.ndim, numbers.dtype.kind)
    if kinds != ("U", 1, "i") or numbers.shape != (4, len(names)):
        raise ValueError("not the arrays of an index")
    below = np.array([len(shards), np.inf, np.inf, len(classes)])[:, None]
    if (numbers < [[0], [0], [1], [0]]).any() or (numbers >= below).any():
        raise ValueError("numbers out of range")
    return shards, classes, names.tolist(), numbers
