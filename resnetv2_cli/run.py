"""Train one experiment in a run folder, continue it, and evaluate the result."""

import math
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

OF_EACH = ("data_dir", "workers", "weights")  # settings that may differ between a run's processes
FOLDER = "RESNETV2_RUN_FOLDER"  # tells the processes that the first one launches where the run is


def first_process() -> bool:
    """Whether this process, alone or one of many, is the one that writes and reports."""
    know_rank()
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def images_of(
    experiment: Experiment, learned: tuple[str, ...] = (), tell: Tell = silent
) -> ImageData:
    """The images of an experiment, read or found. The others: as in ``ImageData``."""
    data = ImageData(experiment, learned, tell, processes(experiment))
    data.setup()
    return data


def build(
    experiment: Experiment, learned: tuple[str, ...] = (), tell: Tell = silent
) -> tuple[Classification, ImageData]:
    """Network and images; the weights follow from the seed. The others: as in ``ImageData``."""
    shortcut_class(experiment.shortcut)  # a mistake in it shows before images are read
    refuse_broken(experiment.unit, experiment.block_, experiment.stem_)
    data = images_of(experiment, learned, tell)
    settled = experiment if learned else experiment.settle(data.steps_per_epoch)
    settled = replace(settled, precision=precision(settled))  # type: ignore[arg-type]
    data.experiment = settled
    torch.manual_seed(settled.seed)
    return Classification(settled, data.classes, data.normalize), data


def trainer_for(
    task: Classification,
    data: ImageData,
    folder: RunFolder,
    leaver: Leaver,
    display: list[Callback],
    tell: Tell = silent,
    **more: Any,
) -> tuple[L.Trainer, list[CSVMetrics]]:
    """The Trainer of a run with its callbacks, and its files of metrics: ``metrics.csv`` and
    ``speed.csv``. ``more``: arguments of the Trainer in place of the run's own."""
    e = task.experiment
    columns = ["step", "epoch", "lr", "train_loss", "train_error"]
    csv = CSVMetrics(folder.metrics, [*columns, f"{data.scored}_loss", f"{data.scored}_error"])
    files = [csv, CSVMetrics(folder.speed, ["step", "images_per_second"])]
    leaver.keeper = Keeper(folder, e, files, tell)
    recorder = Recorder(files[0], files[1], e.log_every, data.scored)
    readings = Readings(folder.manifest, data.scored)
    steps_between = max(1, round(e.eval_every * data.steps_per_epoch))
    usual = {
        "max_steps": e.steps,
        "accumulate_grad_batches": e.accumulate,
        "val_check_interval": min(steps_between, e.steps) * e.accumulate,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 10**9,
        "logger": [*files, *loggers(e, folder)],
        "callbacks": [recorder, readings, *display, leaver.keeper, leaver],
        "default_root_dir": folder.path,
    }
    return trainer_of(e, **usual | more), files


