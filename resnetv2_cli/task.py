"""Classification as a LightningModule: loss, error rate, optimizer, and what makes a step fast."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from resnetv2_cli import compiling, graphs, joined, memory, threads
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import colors
from resnetv2_cli.data.augment import Normalize, augmented, in_one
from resnetv2_cli.data.catalog import DATASETS, side
from resnetv2_cli.data.module import Batch
from resnetv2_cli.data.order import share
from resnetv2_cli.iteration import Iteration
from resnetv2_cli.nonfinite import Guard, poisoned
from resnetv2_cli.optim import lr_factor, schedule, sgd
from resnetv2_cli.quantities import TOP
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.telling import Tell, silent

OWN = "BN and ReLU are PyTorch's own, which are slower: {}"  # the reason
OWN_CODE = "{} runs call by call; --graphs is faster, but runs its Python once"  # a user's class
CALLS = "iterations run call by call; --graphs is faster, but untried on several GPUs"


class Scores(Metric):
    """Sums over all images of all processes: counts of each (label, guess), top-5 hits, loss.

    Sums of counts, not means of batch means, so that no image weighs more than another. Logits that
    are not finite make no guess: a column after those of the classes counts them.
    """

    full_state_update = False
    confusion: Tensor
    top5: Tensor
    loss: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        counts = torch.zeros(classes, classes + 1, dtype=torch.int64)
        self.add_state("confusion", counts, dist_reduce_fx="sum")
        self.add_state("top5", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits (N, classes), labels (N,)."""
        logits = logits.float()
        finite = logits.isfinite().all(1)
        pairs = labels * (self.classes + 1) + logits.argmax(1).where(finite, self.classes)
        counts = torch.bincount(pairs, minlength=self.confusion.numel())
        self.confusion += counts.reshape(self.confusion.shape)
        best = logits.topk(min(TOP, self.classes)).indices
        self.top5 += ((best == labels[:, None]) & finite[:, None]).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")

    def compute(self) -> dict[str, Any]:
        """``error``, ``top5_error`` and ``class_errors`` in percent, ``loss`` in nats per image,
        the number of ``images``, how many are ``not_finite``, and ``confusion``, the counts: a row
        for each label, a column for each guess."""
        images = int(self.confusion.sum())
        right = int(self.confusion.diagonal().sum())
        return {
            "error": 100 * (images - right) / images,
            "top5_error": 100 * (images - int(self.top5)) / images,
            "loss": float(self.loss) / images,
            "images": images,
            "not_finite": int(self.confusion[:, -1].sum()),
            "confusion": self.confusion[:, :-1].tolist(),
            "class_errors": class_errors(self.confusion.tolist()),
        }


def class_errors(confusion: list[list[int]]) -> list[float | None]:
    """The error of each class, in percent; None for a class without images.

    ``confusion``: a row for each class, with its correct guesses on the diagonal.
    """
    return [
        100 * (sum(row) - row[i]) / sum(row) if any(row) else None
        for i, row in enumerate(confusion)
    ]


