"""Evaluation of checkpoints: their networks, their test images and their scores."""

from collections.abc import Sequence
from itertools import permutations, zip_longest
from pathlib import Path
from typing import Any

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.callbacks import Readings
from resnetv2_cli.checkpoint import PRECISE
from resnetv2_cli.cluster import Meeting
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.errors import UserError
from resnetv2_cli.finetune import refuse_another_architecture
from resnetv2_cli.leaving import Leaver
from resnetv2_cli.machine import trainer_of
from resnetv2_cli.manifest import Manifest
from resnetv2_cli.run import build, by_others, fit_views, state
from resnetv2_cli.runfolder import OTHERS, RunFolder
from resnetv2_cli.task import Classification


def restore(path: Path, **overrides: Any) -> tuple[dict[str, Any], Classification, ImageData]:
    """What a checkpoint or an export of one holds, its network with its weights, and the test
    images that it names.

    Raises:
        UserError: the file is no checkpoint of this tool, or the images are missing.
    """
    saved = checkpoints.network(path)
    tested = checkpoints.experiment_of(saved, **overrides)
    task, data = build(tested, tuple(saved["classes"]))
    fill(task, data, saved, path)
    return saved, task, data


def restore_as(path: Path, experiment: Experiment) -> tuple[Classification, ImageData]:
    """The network and all images of an experiment, with a checkpoint's weights.

    Raises:
        UserError: the file is no checkpoint of this tool, or the images are missing.
    """
    saved = checkpoints.network(path)
    task, data = build(experiment)
    fill(task, data, saved, path)
    return task, data


def fill(task: Classification, data: ImageData, saved: dict[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint, ``saved`` at ``path``, into a network.

    Raises:
        UserError: the checkpoint has other classes than the images, or another architecture.
    """
    if list(data.classes) != saved["classes"]:
        ours, theirs = (excerpt(a, b) for a, b in permutations([data.classes, saved["classes"]]))
        raise UserError(
            f"{path} knows other classes ({theirs}) than the images have ({ours})",
            "name the dataset that it was trained on",
        )
    try:
        checkpoints.load_weights(task, saved, path)
    except UserError:
        refuse_another_architecture(saved, task.experiment, path)  # names settings, if it can
        raise


def excerpt(classes: Sequence[str], others: Sequence[str]) -> str:
    """The number of classes, and the first ones that differ from the others."""
    first = next(n for n, pair in enumerate(zip_longest(classes, others)) if len({*pair}) > 1)
    named = [*classes[first : first + 3], *(["..."] if len(classes) > first + 3 else [])]
    shown = ", ".join(["...", *named] if first else named)
    return f"{len(classes)}: {shown}"


def manifest_of(checkpoint: Path) -> Manifest | None:
    """The manifest of the run that a checkpoint is in; None if it is in none: files of other tools
    are left alone.

    Raises:
        UserError: it cannot be read.
    """
    folder = RunFolder.of(checkpoint)
    return folder.manifest if folder.begun and folder.manifest.read() else None


def evaluate(
    path: Path, meeting: Meeting | None = None, **overrides: Any
) -> tuple[dict[str, Any], Classification]:
    """Score a checkpoint on its test images; network and data settings come from it alone.
    ``meeting``: as in ``train``.

    Raises:
        UserError: the file is no checkpoint of this tool, the images are missing or do not fit
            it, or several processes would not evaluate the same.
    """
    saved, task, data = restore(path, **overrides)
    counted = [Readings(manifest, "test")] if (manifest := manifest_of(path)) else []
    e = task.experiment
    fit_views(task)
    leaver = Leaver()
    trainer = trainer_of(e, logger=False, callbacks=[*counted, leaver])
    step = saved["global_step"]
    (meeting or Meeting()).agree(lambda: state(e, data, path, step))
    task.fuse(trainer.strategy.root_device)
    with leaver:
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        others = by_others(trainer, task, data)
    scores = task.scores | {"step": step, OTHERS: others, PRECISE: saved.get(PRECISE, 0)}
    expected = len(data.test.labels)
    assert scores["images"] == expected, f"{scores['images']} of {expected} images were counted"
    return scores, task
