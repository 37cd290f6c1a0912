"""Write a file and keep it only if it computes what the network computes."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import archive, folder, images
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.data.protocols import View
from resnetv2_cli.errors import UserError
from resnetv2_cli.export.fold import Exported
from resnetv2_cli.export.formats import FORMATS, Metadata, Run
from resnetv2_cli.files import expanded, partial
from resnetv2_cli.task import Classification

LARGEST = 1e-4  # logit difference that counts as rounding, relative to max(1, largest logit)
SMALL, PHOTOGRAPHS = 256, 16  # images to compare on


class Agreement(NamedTuple):
    """How far a file's logits are from the network's."""

    difference: float  # largest over all logits
    logit: float  # largest magnitude
    same: int  # images with the same top class
    images: int
    source: str

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2g} (logits up to {self.logit:.3g}), "
            f"same class in {self.same} of {self.images} {self.source}"
        )


def test_images(task: Classification, view: View) -> tuple[Tensor, str]:
    """Images to compare on, and what they are: test images if they are at hand (nothing is
    downloaded), else noise.

    Shape: (N, size, size, 3) uint8.
    """
    e, size = task.experiment, view.side
    n = SMALL if DATASETS[e.dataset].decoded else PHOTOGRAPHS
    with suppress(UserError, OSError):  # an incomplete dataset counts as none here
        if split := at_hand(e):
            found, _ = folder.chosen(split, n, view)
            if found.shape[1:3] == (size, size):
                return found, f"test images of {e.dataset}"
    noise = torch.Generator().manual_seed(0)
    shape = (n, size, size, 3)
    return torch.randint(256, shape, generator=noise, dtype=torch.uint8), "images of noise"


def at_hand(e: Experiment) -> images.Split | folder.Folder | None:
    """The test images; None if they would have to be downloaded.

    Raises:
        UserError: they are missing or incomplete.
    """
    root = expanded(e.data_dir)
    if not DATASETS[e.dataset].decoded:
        return folder.scan(root, "test")
    official = archive.whole(e.dataset, root)
    if e.dataset != "digits" and not official and not images.folder_copy(e.dataset, root):
        return None
    return images.load(e.dataset, root).test


@torch.inference_mode()
def compare(task: Classification, run: Run, pixels: Tensor, source: str) -> Agreement:
    """Compare the logits of the network and of the file, which gets two unequal batches.

    Raises:
        UserError: they differ by more than rounding.
    """
    expected = task.cpu().eval()(pixels)
    parts = (pixels.permute(0, 3, 1, 2).float() / 255).contiguous().split(max(1, len(pixels) - 1))
    found = torch.cat([run(part) for part in parts])
    largest = float(expected.abs().max())
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    difference = float((found - expected).abs().max())
    made = Agreement(difference, largest, same, len(pixels), source)
    if not difference <= LARGEST * max(1.0, largest):  # also refuses NaN
        raise UserError(f"the exported file computes something else: {made}", "nothing is kept")
    return made


def written(
    task: Classification, model: Exported, format: str, view: View, to: Path, metadata: Metadata
) -> Agreement:
    """Write a file under a temporary name, check it, and rename it.

    Raises:
        UserError: the check fails, the format cannot express the network, or the file cannot be
            written; nothing is left of it, and a file that was there before stays.
    """
    row = FORMATS[format]
    pixels, source = test_images(task, view)
    beside = partial(to)
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        row.write(model, torch.zeros(2, 3, view.side, view.side), beside, metadata)
        made = compare(task, row.read(model, beside), pixels, source)
        os.replace(beside, to)
    except UserError:
        raise
    except OSError as error:
        said = error.strerror or error
        raise UserError(
            f"cannot write {to}: {said}", "make room, or name another --output"
        ) from None
    except Exception as error:  # exporters, runtimes and the user's own code may raise anything
        said = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--format {format} cannot export this network: {said}",
            "--format safetensors writes the weights alone",
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    return made
