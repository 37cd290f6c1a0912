"""Train one experiment in a run folder, continue it, and evaluate what came of it."""

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import jsonfile
from resnetv2_cli.callbacks import Keeper, Readings, Recorder
from resnetv2_cli.cluster import Meeting, know_rank
from resnetv2_cli.config import Experiment
from resnetv2_cli.csvlog import CSVMetrics
from resnetv2_cli.data.module import ImageData, view_of
from resnetv2_cli.describe import parameters, refuse_one_value
from resnetv2_cli.errors import Diverged, UserError
from resnetv2_cli.files import seal_of
from resnetv2_cli.finetune import begin
from resnetv2_cli.leaving import Leaver
from resnetv2_cli.machine import devices_of, memory_line, precision, processes, trainer_of
from resnetv2_cli.manifest import READINGS, begun, environment, rewritten
from resnetv2_cli.resume import extend, finished, same_run
from resnetv2_cli.runfolder import OTHERS, RunFolder, read_metrics
from resnetv2_cli.shortcuts import shortcut_class
from resnetv2_cli.task import Classification
from resnetv2_cli.telling import Tell, silent
from resnetv2_cli.units import refuse_broken

OF_EACH = ("data_dir", "workers", "weights")  # what processes of one run need not share
FOLDER = "RESNETV2_RUN_FOLDER"  # tells those that the first process launches where the run is


def first_process() -> bool:
    """Whether this is the process that writes and reports, of one or of many."""
    know_rank()
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def build(
    experiment: Experiment, learned: tuple[str, ...] = (), tell: Tell = silent
) -> tuple[Classification, ImageData]:
    """Network and images; the weights follow from the seed. The others: as of ``ImageData``."""
    shortcut_class(experiment.shortcut)  # a mistake in it shows before images are read
    refuse_broken(experiment.unit, experiment.block_, experiment.stem_)
    data = ImageData(experiment, learned, tell, processes(experiment))
    data.setup()
    settled = experiment if learned else experiment.settle(data.steps_per_epoch)
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
        why = str(error).partition(". HINT")[0].partition("\n")[0]
        raise UserError(f"no such logger: {why}", "pip install 'resnetv2-cli[loggers]'") from None
    return chosen


def train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    resume: bool = False,
    seconds: float | None = None,
    display: list[Callback] | None = None,
    origins: dict[str, str] | None = None,
    tell: Tell = silent,
    meeting: Meeting | None = None,
) -> dict[str, Any]:
    """Train to the last iteration, evaluate, and leave ``result.json``, which is returned.

    ``seconds``: save and leave cleanly when they are over. ``origins``: where settings came from.
    ``tell``: gets what happens, a line at a time. ``meeting``: entered before, by each of several
    processes, in which it hears of mistakes before and here.

    Raises:
        UserError: the images, devices, folder or checkpoint are not what is needed, or several
            processes would not begin from the same.
        Stopped: a signal came or the time was over; the run can be continued.
    """
    go = partial(
        _train,
        experiment,
        folder,
        resume=resume,
        left=Left(seconds),
        display=display or [],
        origins=origins or {},
        meeting=meeting or Meeting(),
    )
    if not first_process():
        return go(tell=silent)
    if not resume:
        folder.refuse_if_used()
    with folder.claimed():
        if not resume:
            folder.refuse_if_used()  # another process may have ended in it just now
        return go(tell=tell)


class Left:
    """Seconds that are left of those that were given, None where none were."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def __call__(self) -> float | None:
        return None if self.end is None else max(1.0, self.end - time.monotonic())


def _train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    resume: bool,
    left: Left,
    display: list[Callback],
    origins: dict[str, str],
    tell: Tell,
    meeting: Meeting,
) -> dict[str, Any]:
    if resume and (result := finished(folder, experiment)):
        meeting.agree(lambda: {"all done": True})
        tell(f"{folder.path} is finished: nothing is left to do; --steps trains it longer")
        draw(experiment, folder)
        return result
    tell(f"{experiment.name} -> {folder.path}, {precision(experiment)}")
    tell(memory_line(experiment))
    task, data = build(experiment, tell=tell)
    e = task.experiment
    write = loggers(e, folder, data.scored)
    recorder = Recorder(write[0], write[1], e.log_every, data.scored)  # type: ignore[arg-type]
    keeper = Keeper(folder, e, write[:2], tell)  # type: ignore[arg-type]
    readings = Readings(folder.manifest, data.scored)
    leaver = Leaver(keeper, left())
    steps_between = max(1, round(e.eval_every * data.steps_per_epoch))
    trainer = trainer_of(
        e,
        max_steps=e.steps,
        accumulate_grad_batches=e.accumulate,
        val_check_interval=min(steps_between, e.steps) * e.accumulate,
        check_val_every_n_epoch=None,
        log_every_n_steps=10**9,
        logger=write,
        callbacks=[recorder, readings, *display, keeper, leaver],
        default_root_dir=folder.path,
    )
    data.refuse_few(trainer.world_size)
    alone = data.one_at_a_time(trainer.world_size)
    if alone and not (e.sync_bn and trainer.world_size > 1):
        refuse_one_value(e, alone)
    last, step = _found(task, data, folder, tell) if resume else (None, 0)
    if last is None:
        for line in begin(task):
            tell(line)
    fit_views(task)  # before anything is written
    meeting.agree(lambda: state(e, data, last, step), last=False)
    if first_process():
        if resume:
            _go_on(e, folder, step, tell)
        else:
            folder.create(e, begun(experiment, e, devices_of(e), origins, data.facts))
    meeting.agree(dict)
    for file in write[:2]:  # also where no iteration is left: a line may be cut
        file.start(step)  # type: ignore[attr-defined]
    with leaver:
        task.engage(trainer.strategy.root_device, tell)
        _fit(trainer, task, data, folder, last)
        others = by_others(trainer, task, data)
    if not trainer.is_global_zero:
        return {}
    recorder.csv.write(flush=True)
    return finish(task, data, folder, others)


def _fit(
    trainer: L.Trainer, task: Classification, data: ImageData, folder: RunFolder, last: Path | None
) -> None:
    """Train to the last iteration, and evaluate what the result is of."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
    except Diverged as error:
        if trainer.is_global_zero:
            said = {"reason": str(error), "diverged": True}
            said |= {"iteration": error.iteration, "where": error.where}
            jsonfile.write(folder.failed, said)
        raise
    if task.scores.get("step") != task.experiment.steps:  # it was not at the end of an epoch
        trainer.validate(task, datamodule=data, verbose=False, weights_only=True)
    if data.scored == "val":  # chosen without the test images, which are now read the first time
        chosen = checkpoints.read(folder.best)
        checkpoints.load_weights(task, chosen, folder.best)
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        task.scores["step"] = chosen["global_step"]


