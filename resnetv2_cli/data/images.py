"""Small images, decoded once and held in memory as uint8: CIFAR and scikit-learn's digits."""

import hashlib
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnetv2_cli.data import archive, picture
from resnetv2_cli.data.catalog import DATASETS, SIZE, Dataset
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import cache, replacing
from resnetv2_cli.locks import in_turn
from resnetv2_cli.telling import Tell, silent

LARGEST = 2**20  # bytes of one image file: an archive member may claim to unpack to any size
SPLITS = ("train", "test")


class Split(NamedTuple):
    """images (N, 32, 32, 3) uint8, labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


class Images(NamedTuple):
    """A dataset in memory. ``digest``: of all pixels and labels, to compare copies by."""

    train: Split
    test: Split
    digest: str


class File(NamedTuple):
    """One image file: its path as messages show it, its split and class, and how to read it."""

    name: str
    split: str
    label: str
    size: int  # bytes
    read: Callable[[], bytes]


def load(name: str, root: Path, tell: Tell = silent) -> Images:
    """A dataset by name, from ``root``: in the official archive's layout, or as class folders.

    The order of the images does not depend on the copy. They are decoded once, then kept in the
    user's cache folder. ``tell`` is called with a line about anything that takes a while.

    Raises:
        UserError: the dataset is incomplete, or is missing and its download failed.
    """
    dataset = DATASETS[name]
    if name == "digits":
        return digits()
    if found := folder_copy(name, root):
        archives = [p for p in found if p.is_file()]
        sources = archives or [Path(f.name) for f in tree(found)]
        return cached(name, sources, lambda: from_files(name, dataset, list(tree(found))), tell)
    official = [p for pattern in archive.PLACES[name] for p in sorted(root.glob(pattern))]
    return cached(name, official, lambda: from_archive(name, root), tell)


def digits() -> Images:
    """scikit-learn's digits (1,797 of 8x8, 17 greys) at 32x32 RGB; every fifth is a test image.

    They are cached too: importing scikit-learn takes as long as training on them for a while.
    """
    installed = find_spec("sklearn")
    sources = [Path(installed.origin)] if installed and installed.origin else []
    return cached("digits", sources, embedded, silent)


def embedded() -> tuple[Split, Split]:
    """Train and test from the digits that come with scikit-learn."""
    from sklearn.datasets import load_digits

    small = load_digits()
    grey = [Image.fromarray((im * (255 / 16)).round().astype(np.uint8)) for im in small.images]
    large = [im.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB") for im in grey]
    images, labels = np.stack([np.asarray(im) for im in large]), small.target.astype(np.int64)
    test = np.arange(len(labels)) % 5 == 0
    return Split(images[~test], labels[~test]), Split(images[test], labels[test])


def folder_copy(name: str, root: Path) -> list[Path]:
    """Where a class-folder copy is under ``root``: a folder with train/ and test/, or zip archives.

    Raises:
        UserError: only one of train/ and test/ is there.
    """
    names = (name, name.replace("cifar", "cifar-"))
    for place in (root, *(root / n for n in names)):
        halves = [(place / split).is_dir() for split in SPLITS]
        named = any((place / "train" / c).is_dir() for c in DATASETS[name].classes)
        ours = named or place != root  # else train/ and test/ may be of something else
        if ours and all(halves):
            return [place]
        if ours and any(halves):
            missing = place / ("test" if halves[0] else "train")
            raise UserError(
                f"half of {name} is missing: there is no {missing}",
                "class folders must be in train/ and test/",
            )
        own = place != root or root.name in names  # else it may hold unrelated archives
        archives = sorted(place.glob("*.zip")) if own else []
        if archives:
            return archives
    return sorted([*root.glob(f"{name}.zip"), *root.glob(f"{name}[!0-9]*.zip")])


def tree(places: list[Path]) -> Iterator[File]:
    """The image files ``split/class/name`` in a folder, or in zip archives, read in place."""
    for place in places:
        if place.is_dir():
            for path in sorted(place.glob("*/*/*")):
                if picture.is_image(path) and path.is_file():
                    split, label = path.parts[-3:-1]
                    yield File(str(path), split, label, path.stat().st_size, path.read_bytes)
            continue
        try:
            packed = zipfile.ZipFile(place)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"cannot read {place}: {error}", "copy the archive again") from None
        for member in packed.infolist():
            parts = member.filename.split("/")
            if len(parts) == 3 and picture.is_image(Path(parts[2])):
                name, read = f"{place}:{member.filename}", partial(packed.read, member)
                yield File(name, parts[0], parts[1], member.file_size, read)


def decode(file: File) -> NDArray[np.uint8]:
    """The pixels of an image file, (32, 32, 3) uint8.

    Raises:
        UserError: it is not an image, is truncated, or has another size; the message names it.
    """
    if file.size > LARGEST:
        raise UserError(f"{file.name} has {file.size:,} bytes", f"too many for {SIZE}x{SIZE}")
    try:
        content = file.read()
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {file.name}: {error}", "copy it again") from None
    return np.asarray(picture.rgb(content, file.name, (SIZE, SIZE)))


def from_files(name: str, dataset: Dataset, files: list[File]) -> tuple[Split, Split]:
    """Train and test from image files.

    Raises:
        UserError: a class is missing, is misnamed, or has fewer images than the others.
    """
    counts = Counter((f.split, f.label) for f in files)
    for split in SPLITS:
        found = {label: n for (s, label), n in counts.items() if s == split}
        if missing := [c for c in dataset.classes if c not in found]:
            some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise UserError(
                f"{name} is incomplete: {split} lacks {len(missing)} of its classes ({some})",
                "class folders must have the official names",
            )
        least, most = min(found, key=found.get), max(found.values())  # type: ignore[arg-type]
        if found[least] < most:
            raise UserError(
                f"{name} is incomplete: {split}/{least} has {found[least]} images, others {most}",
                "was the copy interrupted?",
            )
    index = {label: i for i, label in enumerate(dataset.classes)}
    halves = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split in SPLITS:
            chosen = [f for f in files if f.split == split and f.label in index]
            images = np.stack(list(pool.map(decode, chosen, chunksize=64)))
            halves.append(Split(images, np.array([index[f.label] for f in chosen])))
    return halves[0], halves[1]


def from_archive(name: str, root: Path) -> tuple[Split, Split]:
    """Train and test from the official archive."""
    train, test = archive.read(name, root)
    return Split(*train), Split(*test)


def finished(train: Split, test: Split) -> Images:
    """Both splits in the order that all copies share: by class, then by a digest of the pixels."""
    digest, halves = hashlib.sha256(), []
    for images, labels in (train, test):
        keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
        order = np.array(sorted(range(len(keys)), key=lambda i: (labels[i], keys[i])))
        images, labels = np.ascontiguousarray(images[order]), labels[order].astype(np.int64)
        halves.append(Split(images, labels))
        for i in order:
            digest.update(keys[i])
        digest.update(labels.tobytes())
    return Images(halves[0], halves[1], digest.hexdigest())


def cached(
    name: str,
    sources: list[Path],
    read: Callable[[], tuple[Split, Split]],
    tell: Tell,
) -> Images:
    """The result of ``read``, kept in the cache folder until one of the ``sources`` changes."""
    folder = cache()
    # Without sources, the dataset is about to be downloaded: the next call will cache it.
    if not sources or folder is None:
        return finished(*read())
    stamp = hashlib.sha256()
    for path in sources:
        stat = path.stat()
        stamp.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # Another process may be decoding them.
    with in_turn(folder) if folder.is_dir() else nullcontext():
        return kept(folder / f"{name}-{stamp.hexdigest()[:16]}.npz", name, read, tell)


def kept(file: Path, name: str, read: Callable[[], tuple[Split, Split]], tell: Tell) -> Images:
    """The images in a file; or the result of ``read``, written to it."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            train, test = (Split(saved[f"{s}_images"], saved[f"{s}_labels"]) for s in SPLITS)
            return Images(train, test, str(saved["digest"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        tell(f"decoding {name}")
    images = finished(*read())
    try:
        with replacing(file) as out:
            np.savez(
                out,
                train_images=images.train.images,
                train_labels=images.train.labels,
                test_images=images.test.images,
                test_labels=images.test.labels,
                digest=np.array(images.digest),
            )
        tell(f"{name} is kept in {file.parent} and will not be decoded again")
    except OSError as error:  # a full or read-only cache costs time, not the run
        said = error.strerror or error
        tell(f"{name} cannot be kept in {file.parent}: {said}; each run decodes it again")
    return images
