"""The network that is looked at, the images it looks at, and what each topic finds."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import run
from resnetv2_cli.analysis import backward as back
from resnetv2_cli.analysis import forward as ahead
from resnetv2_cli.analysis.lesion import lesion
from resnetv2_cli.analysis.trace import Step, trace
from resnetv2_cli.config import Experiment, parsed
from resnetv2_cli.data.images import Split
from resnetv2_cli.errors import UserError
from resnetv2_cli.resnet import ResNet


@dataclass(frozen=True)
class Subject:
    """A network, with normalized training images (N, 3, H, W) and test images for lesions."""

    label: str
    net: ResNet
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    trained: bool

    def steps(self) -> tuple[list[Step], Tensor]:
        """Every unit's step in training mode and float64, and the loss.

        BN has the statistics of the batch in every pass, which couples its images; float64 is
        what makes an equation visible to rounding.
        """
        net = copy.deepcopy(self.net).double().train()
        steps, logits = trace(net, self.images.double())
        return steps, F.cross_entropy(logits, self.labels)


def subject(
    given: Experiment | Path, images: int, tests: int, **overrides: Any
) -> tuple[Subject, Experiment]:
    """A network at initialization, from its experiment, or trained, from its checkpoint.

    Raises:
        UserError: the images are not whole in memory, or the checkpoint is none.
    """
    saved = None
    if isinstance(given, Path):
        saved = checkpoints.read(given)
        experiment = checkpoints.experiment_of(saved, **overrides)
    else:
        experiment = given
    # One process, no arithmetic but float64; the rest of the engine is nothing to this.
    task, data = run.build(replace(experiment, precision="32-true", recompute=0, compile=False))
    if saved is not None:
        checkpoints.load_weights(task, saved, given)  # type: ignore[arg-type]
    if not isinstance(data.train, Split) or not isinstance(data.test, Split):
        hint = "--dataset cifar10, cifar100 or digits"
        raise UserError("analyze needs images that are whole in memory", hint)

    def batch(split: Split, n: int) -> tuple[Tensor, Tensor]:
        """Images from all over the split, which is sorted by class."""
        n = min(n, len(split.labels))
        rows = torch.arange(n) * len(split.labels) // n
        pixels = torch.from_numpy(split.images[rows.numpy()])
        return task.normalize(pixels), torch.from_numpy(split.labels[rows.numpy()]).long()

    name = experiment.name.removesuffix(f"-s{experiment.seed}")
    when = f"iteration {saved['global_step']:,}" if saved else "initialization"
    found = Subject(
        f"{name}, {when}",
        task.net,
        *batch(data.train, images),
        *batch(data.test, tests),
        trained=saved is not None,
    )
    return found, experiment


def other(text: str, experiment: Experiment) -> Experiment | Path:
    """What ``--compare`` names: a checkpoint, or an experiment with some settings changed.

    Raises:
        UserError: it is neither.
    """
    path = Path(text)
    if path.exists() or "=" not in text:
        return checkpoints.find(path)
    changed: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        changed[name.strip()] = parsed(name.strip(), value)
    # Another depth may have another block, unless that is said too.
    return replace(experiment, **({"block": None} if "depth" in changed else {}) | changed)


Topic = Callable[[Subject], dict[str, Any]]


def forward(subject: Subject) -> dict[str, Any]:
    with torch.no_grad():
        steps, _ = subject.steps()
    return ahead.forward(steps)


def shortcuts(subject: Subject) -> dict[str, Any]:
    with torch.no_grad():
        steps, _ = subject.steps()
    return ahead.shortcuts(steps)


def backward(subject: Subject) -> dict[str, Any]:
    steps, loss = subject.steps()
    return back.backward(steps, loss)


def paths(subject: Subject) -> dict[str, Any]:
    steps, loss = subject.steps()
    return back.paths(steps, loss)


def lesions(subject: Subject) -> dict[str, Any]:
    return lesion(copy.deepcopy(subject.net), subject.test_images, subject.test_labels)


TOPICS: dict[str, Topic] = {  # to add one: a function, its row, its picture in draw.PICTURES
    "forward": forward,
    "shortcuts": shortcuts,
    "backward": backward,
    "paths": paths,
    "lesion": lesions,
}


def analyze(subject: Subject, topics: list[str]) -> dict[str, Any]:
    """What each topic finds."""
    found: dict[str, Any] = {"network": subject.label, "images": len(subject.labels)}
    return found | {topic: TOPICS[topic](subject) for topic in topics}
