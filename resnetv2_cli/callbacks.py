"""Callbacks around the training steps: metrics and checkpoints."""

import math
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.utils import get_total_norm

from resnetv2_cli.checkpoint import WholeFiles, left_in, read
from resnetv2_cli.config import Experiment
from resnetv2_cli.csvlog import CSVMetrics
from resnetv2_cli.errors import Diverged, NotSaved, UserError
from resnetv2_cli.manifest import Manifest
from resnetv2_cli.nonfinite import IN_A_ROW, began
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.task import Classification
from resnetv2_cli.telling import Tell

SAVE_SECONDS = 600.0  # last.ckpt is hardly older than this, however long an epoch is
ADVICE = "try a lower --lr, a longer --warmup or --precision 32-true; what was saved before is kept"
LEAST_SCALE = 2.0**-24  # float16's smallest number; a gradient's overflow halves the scale
AGREE_EVERY = 10  # iterations between exchanges in which several processes agree what to do


def agreed(trainer: Trainer, wish: int) -> int:
    """The maximum of ``wish`` over all processes: all do the same at the same iteration."""
    if trainer.world_size == 1:
        return wish
    number = torch.tensor(int(wish), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(number, reduce_op="max"))


def refuse_diverged(trainer: Trainer, task: Classification) -> None:
    """Refuse to go on with a training that no longer learns.

    Raises:
        Diverged: an iteration was not finite and is not to be skipped; too many in a row were
            skipped; or float16's gradients overflow at every loss scale.
    """
    _, *found = task.guard.read()
    first, in_a_row = (agreed(trainer, n) for n in found)
    if task.guard.stop and first >= 0:
        micro = task.experiment.accumulate
        loaded = islice(iter(trainer.datamodule.batches(first)), micro)  # type: ignore[attr-defined]
        batches = map(trainer.strategy.batch_to_device, loaded)
        place, places = began(task, first, batches, trainer.precision_plugin.forward_context)
        code = -agreed(trainer, -(len(places) if place is None else place))
        what = "gradient" if len(places) // 2 <= code < len(places) else "loss"
        where = places[code] if code < len(places) else ""
        says = f"it began in {where}" if where else "when run again, the iteration was finite"
        message = f"the {what} is not finite at iteration {first + 1}: {says}"
        raise Diverged(message, ADVICE, first + 1, where)
    if in_a_row >= min(IN_A_ROW, trainer.max_steps):
        message = f"{in_a_row} iterations in a row were not finite, and were skipped"
        raise Diverged(message, ADVICE, trainer.global_step - in_a_row + 1, "")
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and agreed(trainer, scaler.get_scale() < LEAST_SCALE):
        message = "float16's gradients overflow at every loss scale: nothing is learned"
        raise Diverged(message, ADVICE, trainer.global_step, "")


def refuse_infinite(trainer: Trainer, task: Classification) -> None:
    """Refuse to evaluate or save a network in which something is not finite.

    Raises:
        Diverged: there is such a thing.
    """
    refuse_diverged(trainer, task)
    largest = get_total_norm(task.net.parameters(), math.inf)
    if agreed(trainer, not bool(largest.isfinite())):
        step = trainer.global_step
        raise Diverged(f"the weights are not finite at iteration {step}", ADVICE, step, "")


def stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch completed an iteration."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Recorder(Callback):
    """Writes ``metrics.csv`` every ``log_every`` iterations, and after each evaluation.

    Raises:
        Diverged: the loss is no longer finite.
    """

    def __init__(self, csv: CSVMetrics, speed: CSVMetrics, log_every: int, scored: str) -> None:
        self.csv, self.speed, self.log_every, self.scored = csv, speed, log_every, scored
        self.latest: dict[str, float] = {}
        self.mark: float | None = None  # when the images in ``sums`` after ``before`` began
        self.before = 0.0  # images in ``sums`` from before a resume
        self.lr = 0.0
        self.kept: torch.Tensor | None = None
        self.non_finite = torch.tensor([0, -1, 0])

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.kept, "non_finite": self.non_finite}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["sums"]
        self.non_finite = state_dict.get("non_finite", self.non_finite)

    def on_save_checkpoint(self, trainer: Trainer, task: Classification, checkpoint: Any) -> None:
        # Each process gets its own sums back: added up now, they would be rounded differently from
        # those of a run that never stopped.
        sums = trainer.strategy.all_gather(task.sums).reshape(-1, 3)
        checkpoint["callbacks"][self.state_key] = {
            "sums": sums.cpu(), "non_finite": task.guard.found.cpu()
        }  # fmt: skip

    def on_fit_start(self, trainer: Trainer, task: Classification) -> None:
        task.guard.found.copy_(self.non_finite)  # even if no iteration is left

    def on_train_start(self, trainer: Trainer, task: Classification) -> None:
        self.before = 0.0
        if self.kept is not None:
            each = self.kept.reshape(-1, 3)
            if len(each) != trainer.world_size:  # the world size changed: the first takes all
                each = torch.zeros(trainer.world_size, 3, dtype=each.dtype)
                each[0] = self.kept.reshape(-1, 3).sum(0)
            task.sums.copy_(each[trainer.global_rank])
            self.before = float(each[:, 2].sum())
        self.mark = None

    def on_train_batch_start(
        self, trainer: Trainer, task: Classification, batch: Any, batch_idx: int
    ) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]
        if self.mark is None:  # after the capture of graphs, which is part of startup
            self.mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not stepped(trainer, batch_idx):
            return
        if step % self.log_every and step != trainer.max_steps:
            return
        sums = trainer.strategy.reduce(task.sums.clone(), reduce_op="sum")
        task.sums.zero_()
        refuse_diverged(trainer, task)
        loss, wrong, images = sums.tolist()
        now = time.perf_counter()
        assert self.mark is not None
        rate = (images - self.before) / (now - self.mark)
        self.mark, self.before = now, 0.0
        metrics = {
            "epoch": round(step / trainer.datamodule.steps_per_epoch, 4),  # type: ignore
            "lr": self.lr,
            "images_per_second": rate,
        }
        if images:  # else all were skipped
            metrics |= {"train_loss": loss / images, "train_error": 100 * wrong / images}
        self.latest |= metrics
        if skipped := task.guard.read()[0]:
            self.latest["skipped"] = skipped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_validation_start(self, trainer: Trainer, task: Classification) -> None:
        refuse_infinite(trainer, task)
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        if self.mark is not None:  # else no iteration ran: only the last evaluation was missing
            self.mark += time.perf_counter() - self.began
        self.evaluated(trainer, task)

    def evaluated(self, trainer: Trainer, task: Classification) -> None:
        """Log the last evaluation at its iteration."""
        error, loss, step = (task.scores[k] for k in ("error", "loss", "step"))
        epoch = round(step / trainer.datamodule.steps_per_epoch, 4)  # type: ignore
        metrics = {"epoch": epoch, f"{self.scored}_loss": loss, f"{self.scored}_error": error}
        self.latest |= metrics | {"evaluated": step}
        for logger in trainer.loggers:
            if logger is not self.speed:
                logger.log_metrics(metrics, step)


