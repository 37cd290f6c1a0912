"""The flat ``val/`` of the official archive, sorted into class folders by a file of labels."""

import csv
import os
import re
from pathlib import Path
from typing import NamedTuple

from resnetv2_cli.data.folder import SUFFIXES
from resnetv2_cli.errors import UserError, shown

FORMS = (
    "a line for each image: ILSVRC2012_val_00000001.JPEG n01440764; or LOC_val_solution.csv; or "
    "the classes alone, one a line, in the order of the images' names"
)
# As LOC_val_solution.csv has it: the class before the four numbers of each box around one of it.
BOXES = re.compile(r"(\S+)(\s+\d+){4}(\s+\1(\s+\d+){4})*")


class Move(NamedTuple):
    """A file, and where it belongs."""

    source: Path
    target: Path


def place_of(root: Path) -> Path:
    """The folder to sort: ``val`` of a dataset's folder, or the one that is named itself.

    Raises:
        UserError: there is none.
    """
    for place in (root / "val", root / "test"):
        if place.is_dir():
            return place
    # Also when it is sorted by now; the class folders of a whole dataset would be its splits.
    if root.is_dir() and (images_in(root) or (sorted_in(root) and not (root / "train").is_dir())):
        return root
    raise UserError(f"{root} has no folder val", "name the folder that val is in")


def images_in(place: Path) -> list[Path]:
    """The images that lie in a folder itself, in the order of their names."""
    return sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and not p.is_dir())


def sorted_in(place: Path) -> list[Path]:
    """The images that lie in its class folders."""
    return [p for p in place.glob("*/*") if p.suffix.lower() in SUFFIXES]


def class_in(cell: str) -> str:
    """What a cell names: a class, which may be of several words, or one with its boxes."""
    boxes = BOXES.fullmatch(cell.strip())
    return boxes[1] if boxes else cell.strip()


def labels_in(file: Path) -> list[tuple[str, str]]:
    """The name of each image (without suffix; "" where the file has none) and its class.

    Raises:
        UserError: it is in none of FORMS.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the labels {file}: {error}", FORMS) from None
    made = []
    for number, words in enumerate(csv.reader(text.replace("\t", " ").splitlines()), 1):
        if words[:2] == ["ImageId", "PredictionString"] or not words:
            continue
        if len(words) == 1:  # spaces between
            words = words[0].split()
        name, label = ("", "".join(words)) if len(words) < 2 else (words[0], class_in(words[1]))
        if len(words) > 2 or not label or any(c in label for c in "/\\\0") or label[0] == ".":
            line = shown(" ".join(words))
            raise UserError(f"{file}, line {number}: {line} is no image and its class", FORMS)
        made.append((Path(name).stem if Path(name).suffix.lower() in SUFFIXES else name, label))
    if not made or len({bool(name) for name, _ in made}) > 1:
        raise UserError(f"{file} does not give each image its class", FORMS)
    if all(label.isdecimal() for _, label in made):
        raise UserError(
            f"{file} has numbers for classes, whose order is not that of the class folders",
            "give their names, such as n01440764",
        )
    return made


def plan(place: Path, labels: list[tuple[str, str]]) -> tuple[list[Move], int]:
    """What has to be moved, and how many images are in their place already.

    Raises:
        UserError: an image has no class, has two, or is not there; or ``train`` lacks a class.
    """
    here = images_in(place)
    sorted_ = {p.stem: p for p in sorted_in(place)}
    if labels and not labels[0][0]:
        if sorted_ and not here:
            return [], len(sorted_)
        if len(labels) != len(here) or sorted_:
            raise UserError(
                f"{len(labels):,} labels without names, for {len(here):,} images in {place}",
                "labels that name their images can go on where sorting was stopped",
            )
        labels = [(p.stem, label) for p, (_, label) in zip(here, labels, strict=True)]
    wanted: dict[str, str] = {}
    for name, label in labels:
        if wanted.setdefault(name, label) != label:
            raise UserError(f"{shown(name)} has two classes, {wanted[name]} and {label}")
    known = {p.name for p in (place.parent / "train").glob("*") if p.is_dir()}
    if known and (strange := sorted(set(wanted.values()) - known)):
        hint = "are the labels names of class folders?"
        raise UserError(f"train lacks {len(strange)} of the classes: {shown(strange[0])}", hint)
    flat = {p.stem for p in here}
    if lost := [name for name in wanted if name not in sorted_ and name not in flat]:
        raise UserError(f"{len(lost):,} labelled images are not in {place}: {shown(lost[0])}")
    if nameless := [p.name for p in here if p.stem not in wanted]:
        raise UserError(f"{len(nameless):,} images have no label: {shown(nameless[0])}")
    wrong = [p for name, p in sorted_.items() if wanted.get(name) != p.parent.name]
    if wrong:
        raise UserError(f"{len(wrong):,} images are in another class than labelled: {wrong[0]}")
    moves = [Move(p, place / wanted[p.stem] / p.name) for p in here]
    if taken := [m.target for m in moves if m.target.exists()]:
        raise UserError(f"{taken[0]} is there already, and in {place} too", "remove one of them")
    return moves, len(sorted_)


def move(moves: list[Move]) -> None:
    """Give every file its place: renamed, never copied; what was stopped can be done again.

    Raises:
        OSError: a folder cannot be made or a file not renamed; those before it are in place.
    """
    for folder in {m.target.parent for m in moves}:
        folder.mkdir(exist_ok=True)
    for source, target in moves:
        os.rename(source, target)
