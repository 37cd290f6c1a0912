"""A look at every file of a tree of photographs: what is there, and what is wrong.

To add a fault that a file can have, add a row to FAULTS, and find it in ``look``.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from resnetv2_cli.data import picture
from resnetv2_cli.data.folder import below, classes_in, images_in
from resnetv2_cli.data.picture import is_image
from resnetv2_cli.data.shards import refuse_shards
from resnetv2_cli.errors import UserError

SPLITS = ("train", "val", "test")


class Fault(NamedTuple):
    """A fault that a file can have. ``stops``: training and evaluation fail when they meet it."""

    doc: str
    stops: bool = False


FAULTS = {
    "unreadable": Fault("not an image, or cannot be decoded", stops=True),
    "truncated": Fault("its end is missing", stops=True),
    "suffix": Fault("its suffix is that of another format; read as what it is"),
    "CMYK": Fault("colors for print; read as RGB"),
    "grey": Fault("no colors; read as RGB"),
    "animated": Fault("several pictures; the first is read"),
    "turned": Fault("by EXIF alone; read as stored, unless mogrify -auto-orient turns its pixels"),
    "ignored": Fault("its suffix is not that of an image, or it is in no class folder"),
}
ORIENTATION, TURNED = 0x0112, range(2, 9)  # of EXIF; 1 is upright, other values mean nothing
GREY = {"1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L"}


class Entry(NamedTuple):
    """A file in a split; ``label``: its class folder, or "" if it is in none."""

    path: Path
    split: str
    label: str


class Seen(NamedTuple):
    """What was found in a file. ``faults``: kind to explanation. ``digest``: of its pixels."""

    entry: Entry
    size: int  # bytes
    faults: dict[str, str]
    digest: bytes | None = None


def splits_in(root: Path) -> tuple[list[str], list[str]]:
    """The splits of a folder that training and evaluation read, and those that they do not.

    Raises:
        UserError: it has no split, or is a folder of shards.
    """
    refuse_shards(root)
    there = [split for split in SPLITS if (root / split).is_dir()]
    if not there:
        raise UserError(f"{root} has no folder train, val or test", "name the folder they are in")
    unread = ["test"] if {"val", "test"} <= set(there) else []
    return [split for split in there if split not in unread], unread


def entries_in(place: Path) -> Iterator[Entry]:
    """Every file below one split."""
    for path in below(place):
        inside = path.relative_to(place).parts
        yield Entry(path, place.name, inside[0] if len(inside) == 2 else "")


def look(entry: Entry) -> Seen:
    """Decode a file completely, and find what is wrong with it."""
    path, faults = entry.path, {}
    if not (entry.label and is_image(path)):
        size = path.lstat().st_size
        return Seen(entry, size, {"ignored": path.suffix or "no suffix"})
    try:
        content = picture.content(path)
    except picture.Unreadable as error:
        return Seen(entry, path.lstat().st_size, {"unreadable": str(error)})
    try:
        with picture.opened(content, str(path)) as image:
            if path.suffix.lower() not in picture.FORMATS[named(image)]:
                faults["suffix"] = f"it is {named(image)}"
            if image.mode in GREY or image.mode == "CMYK":
                faults["CMYK" if image.mode == "CMYK" else "grey"] = image.mode
            if image.format != "MPO" and getattr(image, "is_animated", False):
                faults["animated"] = f"{image.n_frames} pictures"  # type: ignore[attr-defined]
            pixels = picture.converted(image)
            if (way := orientation(image)) in TURNED:
                faults["turned"] = f"orientation {way}"
    except picture.Unreadable as error:  # its message has the file's name, which may say truncated
        kind = "truncated" if "truncated" in error.why.lower() else "unreadable"
        return Seen(entry, len(content), faults | {kind: str(error)})
    made = hashlib.blake2b(f"{pixels.size}".encode(), digest_size=16)
    made.update(pixels.tobytes())
    return Seen(entry, len(content), faults, made.digest())


def orientation(image: Image.Image) -> Any:
    """The EXIF orientation of a decoded picture; None if EXIF has none or is broken, which does not
    matter for reading the picture."""
    with suppress(*picture.BROKEN):
        return image.getexif().get(ORIENTATION)
    return None


def named(image: Image.Image) -> str:
    """The format of an image. MPO, several JPEGs in one file, begins as JPEG and counts as JPEG."""
    return "JPEG" if image.format == "MPO" else str(image.format)


def survey(root: Path, workers: int, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Look at every file that is read, ``workers`` at a time; return a report of plain values.
    ``tick(done, all)`` is called as it goes.

    Raises:
        UserError: the folder has no split, or is a folder of shards.
    """
    read, unread = splits_in(root)
    every = [entry for split in read for entry in entries_in(root / split)]
    seen = []
    with ThreadPool(workers) as pool:  # decoding releases the GIL
        for found in pool.imap(look, every, chunksize=8):
            seen.append(found)
            tick(len(seen), len(every))
    images = [s for s in seen if "ignored" not in s.faults]
    faults = {
        kind: [{"file": str(s.entry.path), "why": s.faults[kind]} for s in seen if kind in s.faults]
        for kind in FAULTS
    }
    return {
        "folder": str(root),
        "splits": {split: counted(root / split, images) for split in read},
        "faults": faults,
        "unread": unread,
        "classes": mismatches(root, read),
        "duplicates": duplicates(images),
        "flat": [split for split in read if flat(root / split)],
    }