def fit_views(task: Classification) -> None:
    """
    Raises:
        UserError: what evaluation sees by one of the protocols is no input of the network.
    """
    for protocol in task.experiment.protocols:
        view_of(task.experiment, task.normalize, protocol)


def by_others(
    trainer: L.Trainer, task: Classification, data: ImageData
) -> dict[str, dict[str, float]]:
    """``error``, ``top5_error`` (percent), ``loss`` (nats) and how many were ``not_finite`` on the
    test images by each protocol but the first, whose scores the task keeps."""
    kept, found, n = task.scores, {}, len(data.test.labels)
    what = ("error", "top5_error", "loss", "not_finite")
    for data.protocol in task.experiment.protocols[1:]:
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        assert task.scores["images"] == n, f"{task.scores['images']} of {n} images were counted"
        found[data.protocol] = {name: task.scores[name] for name in what}
    task.scores = kept
    return found


def _found(
    task: Classification, data: ImageData, folder: RunFolder, tell: Tell
) -> tuple[Path | None, int]:
    """The checkpoint to continue from, after a look at what is in it, and its iteration; None and 0
    if there is none yet.

    Raises:
        UserError: it is of another run than the folder's, or the images are others.
    """
    found = checkpoints.newest(folder.checkpoints, folder.last, tell)
    if found is None:  # it was killed before its first
        tell("there is no checkpoint yet: it begins again")
        return None, 0
    path, held = found
    for name in rewritten(task.experiment, folder.manifest.read()):
        hint = f"{folder.manifest.path} has what it was; or begin a new run"
        raise UserError(f"{name} has changed since the run began", hint)
    planned = replace(task.experiment, steps=folder.experiment().steps)
    same_run(path, held, planned, data.digest, folder.manifest.lengths())
    checkpoints.load_weights(task, held, path)
    return path, held["global_step"]


def state(experiment: Experiment, data: ImageData, last: Path | None, step: int) -> dict[str, Any]:
    """What each of several processes must begin from, by what a message calls it."""
    return {
        "all done": False,
        "iteration": step,
        "a checkpoint of SHA-256": seal_of(last)[1] if last else None,
        "images of SHA-256": data.digest,
        **{k: v for k, v in asdict(experiment).items() if k not in OF_EACH},
    }


def _go_on(experiment: Experiment, folder: RunFolder, step: int, tell: Tell) -> None:
    """Write down that the run is continued after iteration ``step``, and with which changes."""
    saved = folder.experiment()
    extended = extend(saved, experiment, step, folder.manifest.extensions(), tell)
    changed = {k: v for k, v in asdict(experiment).items() if getattr(saved, k) != v}
    folder.go_on(experiment, step, changed, extended)


def finish(
    task: Classification, data: ImageData, folder: RunFolder, others: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Write ``result.json`` and ``curves.png``.

    The headline is the test error of the last iteration, or of the one that was chosen on the
    training images held out; by the first of several protocols, and below it by the ``others``.
    """
    e, scores, trained = task.experiment, task.scores, read_metrics(folder.metrics)
    said = folder.manifest.read()
    result = {
        "name": e.name,
        "test_error": scores["error"],
        "test_top5_error": scores["top5_error"],
        "test_loss": scores["loss"],
        "test_images": scores["images"],
        "test_step": scores["step"],
        OTHERS: others,
        "train_loss": trained["train_loss"][-1][1],
        "train_error": trained["train_error"][-1][1],
        "steps": e.steps,
        "epochs": round(e.steps / data.steps_per_epoch, 4),
        "train_images": data.train_images,
        "classes": len(data.classes),
        "parameters": parameters(task.net),
        "seed": e.seed,
        "precision": precision(e),
        "data": data.digest,
        READINGS: said.get(READINGS),
        "extended": folder.manifest.extensions(),
        "skipped_iterations": task.guard.read()[0],
        "environment": environment(devices_of(e)),
    }
    jsonfile.write(folder.result, result)
    folder.failed.unlink(missing_ok=True)
    draw(e, folder)
    return result


def draw(experiment: Experiment, folder: RunFolder) -> None:
    """Draw ``curves.png``, unless it is there."""
    if not folder.curves.exists():
        from resnetv2_cli.plot import curves  # with matplotlib, which no first iteration waits for

        curves({experiment.name: folder.metrics}, folder.curves)
