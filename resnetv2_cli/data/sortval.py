"""Sort the flat ``val/`` of the official archive into class folders, by a file of labels."""

import csv
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from resnetv2_cli.data.folder import classes_in, images_in
from resnetv2_cli.data.picture import is_image
from resnetv2_cli.data.shards import refuse_shards
from resnetv2_cli.errors import UserError, shown

FORMS = (
    "a line for each image: ILSVRC2012_val_00000001.JPEG n01440764; or LOC_val_solution.csv; or "
    "the classes alone, one a line, in the order of the images' names"
)
# In LOC_val_solution.csv: the class, followed by four numbers, once for each bounding box.
BOXES = re.compile(r"(\S+)(\s+\d+){4}(\s+\1(\s+\d+){4})*")


class Move(NamedTuple):
    """A file, and where it belongs."""

    source: Path
    target: Path


def place_of(root: Path) -> Path:
    """The folder to sort: ``val`` or ``test`` of a dataset's folder, or ``root`` itself.

    Raises:
        UserError: there is none, or ``root`` is a folder of shards.
    """
    refuse_shards(root)
    for place in (root / "val", root / "test"):
        if place.is_dir():
            return place
    # A sorted folder counts too; but in a whole dataset, the splits would pass for class folders.
    if root.is_dir() and (images_in(root) or (sorted_in(root) and not (root / "train").is_dir())):
        return root
    raise UserError(f"{root} has no folder val", "name the folder that val is in")


def sorted_in(place: Path) -> list[Path]:
    """The images in the class folders of a folder."""
    return [path for name in classes_in(place) for path in images_in(place / name)]


def class_in(cell: str) -> str:
    """The class in a cell, which holds a class of one or more words, or one with its boxes."""
    boxes = BOXES.fullmatch(cell.strip())
    return boxes[1] if boxes else cell.strip()


def labels_in(file: Path) -> list[tuple[str, str]]:
    """The name of each image ("" if the file has none) and its class.

    Raises:
        UserError: the file is in none of FORMS.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.replace("\t", " ").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels {file}: {error}", FORMS) from None
    made = []
    for number, words in enumerate(rows, 1):
        if words[:2] == ["ImageId", "PredictionString"] or not words:
            continue
        if len(words) == 1:  # separated by spaces
            words = words[0].split()
        name, label = ("", "".join(words)) if len(words) < 2 else (words[0], class_in(words[1]))
        if len(words) > 2 or not label or any(c in label for c in "/\\\0") or label[0] == ".":
            line = shown(" ".join(words))
            raise UserError(f"{file}, line {number}: {line} is not an image and its class", FORMS)
        made.append((name, label))
    if not made or len({bool(name) for name, _ in made}) > 1:
        raise UserError(f"{file} does not give each image its class", FORMS)
    return made


def finder(images: list[Path]) -> Callable[[str], Path | None]:
    """A function that finds the image of a label: by full name, else by name without suffix."""
    whole = {path.name: path for path in images}
    stems: dict[str, list[Path]] = {}
    for path in images:
        stems.setdefault(path.stem, []).append(path)

    def named(name: str) -> Path | None:
        if found := whole.get(name):
            return found
        same = stems.get(Path(name).stem if is_image(Path(name)) else name, [])
        if len(same) > 1:
            names = " and ".join(path.name for path in same[:2])
            raise UserError(f"{shown(name)} is {names}", "labels with suffixes tell them apart")
        return same[0] if same else None

    return named


def plan(place: Path, labels: list[tuple[str, str]]) -> tuple[list[Move], int]:
    """The moves to make, and how many images are in place already.

    Raises:
        UserError: an image has no class, has two, is missing or is in the wrong place; or ``train``
            lacks a class.
    """
    here, sorted_ = images_in(place), sorted_in(place)
    if labels and not labels[0][0]:
        if sorted_ and not here:
            return [], len(sorted_)
        if len(labels) != len(here) or sorted_:
            raise UserError(
                f"{len(labels):,} labels without names, for {len(here):,} images in {place}",
                "labels with image names can continue a sort that was stopped",
            )
        labels = [(path.name, label) for path, (_, label) in zip(here, labels, strict=True)]
    named = finder(here + sorted_)
    wanted: dict[str, str] = {}
    lost = []
    for name, label in labels:
        if not (image := named(name)):
            lost.append(name)
        elif wanted.setdefault(image.name, label) != label:
            raise UserError(f"{shown(name)} has two classes, {wanted[image.name]} and {label}")
    train = place.parent / "train"
    known = set(classes_in(train)) if train.is_dir() else set()
    strange = sorted({label for _, label in labels} - known)
    if strange and all(label.isdecimal() for _, label in labels):
        raise UserError(
            "the labels have numbers for classes, whose order is not that of the class folders",
            "give their names, such as n01440764",
        )
    if known and strange:
        hint = "are the labels names of class folders?"
        raise UserError(f"train lacks {len(strange)} of the classes: {shown(strange[0])}", hint)
    if lost:
        raise UserError(f"{len(lost):,} labelled images are not in {place}: {shown(lost[0])}")
    if nameless := [path.name for path in here if path.name not in wanted]:
        raise UserError(f"{len(nameless):,} images have no label: {shown(nameless[0])}")
    wrong = [path for path in sorted_ if wanted.get(path.name) != path.parent.name]
    if wrong:
        raise UserError(f"{len(wrong):,} images are in another class than labelled: {wrong[0]}")
    moves = [Move(path, place / wanted[path.name] / path.name) for path in here]
    if taken := [m.target for m in moves if m.target.exists()]:
        raise UserError(f"{taken[0]} is there already, and in {place} too", "remove one of them")
    return moves, len(sorted_)


def move(moves: list[Move]) -> None:
    """Move every file into place: renamed, never copied; if stopped, it can be done again.

    Raises:
        OSError: a folder cannot be made or a file not renamed; files before it are in place.
    """
    for folder in {m.target.parent for m in moves}:
        folder.mkdir(exist_ok=True)
    for source, target in moves:
        os.rename(source, target)