class Classification(L.LightningModule):
    """Training and evaluation of an image classifier.

    ``sums``: loss (nats), errors and images since they were last read. ``scores``: those of the
    last evaluation, with its ``step``.

    Shape: images (N, H, W, 3) uint8 -> logits (N, classes).
    """

    def __init__(
        self, experiment: Experiment, classes: tuple[str, ...], normalize: Normalize
    ) -> None:
        super().__init__()
        self.experiment, self.classes, self.normalize = experiment, classes, normalize
        self.net = ResNet(**experiment.architecture, classes=len(classes))
        self.net.segments = experiment.recompute
        self.net.activate(False, experiment.recompute_bn)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compiled = False
        self.augmented = self.looks()
        self.iteration: Iteration | None = None  # the one captured for replay
        self.replayed = False  # whether the current iteration is a replay
        self.replays: dict[torch.Size, graphs.Forward] = {}  # of the network, by shape of input
        self.tell: Tell = silent
        # Not a buffer: DDP would overwrite every process's sums with rank 0's.
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.guard = Guard(
            self.net,
            stop=experiment.non_finite == "stop",
            scaled=experiment.precision == "16-mixed",
        )
        self.finite = torch.ones((), dtype=torch.bool)  # whether this iteration's losses are
        self.counted = Scores(len(classes))
        self.scores: dict[str, Any] = {}
        self.frozen: list[nn.Module] = []

    def engage(self, device: torch.device, tell: Tell) -> None:
        """Switch on what makes a training step fast on a device, and report what is unavailable."""
        e, self.tell = self.experiment, tell
        if device.type == "cpu":
            memory.map_large()
            if advice := threads.advice():
                tell(advice)
        if e.compile:
            why = compiling.why_not(device)
            self.compiled = not why
            if self.compiled:
                compiling.compile_units(self.net)
                tell("the first iteration compiles the units, one of each shape")
                return
            tell(f"not compiled: {why}")
        if self.fuse(device) and (why := joined.why_not(device)):
            tell(OWN.format(why))

    def fuse(self, device: torch.device) -> bool:
        """Switch on the compiled operations if the device and the experiment use them; return
        whether they do."""
        fit = joined.by_itself(self.experiment.kernels, device.type)
        self.net.activate(fit, self.experiment.recompute_bn)
        return fit

    def record(self, optimizer: torch.optim.Optimizer, processes: int = 1) -> None:
        """Capture the training of whole batches as CUDA graphs, if wanted: the whole iteration, or
        else the network alone. Called with the network on its device and, in a continued run, with
        the momentum restored. What is unavailable is reported."""
        e, kind = self.experiment, self.device.type
        if not graphs.wanted(e.graphs, kind, processes, bool(e.own)):
            if e.graphs is None and kind == "cuda":
                self.tell(CALLS if processes > 1 else OWN_CODE.format(" and ".join(e.own.values())))
            return
        if why := graphs.why_not(
            self.device,
            micro_batches=e.accumulate,
            segments=e.recompute,
            sync_bn=e.sync_bn and processes > 1,
        ):
            self.tell(f"no CUDA graphs: {why}")
            return
        batch = self.noise(processes)
        joins = e.kernels == "auto" and not self.compiled
        if joins and (why := joined.why_not(self.device)):
            self.tell(OWN.format(why))
            joins = False
        for compiled in (True, False) if joins else (False,):
            if not (why := self.record_with(compiled, optimizer, batch, processes)):
                break
            graphs.tidy(self.device)
            self.tell(OWN.format(why) if compiled else f"no CUDA graphs: {why}")
        if kind == "cuda":  # on which only replays use the compiled operations
            self.augmented = self.looks()
            self.fuse(self.device)

    def record_with(
        self, compiled: bool, optimizer: torch.optim.Optimizer, batch: Batch, processes: int
    ) -> str:
        """Capture the whole iteration, or else the network, with the compiled operations or with
        PyTorch's; return why neither can be captured, or an empty string."""
        self.net.activate(compiled, self.experiment.recompute_bn)
        self.augmented = self.looks(compiled and self.device.type == "cuda")
        if not (whole := self.record_iteration(optimizer, batch, processes)):
            self.tell("iterations are replayed, each as one CUDA graph")
            return ""
        graphs.tidy(self.device)
        if why := self.record_network(batch):
            return why if why == whole else f"{whole}; the network alone: {why}"
        self.tell(f"the network is replayed as CUDA graphs; the whole iteration is not: {whole}")
        return ""

    def looks(self, in_a_kernel: bool = False) -> Callable[[Normalize, Tensor, Tensor], Tensor]:
        """The function that turns pixels, and what was drawn for them, into the input."""
        if not DATASETS[self.experiment.dataset].decoded:
            return colors.recolored
        return in_one if in_a_kernel else augmented

    def record_iteration(
        self, optimizer: torch.optim.Optimizer, batch: Batch, processes: int
    ) -> str:
        """Capture whole iterations for replay; return why they cannot be, or an empty string."""
        if processes > 1:
            return "the processes exchange gradients in it"
        if self.experiment.precision == "16-mixed":
            return "float16's loss is scaled, and the scale follows the gradients"
        iteration = Iteration(self, optimizer, batch)
        if not (why := iteration.record()):
            self.iteration = iteration
        return why

    def record_network(self, batch: Batch) -> str:
        """Capture the network for batches of this size; return why not, or an empty string."""
        x = self.normalize(batch.images)
        replay, why = graphs.record(self.net, x, self.experiment.precision)
        if replay is not None:
            self.replays[x.shape] = replay
        return why

    def noise(self, processes: int = 1) -> Batch:
        """A random batch, or this process's part of one, of the shape that is trained on."""
        e, decoded, on = self.experiment, DATASETS[self.experiment.dataset].decoded, self.device
        size = side(e.dataset, e.stem_)
        n = len(share(e.batch_size, self.global_rank, processes))
        pixels = torch.randint(256, (n, size, size, 3), dtype=torch.uint8, device=on)
        labels = torch.randint(len(self.classes), (n,), device=on)
        views = None
        if e.augment and decoded:
            views = torch.randint(2, (n, 3), device=on)
        elif e.augment and e.color != "none":
            views = torch.randn(n, 3, 4, device=on)
        return Batch(pixels, labels, views)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.normalize(images))

    def look(self, images: Tensor) -> Tensor:
        """Logits; of ten crops the logarithm of the mean softmax, as in [1] after AlexNet, where
        fb.resnet.torch has the mean of the logits.

        Shape: images (N, H, W, 3) or (N, 10, H, W, 3) uint8 -> (N, classes).
        """
        with compiling.eager() if self.compiled else nullcontext():
            if images.ndim == 4:
                return self(images)
            shares = self(images.flatten(0, 1)).float().log_softmax(1)
        views = images.shape[1]
        return shares.unflatten(0, (-1, views)).logsumexp(1) - math.log(views)

    def setup(self, stage: str) -> None:
        # Only in training: an analysis of the same network needs all its gradients.
        if stage == "fit":
            self.frozen = [self.net.part(name) for name in self.experiment.freeze_]
            for part in self.frozen:
                part.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def on_fit_start(self) -> None:
        self.sums, self.finite = self.sums.to(self.device), self.finite.to(self.device)
        self.guard.to(self.device)

    def on_fit_end(self) -> None:
        self.iteration = None  # its tensors are on the device that trained
        self.replays.clear()

    def on_train_start(self) -> None:
        # Saved rates follow the schedule that the run began with, which may have been shorter.
        scheduler = self.lr_schedulers()
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):  # type: ignore[union-attr]
            group["lr"] = base * lr_factor(self.experiment, self.global_step)
        self.record(scheduler.optimizer, self.trainer.world_size)  # type: ignore[union-attr]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        micro = batch_idx % self.experiment.accumulate
        self.draw(self.global_step, micro)
        self.replayed = self.iteration is not None and self.iteration.fits(batch)
        if micro == 0 and not self.replayed:
            self.begin()

    def begin(self) -> None:
        """Prepare the checks of an iteration, before it runs."""
        self.guard.begin()
        self.finite.fill_(True)

    def draw(self, step: int, micro: int) -> None:
        """Seed the generators by the seed and the step, so that no generator's state is saved."""
        # Hashes of tuples of ints have no salt: the bits of every run depend on CPython's.
        numbers = (self.experiment.seed, step, micro, self.global_rank)
        seed = hash(numbers) % 2**63
        # torch.manual_seed does the same, but records its stack for each absent kind of device,
        # which takes a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(seed)

    def through(self, x: Tensor) -> Tensor:
        """Run or replay the network. Shape: normalized (N, 3, H, W) -> logits (N, classes)."""
        return self.replays.get(x.shape, self.net)(x)

    def pixels(self, batch: Batch) -> Tensor:
        """The network's input from a batch, in training. Shape: -> (N, 3, H, W) float32."""
        if batch.views is None:
            return self.normalize(batch.images)
        return self.augmented(self.normalize, batch.images, batch.views)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.iteration and self.replayed:  # which leaves the next three methods nothing to do
            return self.iteration(batch, self.global_step)
        return self.loss(batch)

    def optimizer_zero_grad(self, *given: Any) -> None:
        if not self.replayed:
            super().optimizer_zero_grad(*given)

    def backward(self, loss: Tensor, *given: Any, **more: Any) -> None:
        if not self.replayed:
            super().backward(loss, *given, **more)

    def optimizer_step(self, *given: Any, **more: Any) -> None:
        if not self.replayed:
            return super().optimizer_step(*given, **more)
        [*_, closure] = given
        closure()  # the Trainer's, which calls the three methods above

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a micro-batch, for backward; adds what is logged to ``sums``."""
        logits = self.through(self.pixels(batch))
        smoothing = self.experiment.label_smoothing
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        with torch.no_grad():
            n, finite = len(batch.labels), loss.isfinite()
            wrong = (logits.argmax(1) != batch.labels).sum()
            images = torch.full_like(loss, n, dtype=torch.float64)
            sums = torch.stack([loss.double() * n, wrong.double(), images])
            self.sums += torch.where(finite, sums, 0.0)
            self.finite &= finite
        loss = poisoned(loss, finite)
        return loss if batch.weight == 1 else batch.weight * loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.guard.look(self.global_step, optimizer, self.finite)

    def _evaluate(self, batch: Batch) -> None:
        self.counted.update(self.look(batch.images), batch.labels)

    def _evaluated(self, split: str) -> None:
        self.scores = self.counted.compute() | {"step": self.global_step}
        self.counted.reset()
        # For callbacks that monitor them, over all processes already; loggers get the tool's own.
        told = {f"{split}_{name}": self.scores[name] for name in ("error", "top5_error", "loss")}
        self.log_dict(told, logger=False)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluated("val")

    def on_test_epoch_end(self) -> None:
        self._evaluated("test")

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.net, self.experiment)
        scheduler = schedule(optimizer, self.experiment)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain values only: the file must open without running anything that is in it.
        checkpoint["experiment"] = asdict(self.experiment)
        checkpoint["classes"] = list(self.classes)
        checkpoint["data"] = self.trainer.datamodule.digest  # type: ignore[attr-defined]
