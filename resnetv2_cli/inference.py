"""Predictions of a checkpoint for any pictures, preprocessed as in evaluation, in batches."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple
from unicodedata import category

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.folder import MIDDLE, NAMES, Folder, FolderImages, below, left_out
from resnetv2_cli.data.module import at_a_time, view_of
from resnetv2_cli.data.picture import BROKEN, FORMATS, Unreadable, is_image
from resnetv2_cli.data.protocols import View
from resnetv2_cli.data.shards import Member
from resnetv2_cli.data.workers import decoded_by
from resnetv2_cli.errors import UserError
from resnetv2_cli.machine import trainer_of
from resnetv2_cli.task import Classification
from resnetv2_cli.telling import Tell

STDIN = "-"


class Picture(NamedTuple):
    """A file to look at, and its name in the results."""

    name: str
    path: Path | Member  # a member of prepared shards


class Prediction(NamedTuple):
    """The most probable classes of a picture, or why there are none.

    ``pixels`` (size, size, 3) uint8: what the network saw.
    """

    name: str
    top: list[tuple[str, float]]
    error: str
    pixels: Tensor


def network(path: Path, **overrides: Any) -> Classification:
    """The network of a checkpoint, or of its export as safetensors, from the file alone: no dataset
    is needed.

    Raises:
        UserError: the file is neither, or its mean image does not fit the images it would see.
    """
    return network_of(checkpoints.network(path), path, **overrides)


def network_of(saved: dict[str, Any], path: Path, **overrides: Any) -> Classification:
    """The same, from what was already read from the file.

    Raises:
        UserError: its mean image does not fit the images it would see.
    """
    experiment = checkpoints.experiment_of(saved, **overrides)
    normalize = Normalize(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))  # the file's replace these
    task = Classification(experiment, tuple(saved["classes"]), normalize)
    checkpoints.load_weights(task, saved, path)
    view_of(experiment, task.normalize)
    return task.eval()


@contextmanager
def pictures(names: Sequence[str], stdin: BinaryIO, tell: Tell) -> Iterator[list[Picture]]:
    """The files that names stand for: a file for itself, a folder for all images below it, ``-``
    for standard input, which is one image or else a list of file names.

    Raises:
        UserError: a folder has no images, or standard input is neither image nor list.
    """
    with TemporaryDirectory() as scratch:
        found: list[Picture] = []
        for name in names:
            if name == STDIN:
                found += from_stdin(stdin.read(), Path(scratch) / "stdin")
            elif os.path.isdir(name):  # Path.is_dir may raise on an impossible name
                found += images_of(Path(name), tell)
            else:
                found.append(Picture(name, Path(name)))
        yield found


def images_of(folder: Path, tell: Tell) -> list[Picture]:
    """The images of a folder and its subfolders, by their suffixes, in the order of their names;
    ``tell`` hears how many other files there are.

    Raises:
        UserError: there are none.
    """
    every = list(below(folder))
    paths = [path for path in every if is_image(path)]
    if not paths:
        raise UserError(f"no images in {folder}", NAMES)
    if others := len(every) - len(paths):
        tell(left_out(others, folder))
    return [Picture(str(p), p) for p in paths]


def from_stdin(content: bytes, scratch: Path) -> list[Picture]:
    """One picture if the bytes are an image; else one for each line, or for each name that ends in
    a zero byte, as ``find -print0`` writes them.

    Raises:
        UserError: they are neither.
    """
    try:
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)):
            scratch.write_bytes(content)
            return [Picture(STDIN, scratch)]
    except BROKEN:
        pass
    if content.endswith(b"\0"):  # names may contain anything else
        names = [os.fsdecode(part) for part in content.split(b"\0") if part]
    else:
        lines = content.split(b"\n")
        names = [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]
        if any(category(c) == "Cc" for name in names for c in name):
            names = []
    if not names:
        hint = "for instance: find photos -name '*.jpg' | resnetv2 predict CHECKPOINT -"
        raise UserError("standard input is neither an image nor names of files", hint)
    return [Picture(name, Path(name)) for name in names]


class Views(Dataset):
    """The test view of each file; if it cannot be read, a black one and the reason.

    Shape: index -> (side, side, 3) or (10, side, side, 3) uint8, error.
    """

    def __init__(self, found: Sequence[Picture], view: View) -> None:
        paths = [picture.path for picture in found]
        folder = Folder(paths, torch.zeros(len(paths), dtype=torch.int64), ())
        self.paths = paths
        self.shape = (*((view.crops,) if view.ten else ()), view.side, view.side, 3)
        self.images = FolderImages(folder, view.side, "scale", 0, view)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.images[index, -1][0], ""
        except Unreadable as error:
            return torch.zeros(self.shape, dtype=torch.uint8), error.why


def predict(task: Classification, found: Sequence[Picture], top: int) -> Iterator[Prediction]:
    """Each picture's ``top`` classes, most probable first, with their probabilities (0 to 1).

    The experiment's ``workers`` decode files while the network computes. Precision and batch size
    are those of evaluation.
    """
    e = task.experiment
    view = view_of(e, task.normalize)
    batch = at_a_time(e, view)
    loader: DataLoader = DataLoader(
        Views(found, view),
        batch_size=batch,
        # Starting processes takes longer than decoding a batch of small images.
        **decoded_by(min(e.workers, len(found) // batch)),
    )
    trainer = trainer_of(e, logger=False)
    device = trainer.strategy.root_device
    task.to(device).fuse(device)
    names = iter(found)
    for pixels, errors in loader:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            shares = task.look(pixels.to(device)).float().softmax(1)
        if view.ten:
            pixels = pixels[:, MIDDLE]
        # Stable: of equally probable classes the first comes first, as evaluation counts.
        values, indices = shares.sort(descending=True, stable=True)
        best = values[:, :top].tolist(), indices[:, :top].tolist()
        finite = shares.isfinite().all(1).tolist()
        for row in zip(*best, finite, errors, pixels, strict=True):
            probable, named, sound, error, seen = row
            error = error or ("" if sound else "the network's output is not finite")
            pairs = [(task.classes[i], p) for i, p in zip(named, probable, strict=True)]
            yield Prediction(next(names).name, [] if error else pairs, error, seen)
