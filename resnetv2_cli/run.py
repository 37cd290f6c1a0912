"""Train one experiment in a run folder, continue it, and evaluate what came of it."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.callbacks import Keeper, Leaver, Readings, Recorder
from resnetv2_cli.config import Experiment
from resnetv2_cli.csvlog import CSVMetrics
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.errors import Diverged, UserError
from resnetv2_cli.finetune import begin
from resnetv2_cli.machine import precision, trainer_of
from resnetv2_cli.manifest import Manifest, begun, environment
from resnetv2_cli.plot import curves
from resnetv2_cli.resume import extend, finished, same_run
from resnetv2_cli.runfolder import RunFolder, read_metrics, write_json
from resnetv2_cli.shortcuts import shortcut_class
from resnetv2_cli.task import Classification

FOLDER = "RESNETV2_RUN_FOLDER"  # tells the other processes of a run which folder the first took


def first_process() -> bool:
    """Whether this is the process that writes and reports, of one or of many."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def build(experiment: Experiment) -> tuple[Classification, ImageData]:
    """Network and images; the weights follow from the seed."""
    shortcut_class(experiment.shortcut)  # a mistake in it shows before images are read
    data = ImageData(experiment)
    data.prepare_data()
    data.setup()
    settled = experiment.settle(data.steps_per_epoch)
    settled = replace(settled, precision=precision(settled))  # type: ignore[arg-type]
    data.experiment = settled
    torch.manual_seed(settled.seed)
    return Classification(settled, data.classes, data.normalize), data


def loggers(experiment: Experiment, folder: RunFolder, scored: str) -> list[Logger]:
    """metrics.csv and speed.csv always; others by their flags.

    Raises:
        UserError: the package of another logger is not installed.
    """
    columns = ["step", "epoch", "lr", "train_loss", "train_error"]
    csv = CSVMetrics(folder.metrics, [*columns, f"{scored}_loss", f"{scored}_error"])
    chosen: list[Logger] = [csv, CSVMetrics(folder.speed, ["step", "images_per_second"])]
    try:
        if experiment.tensorboard:
            from lightning.pytorch.loggers import TensorBoardLogger

            chosen.append(TensorBoardLogger(folder.path, name="tensorboard", version=""))
        if experiment.wandb:
            from lightning.pytorch.loggers import WandbLogger

            chosen.append(WandbLogger(name=experiment.name, save_dir=folder.path))
    except ModuleNotFoundError as error:
        raise UserError(str(error), "pip install 'resnetv2-cli[loggers]'") from None
    return chosen


def silent(line: str) -> None:
    """Where nobody is told."""


def train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    resume: bool = False,
    seconds: float | None = None,
    display: list[Callback] | None = None,
    origins: dict[str, str] | None = None,
    tell: Callable[[str], None] = silent,
) -> dict[str, Any]:
    """Train to the last iteration, evaluate, and leave ``result.json``, which is returned.

    ``seconds``: save and leave cleanly when they are over. ``origins``: where settings came from.
    ``tell``: gets what happens, a line at a time.

    Raises:
        UserError: the images, devices, folder or checkpoint are not what is needed.
        Stopped: a signal came or the time was over; the run can be continued.
    """
    left = Left(seconds)
    if not first_process():
        return _train(experiment, folder, resume, left, display or [], origins or {}, silent)
    if not resume:
        folder.refuse_if_used()
    with folder.claimed():
        if not resume:
            folder.refuse_if_used()  # another process may have ended in it just now
        return _train(experiment, folder, resume, left, display or [], origins or {}, tell)