class Readings(Callback):
    """Counts in the manifest how often the test set was read, whichever command reads it. A reading
    counts from its first batch on; before that the command may have been stopped."""

    def __init__(self, manifest: Manifest, scored: str) -> None:
        self.manifest, self.scored = manifest, scored

    def on_validation_batch_start(
        self, trainer: Trainer, task: Classification, batch: Any, batch_idx: int
    ) -> None:
        if self.scored == "test":
            self.on_test_batch_start(trainer, task, batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, task: Classification, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and batch_idx == 0:
            with suppress(OSError):  # a full disk is reported by whatever cannot be saved
                self.manifest.count_reading()


class Keeper(Callback):
    """Saves ``last.ckpt`` after each evaluation, every ten minutes, and on leaving early, and keeps
    the one before it as ``previous.ckpt``; ``best.ckpt`` by the validation error; and
    ``step-N.ckpt`` every ``save_every`` iterations.

    The best on the test set is never kept: a test set must not be used to choose.
    ``metrics``: files whose lines must be on disk before a checkpoint newer than they are.
    """

    def __init__(
        self,
        folder: RunFolder,
        experiment: Experiment,
        metrics: list[CSVMetrics],
        tell: Tell,
    ) -> None:
        self.folder, self.experiment, self.metrics, self.tell = folder, experiment, metrics, tell
        self.best = math.inf
        self.saved_at, self.saved_step = time.monotonic(), -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def on_load_checkpoint(self, trainer: Trainer, task: Classification, checkpoint: Any) -> None:
        self.best = checkpoint["callbacks"][self.state_key]["best"]
        if not self.experiment.val:
            return
        with suppress(UserError):  # there is none yet, or it is damaged
            chosen = read(self.folder.best)
            # ``last.ckpt`` may be from before the final evaluation, which then chose ``best.ckpt``.
            if chosen["global_step"] <= checkpoint["global_step"]:
                self.best = chosen["callbacks"][self.state_key]["best"]

    def save(self, trainer: Trainer, task: Classification, *, leaving: bool = False) -> None:
        """Replace ``last.ckpt``. ``leaving``: the run ends here.

        Raises:
            Diverged: something in the network is not finite; earlier checkpoints stay.
            NotSaved: it cannot be written, and the run ends here or ``save_failure`` is ``stop``.
        """
        refuse_infinite(trainer, task)
        names: dict[str, Any] = {"before": self.folder.previous}
        if self.numbered(trainer.global_step):
            name = f"step-{trainer.global_step:08d}.ckpt"
            names["also"] = [self.folder.checkpoints / name]
        if self.write(trainer, self.folder.last, names, leaving):
            self.saved_step = trainer.global_step
        self.saved_at = time.monotonic()

    def numbered(self, step: int) -> bool:
        """Whether the checkpoint of this iteration is also kept under a numbered name."""
        return self.experiment.save_every > 0 and step % self.experiment.save_every == 0

    def write(
        self, trainer: Trainer, path: Path, names: dict[str, Any], leaving: bool = False
    ) -> bool:
        """Write the metrics, then a checkpoint; whether that succeeded, as all processes agree."""
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, WholeFiles)
        failure = self.flush() if trainer.is_global_zero else None
        if not agreed(trainer, failure is not None):
            trainer.save_checkpoint(path, storage_options=names)
            failure = writer.failure
        if not agreed(trainer, failure is not None):
            return True
        failure = failure or NotSaved(f"cannot save {path}", "the first process says why")
        if leaving or self.experiment.save_failure == "stop":
            raise failure
        if trainer.is_global_zero:
            self.tell(f"{failure}; {failure.hint}; training goes on (--save-failure stop ends it)")
        return False

    def flush(self) -> NotSaved | None:
        """Flush the metrics to disk; the error, if that fails."""
        try:
            for file in self.metrics:
                file.write(flush=True)
        except OSError as error:
            said = f"cannot write {file.path}: {error.strerror or error}"
            return NotSaved(said, left_in(self.folder.checkpoints))
        return None

    def on_validation_end(self, trainer: Trainer, task: Classification) -> None:
        if self.experiment.val and task.scores["error"] < self.best:
            before, self.best = self.best, task.scores["error"]
            if not self.write(trainer, self.folder.best, {}):
                self.best = before
        if trainer.state.fn == TrainerFn.FITTING:  # else last.ckpt is there already
            self.save(trainer, task, leaving=trainer.global_step == trainer.max_steps)

    def on_train_batch_end(
        self, trainer: Trainer, task: Classification, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not stepped(trainer, batch_idx) or evaluates(trainer, batch_idx):
            return  # saved after the evaluation, with its result
        step = trainer.global_step
        last = step == trainer.max_steps
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        if last or self.numbered(step) or (step % AGREE_EVERY == 0 and agreed(trainer, late)):
            self.save(trainer, task, leaving=last)


def evaluates(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an evaluation follows this micro-batch."""
    return (batch_idx + 1) % trainer.val_check_batch == 0  # type: ignore[operator]