def loggers(experiment: Experiment, folder: RunFolder) -> list[Logger]:
    """The loggers that flags ask for.

    Raises:
        UserError: the package of one of them is not installed.
    """
    chosen: list[Logger] = []
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
    """Train to the last iteration, evaluate, write ``result.json`` and return its content.

    ``seconds``: save and leave cleanly when they are over. ``origins``: where settings came from.
    ``tell``: gets progress messages, a line at a time. ``meeting``: each of several processes has
    entered it before, and hears there of the others' errors, before this call and in it.

    Raises:
        UserError: the images, devices, folder or checkpoint are not what is needed, or several
            processes would begin from different states.
        Stopped: a signal came or the time was up; the run can be continued.
    """
    go = partial(
        _train,
        experiment,
        folder,
        resume=resume,
        deadline=math.inf if seconds is None else time.monotonic() + seconds,
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
            folder.refuse_if_used()  # another process may have just ended in it
        return go(tell=tell)


def _train(
    experiment: Experiment,
    folder: RunFolder,
    *,
    resume: bool,
    deadline: float,
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
    leaver = Leaver(deadline)
    trainer, files = trainer_for(task, data, folder, leaver, display, tell)
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
    for file in files:  # even if no iteration is left: a line may be cut short
        file.start(step)
    with leaver:
        task.engage(trainer.strategy.root_device, tell)
        _fit(trainer, task, data, folder, last)
        others = by_others(trainer, task, data)
    if not trainer.is_global_zero:
        return {}
    files[0].write(flush=True)
    return finish(task, data, folder, others)


def _fit(
    trainer: L.Trainer, task: Classification, data: ImageData, folder: RunFolder, last: Path | None
) -> None:
    """Train to the last iteration, and evaluate what the result reports."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=last, weights_only=True)
    except Diverged as error:
        if trainer.is_global_zero:
            said = {"reason": str(error), "diverged": True}
            said |= {"iteration": error.iteration, "where": error.where}
            jsonfile.write(folder.failed, said)
        raise
    if task.scores.get("step") != task.experiment.steps:  # no evaluation was due at the end
        trainer.validate(task, datamodule=data, verbose=False, weights_only=True)
    if data.scored == "val":  # the test images are read only now, after the choice
        chosen = checkpoints.read(folder.best)
        checkpoints.load_weights(task, chosen, folder.best)
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        task.scores["step"] = chosen["global_step"]


def fit_views(task: Classification) -> None:
    """Refuse protocols under which the network would see images that do not fit it.

    Raises:
        UserError: what the network would see under one of the protocols does not fit it.
    """
    for protocol in task.experiment.protocols:
        view_of(task.experiment, task.normalize, protocol)


def by_others(
    trainer: L.Trainer, task: Classification, data: ImageData
) -> dict[str, dict[str, float]]:
    """The test ``error`` and ``top5_error`` (percent), ``loss`` (nats) and number of ``not_finite``
    images under each protocol but the first, whose scores the task keeps."""
    kept, found, n = task.scores, {}, len(data.test.labels)
    what = ("error", "top5_error", "loss", "not_finite")
    for protocol in task.experiment.protocols[1:]:
        data.protocol = protocol
        trainer.test(task, datamodule=data, verbose=False, weights_only=True)
        assert task.scores["images"] == n, f"{task.scores['images']} of {n} images were counted"
        found[protocol] = {name: task.scores[name] for name in what}
    task.scores, data.protocol = kept, ""
    return found


def _found(
    task: Classification, data: ImageData, folder: RunFolder, tell: Tell
) -> tuple[Path | None, int]:
    """The checkpoint to continue from, checked, and its iteration; None and 0 if there is none yet.

    Raises:
        UserError: it is of another run than the folder's, or the images or the user's own code
            have changed.
    """
    found = checkpoints.newest(folder.checkpoints, folder.last, tell)
    if found is None:  # it was killed before its first
        tell("there is no checkpoint yet: training starts over")
        return None, 0
    path, held = found
    for name in rewritten(task.experiment, folder.manifest.read()):
        hint = f"put back the code that is in {folder.manifest.path}, or begin a new run"
        raise UserError(f"{name} has changed since the run began", hint)
    planned = replace(task.experiment, steps=folder.experiment().steps)
    same_run(path, held, planned, data.digest, folder.manifest.lengths())
    checkpoints.load_weights(task, held, path)
    return path, held["global_step"]


def state(experiment: Experiment, data: ImageData, last: Path | None, step: int) -> dict[str, Any]:
    """The state that several processes must all begin from, keyed by its names in messages."""
    return {
        "all done": False,
        "iteration": step,
        "a checkpoint of SHA-256": seal_of(last)[1] if last else None,
        "images of SHA-256": data.digest,
        **{k: v for k, v in asdict(experiment).items() if k not in OF_EACH},
    }


def _go_on(experiment: Experiment, folder: RunFolder, step: int, tell: Tell) -> None:
    """Record that the run is continued after iteration ``step``, and with which changes."""
    saved = folder.experiment()
    extended = extend(saved, experiment, step, folder.manifest.extensions(), tell)
    changed = {k: v for k, v in asdict(experiment).items() if getattr(saved, k) != v}
    folder.go_on(experiment, step, changed, extended)


def finish(
    task: Classification, data: ImageData, folder: RunFolder, others: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Write ``result.json`` and ``curves.png``.

    The headline is the test error of the last iteration, or of the one chosen on the held-out
    training images, under the first protocol; the ``others`` stand below it.
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
    """Draw ``curves.png`` unless it exists."""
    if not folder.curves.exists():
        from resnetv2_cli.plot import curves  # matplotlib must not delay the first iteration

        curves({experiment.name: folder.metrics}, folder.curves)