class Left:
    """Seconds that are left of those that were given, None where none were."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def __call__(self) -> float | None:
        return None if self.end is None else max(1.0, self.end - time.monotonic())


def _train(
    experiment: Experiment,
    folder: RunFolder,
    resume: bool,
    left: Left,
    display: list[Callback],
    origins: dict[str, str],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    if resume and (result := finished(folder, experiment)):
        tell(f"{folder.path} is finished: nothing is left to do; --steps trains it longer")
        draw(experiment, folder)
        return result
    task, data = build(experiment)
    e = task.experiment
    write = loggers(e, folder, data.scored)
    recorder = Recorder(write[0], write[1], e.log_every, data.scored)  # type: ignore[arg-type]
    keeper = Keeper(folder, e, write[:2], tell)  # type: ignore[arg-type]
    readings = Readings(folder.manifest, data.scored)
    steps_between = max(1, round(e.eval_every * data.steps_per_epoch))
    trainer = trainer_of(
        e,
        max_steps=e.steps,
        accumulate_grad_batches=e.accumulate,
        val_check_interval=min(steps_between, e.steps) * e.accumulate,
        check_val_every_n_epoch=None,
        log_every_n_steps=10**9,
        logger=write,
        callbacks=[readings, recorder, *display, keeper, Leaver(keeper, left())],
        default_root_dir=folder.path,
    )
    if not resume and first_process():
        folder.create(e, begun(experiment, e, origins, data.facts))
    last = _continue(task, data, folder, tell) if resume else None
    if last is None:
        for line in begin(task):
            tell(line)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
    except Diverged as error:
        if trainer.is_global_zero:
            said = {"reason": str(error), "diverged": True}
            said |= {"iteration": error.iteration, "where": error.where}
            write_json(folder.failed, said)
        raise
    if task.scores.get("step") != e.steps:  # the last iteration was not at the end of an epoch
        trainer.validate(task, datamodule=data, verbose=False, weights_only=True)
    if data.scored == "val":  # chosen without the test images, which are now read the first time
        chosen = checkpoints.read(folder.best)
        checkpoints.load_weights(task, chosen, folder.best)
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        task.scores["step"] = chosen["global_step"]
    if not trainer.is_global_zero:
        return {}
    recorder.csv.write(flush=True)
    return finish(task, data, folder)


def _continue(
    task: Classification, data: ImageData, folder: RunFolder, tell: Callable[[str], None]
) -> Path | None:
    """The checkpoint to continue from, after a look at what is in it; None if there is none yet.

    Raises:
        UserError: it is of another run than the folder's, or the images are others.
    """
    saved, e = folder.experiment(), task.experiment
    found = checkpoints.newest(folder.checkpoints, folder.last, tell)
    path, held = found or (None, {})
    if path is None:  # it was killed before its first
        tell("there is no checkpoint yet: it begins again")
    else:
        same_run(path, held, e, data.digest)
        checkpoints.load_weights(task, held, path)
    if first_process():
        step = held.get("global_step", 0)
        extended = extend(saved, e, step, tell)
        changed = {k: v for k, v in asdict(e).items() if getattr(saved, k) != v}
        folder.go_on(e, step, changed, extended)
    return path


def finish(task: Classification, data: ImageData, folder: RunFolder) -> dict[str, Any]:
    """Write ``result.json`` and ``curves.png``.

    The headline is the test error of the last iteration, or of the one that was chosen on the
    training images held out.
    """
    e, scores, trained = task.experiment, task.scores, read_metrics(folder.metrics)
    said = folder.manifest.read()
    extended = [r["extended"] for r in said.get("resumes", []) if r.get("extended")]
    result = {
        "name": e.name,
        "test_error": scores["error"],
        "test_top5_error": scores["top5_error"],
        "test_loss": scores["loss"],
        "test_images": scores["images"],
        "test_step": scores["step"],
        "train_loss": trained["train_loss"][-1][1],
        "train_error": trained["train_error"][-1][1],
        "steps": e.steps,
        "epochs": round(e.steps / data.steps_per_epoch, 4),
        "train_images": data.train_images,
        "parameters": sum(p.numel() for p in task.net.parameters()),
        "seed": e.seed,
        "precision": precision(e),
        "data": data.digest,
        "test_set_readings": said.get("test_set_readings"),
        "extended": extended,
        "skipped_iterations": task.guard.read()[0],
        "environment": environment(),
    }
    write_json(folder.result, result)
    folder.failed.unlink(missing_ok=True)
    draw(e, folder)
    return result


def draw(experiment: Experiment, folder: RunFolder) -> None:
    """Draw ``curves.png``, unless it is there."""
    if not folder.curves.exists():
        curves({experiment.name: folder.metrics}, folder.curves)


def restore(
    path: Path, experiment: Experiment | None = None, **overrides: Any
) -> tuple[dict[str, Any], Classification, ImageData]:
    """A checkpoint, and its network with its weights, and its images; the experiment comes from the
    checkpoint alone unless one is given.

    Raises:
        UserError: the file is no checkpoint of this tool, or the images are missing.
    """
    saved = checkpoints.read(path)
    task, data = build(experiment or checkpoints.experiment_of(saved, **overrides))
    if list(data.classes) != saved["classes"]:
        ours, theirs = ", ".join(data.classes[:3]), ", ".join(saved["classes"][:3])
        raise UserError(
            f"{path} knows other classes ({theirs}, ...) than the images have ({ours}, ...)",
            "name the dataset that it was trained on",
        )
    checkpoints.load_weights(task, saved, path)
    return saved, task, data


def manifest_of(checkpoint: Path) -> Manifest | None:
    """The manifest of the run whose folder a checkpoint is in."""
    folder = RunFolder(checkpoint.absolute().parent.parent)
    return folder.manifest if folder.manifest.path.exists() else None


def evaluate(path: Path, **overrides: Any) -> tuple[dict[str, Any], Classification]:
    """Scores of a checkpoint on its test images; network and data settings come from it alone.

    Raises:
        UserError: the file is no checkpoint of this tool, or the images are missing.
    """
    saved, task, data = restore(path, **overrides)
    counted = [Readings(manifest, "test")] if (manifest := manifest_of(path)) else []
    e = checkpoints.experiment_of(saved, **overrides)
    trainer = trainer_of(e, logger=False, callbacks=counted)
    trainer.test(task, datamodule=data, verbose=False, weights_only=True)
    scores = task.scores | {"step": saved["global_step"]}
    expected = len(data.test.labels)
    assert scores["images"] == expected, f"{scores['images']} of {expected} images were counted"
    return scores, task