def counted(place: Path, images: list[Seen]) -> dict[str, Any]:
    """The numbers of classes, images and bytes of a split, and its empty classes."""
    mine = [s for s in images if s.entry.split == place.name]
    counts = Counter(dict.fromkeys(classes_in(place), 0))
    counts.update(s.entry.label for s in mine)
    numbers = list(counts.values())
    return {
        "classes": len(counts),
        "images": len(mine),
        "bytes": sum(s.size for s in mine),
        "least": min(numbers, default=0),
        "most": max(numbers, default=0),
        "empty": sorted(name for name, n in counts.items() if not n),
    }


def mismatches(root: Path, places: list[str]) -> dict[str, dict[str, list[str]]]:
    """For each split after the first, the classes that it lacks and those that the first lacks."""
    folders = [set(classes_in(root / split)) for split in places]
    return {
        split: {"missing": sorted(folders[0] - own), "strange": sorted(own - folders[0])}
        for split, own in zip(places[1:], folders[1:], strict=True)
        if own != folders[0]
    }


def duplicates(images: list[Seen]) -> dict[str, list[list[str]]]:
    """Files with the same pixels. ``across``: in several splits, which makes a test worthless;
    ``classes``: in several classes of one split; ``within``: in one class."""
    groups = defaultdict(list)
    for s in images:
        if s.digest is not None:
            groups[s.digest].append(s.entry)
    made: dict[str, list[list[str]]] = {"across": [], "classes": [], "within": []}
    for same in groups.values():
        if len(same) > 1:
            splits, labels = ({e[i] for e in same} for i in (1, 2))
            kind = "across" if len(splits) > 1 else "classes" if len(labels) > 1 else "within"
            made[kind].append([str(e.path) for e in same])
    return made


def flat(place: Path) -> bool:
    """Whether there are images directly in a split, outside class folders."""
    return bool(images_in(place))


def without_images(report: dict[str, Any]) -> list[str]:
    """The splits that have no images in class folders."""
    return [name for name, found in report["splits"].items() if not found["images"]]


def serious(report: dict[str, Any]) -> list[str]:
    """What would stop training or make its result worthless, each in a few words."""
    said = [
        f"{len(report['faults'][kind]):,} {kind}"
        for kind, fault in FAULTS.items()
        if fault.stops and report["faults"][kind]
    ]
    there = report["splits"].keys()
    said += [] if "train" in there else ["no folder train"]
    said += [] if there & {"val", "test"} else ["no folder val or test"]
    said += [f"{split} has its images in no class folder" for split in report["flat"]]
    empty = without_images(report)
    said += [f"no images in {split}" for split in empty if split not in report["flat"]]
    if "train" not in empty and (bare := report["splits"].get("train", {}).get("empty")):
        said.append(f"{len(bare):,} classes of train without images")
    for split, found in report["classes"].items():
        if found["strange"]:
            said.append(f"{len(found['strange']):,} classes of {split} that train lacks")
    if n := len(report["duplicates"]["across"]):
        said.append(f"{n:,} images in several splits")
    return said
