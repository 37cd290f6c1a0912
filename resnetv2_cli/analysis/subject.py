"""What is studied: a network, at initialization or from a checkpoint, and real images for it."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.folder import Folder, FolderImages
from resnetv2_cli.data.images import Split
from resnetv2_cli.errors import unknown
from resnetv2_cli.plans import STEMS, laid_out
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.run import build, restore

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Source(NamedTuple):
    """Where a network comes from: an experiment, at initialization, or a checkpoint."""

    experiment: Experiment
    checkpoint: Path | None = None
    step: int | None = None  # iterations it was trained for
    label: str = ""


class Batch(NamedTuple):
    """How a network is looked at. ``images``: training images that pass at once; ``test_images``:
    at most so many for errors; ``precision``; ``bn``: whose statistics BN has."""

    images: int = 8
    test_images: int = 250
    precision: str = "float64"
    bn: str = "batch"
    pairs: int = 100


@dataclass(eq=False)
class Subject:
    """One network with its images, on the CPU.

    ``net`` is in train mode if BN has the batch's statistics, else in eval mode.

    Shape: x (images, 3, H, W), labels (images,); test_x and test_labels alike, float32.
    """

    net: ResNet
    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor
    batch: Batch = Batch()


def from_checkpoint(path: Path, **overrides: Any) -> Source:
    """A checkpoint or a run's folder; it names network and images by itself.

    Raises:
        UserError: there is none, or it is none of this tool.
    """
    file = checkpoints.find(path)
    saved = checkpoints.read(file)
    experiment = checkpoints.experiment_of(saved, **overrides)
    return Source(experiment, file, saved["global_step"])


def beside(main: Source, text: str) -> Source:
    """What ``--compare`` names: a checkpoint or a run's folder, or the first network with other
    settings, ``depth=110,unit=original``, at initialization.

    Raises:
        UserError: it is neither, or there is no such setting.
    """
    if "=" not in text or Path(text).exists():
        return from_checkpoint(Path(text), data_dir=main.experiment.data_dir)
    known = ["layout", *(f.name for f in fields(Experiment))]
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise unknown("setting", name, known, where=f"--compare {text}: ")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[name] = value  # which the experiment refuses in its own words
    own = {"block": None} if "depth" in given else {}  # another depth may have another block
    return Source(replace(main.experiment, **(own | laid_out(given))))


def labelled(sources: list[Source]) -> list[Source]:
    """The same with labels that tell them apart: what differs between their experiments, and after
    how many iterations; or the whole name, where nothing does."""
    named: dict[str, Source] = {}
    for source in sources:
        parts = [
            value if isinstance(value, str) else f"{f.name}={value}"
            for f in fields(Experiment)
            if not f.metadata["free"]
            and len({getattr(other.experiment, f.name) for other in sources}) > 1
            and (value := getattr(source.experiment, f.name)) is not None
        ]
        label = ", ".join(parts) or source.experiment.name
        if source.step is not None:
            label += f" @{source.step}"
        n = sum(other.split(" (")[0] == label for other in named) + 1
        named[label if n == 1 else f"{label} ({n})"] = source
    return [source._replace(label=label) for label, source in named.items()]


def chosen(split: Split | Folder, n: int, experiment: Experiment) -> tuple[Tensor, Tensor]:
    """n images at equal distances, or all if there are fewer; sorted by class, all classes have
    their share.

    Shape: (n, H, W, 3) uint8, (n,).
    """
    count = len(split.labels)
    n = min(n, count)
    rows = (2 * np.arange(n) + 1) * count // (2 * n)
    if isinstance(split, Split):
        return torch.from_numpy(split.images[rows]), torch.from_numpy(split.labels[rows])
    size = experiment.test_size or STEMS[experiment.stem_].size
    views = FolderImages(split, size, experiment.crop, experiment.seed)
    images, labels = zip(*(views[int(i), -1] for i in rows), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])


def subject(source: Source, batch: Batch) -> Subject:
    """Build the network, give it its weights, and read its images.

    Raises:
        UserError: the images are missing, or the checkpoint is of another network.
    """
    plain = replace(
        source.experiment, compile=False, recompute=0, recompute_bn=False, kernels="eager"
    )
    if source.checkpoint:
        _, task, data = restore(source.checkpoint, plain)
    else:
        task, data = build(plain)
    dtype = DTYPES[batch.precision]
    some, labels = chosen(data.train, batch.images, plain)
    test, test_labels = chosen(data.test, batch.test_images, plain)
    test_x = task.normalize(test)
    task.to(dtype)
    net = task.net.train(batch.bn == "batch")
    return Subject(net, task.normalize(some), labels, test_x, test_labels, batch)
