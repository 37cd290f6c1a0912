"""Prepared photographs: tar shards in WebDataset's format, and an index of where each image is.

A shard has for each image ``KEY.jpg`` (or ``KEY.npy``, its pixels) and ``KEY.cls``, the number of
its class. By the index any image is one read, so that the order stays a function of seed
and epoch.
"""

import errno
import json
import os
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnetv2_cli.data.picture import unreadable
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import replacing

BEGUN = "prepared.json"  # what a folder of shards was begun with
AGAIN = "resnetv2 data prepare makes it anew"
MORE = "ulimit -n 4096 lets a process have more files open"


class Member(NamedTuple):
    """An image inside of a shard: where it begins there, and how many bytes it has."""

    shard: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            Unreadable: they cannot be read; says which.
        """
        # Opened for each image, in microseconds: the next is in any of a thousand shards, which are
        # more than a process may have open.
        try:
            shard = os.open(self.shard, os.O_RDONLY)
            try:
                content = os.pread(shard, self.size, self.offset)
            finally:
                os.close(shard)
        except OSError as error:
            hint = MORE if error.errno in (errno.EMFILE, errno.ENFILE) else AGAIN
            raise unreadable(str(self), error.strerror or error, hint) from None
        if len(content) < self.size:
            raise unreadable(str(self), f"{self.shard} is cut off", AGAIN)
        return content


def index_of(root: Path, split: str) -> Path:
    """Where the index of a split is; with it the split is whole."""
    return root / f"{split}.index.npz"


def members(shard: Path, rows: Sequence[tuple[str, int]]) -> list[tuple[Member, int]]:
    """The images of a shard, and the numbers of their classes. ``rows``: what belongs in it, the
    name and the number of each.

    Raises:
        UserError: it has not all of that, or anything else.
    """
    made = []
    try:
        with tarfile.open(shard, "r:") as tar:
            # Which ends without a word at zeros, or where a copy was cut off between two images.
            inside = iter(tar)
            for (name, label), image, number in zip(rows, inside, inside, strict=True):
                said = tar.extractfile(number).read()  # type: ignore[union-attr]
                expected = (name, f"{Path(name).stem}.cls", str(label).encode())
                if (image.name, number.name, said) != expected:
                    raise ValueError(f"{image.name} is not {name}")
                made.append((Member(shard, image.offset_data, image.size, name), label))
    except (tarfile.TarError, OSError, ValueError):
        raise UserError(
            f"{shard} is damaged, or not of these images", f"remove it: {AGAIN}"
        ) from None
    return made


def write_index(path: Path, classes: tuple[str, ...], found: list[tuple[Member, int]]) -> None:
    """Write where each image is, in the order of classes and names."""
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
        UserError: it is damaged, or a shard is missing.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            shards = [path.parent / Path(str(name)).name for name in kept["shards"]]
            offsets, sizes = kept["place"].T.tolist()
            rows = zip(kept["shard"].tolist(), offsets, sizes, kept["name"], strict=True)
            members = [Member(shards[i], start, n, str(name)) for i, start, n, name in rows]
            classes = tuple(json.loads(str(kept["classes"])))
            found: dict[str, list[Member]] = {name: [] for name in classes}
            for member, label in zip(members, kept["label"].tolist(), strict=True):
                found[classes[label]].append(member)
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged", AGAIN) from None
    if missing := [s for s in shards if not s.is_file()]:
        raise UserError(f"the shard {missing[0]} is missing", AGAIN)
    return found
