"""The images of one experiment as a LightningDataModule."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, images
from resnetv2_cli.data.augment import Normalize, statistics
from resnetv2_cli.data.catalog import DATASETS, SIZE
from resnetv2_cli.data.order import Epoch, Part, Schedule, epoch_order, share
from resnetv2_cli.data.protocols import PROTOCOLS, View
from resnetv2_cli.data.workers import decoded_by
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import expanded
from resnetv2_cli.plans import STEMS
from resnetv2_cli.telling import Tell, silent

EVAL_BATCH = 250  # small images in an evaluation batch
GPU_EVAL_BATCH = 1000  # on a GPU, which waits for kernel launches: a quarter as many suffice
EVAL_CROPS = 64  # crops of photographs in an evaluation batch


def view_of(experiment: Experiment, normalize: Normalize, protocol: str = "") -> View:
    """What a network sees of an image in evaluation: small images whole; of a photograph, the crops
    of ``protocol``, by default the experiment's first.

    Raises:
        UserError: they do not have the size of the mean image that came with the weights.
    """
    views = {name: row.view(STEMS[experiment.stem_].size) for name, row in PROTOCOLS.items()}
    protocol = protocol or experiment.protocols[0]
    view, by = views[protocol], f"with --protocol {protocol} "
    if DATASETS[experiment.dataset].decoded:
        views, view, by = {}, View(SIZE), ""
    mean = normalize.mean.shape[-1]
    if mean not in (1, view.side):
        fit = " or ".join(name for name, other in views.items() if other.side == mean)
        raise UserError(
            f"the mean image that the network subtracts is {mean}x{mean}; {by}it sees "
            f"{view.side}x{view.side}",
            f"--protocol {fit} fits" if fit else "weights of --normalize channel fit any size",
        )
    return view


def at_a_time(experiment: Experiment, view: View) -> int:
    """The number of images in an evaluation batch, each with all its crops."""
    most = EVAL_BATCH if DATASETS[experiment.dataset].decoded else EVAL_CROPS
    return most // view.crops


class Batch(NamedTuple):
    """images (N, H, W, 3) uint8, or (N, 10, H, W, 3) for ten crops; labels (N,); views: (N, 3) for
    crop and flip, or color changes (N, 3, 4), or None; weight: of the mean loss of these images in
    the mean over the whole batch."""

    images: Tensor
    labels: Tensor
    views: Tensor | None = None
    weight: float = 1.0


class Parts:
    """All parts that this process takes, from iteration ``start`` to ``stop``."""

    def __init__(self, schedule: Schedule, start: int, stop: int) -> None:
        self.schedule, self.start, self.stop = schedule, start, stop

    def __len__(self) -> int:
        # Lightning counts batches from the start of training, even in a resumed run.
        return self.stop * self.schedule.micro

    def __iter__(self) -> Iterator[Part]:
        for step in range(self.start, self.stop):
            yield from self.schedule.parts(step)


class Stream:
    """The training batches of images that are held in memory, on the training device.

    A batch is one indexing of tensors that are already there: no worker, no copy, no waiting.
    """

    def __init__(
        self, split: images.Split, parts: Parts, epoch: "EpochMaker", device: torch.device
    ) -> None:
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.parts, self.epoch, self.device = parts, epoch, device

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        drawn, current = -1, None
        for part in self.parts:
            if part.epoch != drawn or current is None:
                drawn, epoch = part.epoch, self.epoch(part.epoch)
                current = Epoch(epoch.order.to(self.device), epoch.views.to(self.device))
            chosen = current.order[part.start : part.stop]
            views = current.views[part.start : part.stop] if self.epoch.augment else None
            yield Batch(self.images[chosen], self.labels[chosen], views, part.weight)


class EpochMaker(NamedTuple):
    """Draws the order of an epoch from its number."""

    images: int
    seed: int
    flip: bool
    augment: bool

    def __call__(self, epoch: int) -> Epoch:
        return epoch_order(self.images, self.seed, epoch, self.flip)


class Sequence:
    """The evaluation batches of one process, from images held in memory."""

    def __init__(self, split: images.Split, rows: range, device: torch.device) -> None:
        self.images = torch.from_numpy(split.images[rows.start : rows.stop]).to(device)
        self.labels = torch.from_numpy(split.labels[rows.start : rows.stop]).to(device)
        self.size = GPU_EVAL_BATCH if device.type == "cuda" else EVAL_BATCH

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        yield from map(Batch, self.images.split(self.size), self.labels.split(self.size))


class FileStream:
    """Batches decoded from files by worker processes; ``weights``: of each batch, else 1."""

    def __init__(self, loader: DataLoader, weights: Iterator[float] | None) -> None:
        self.loader, self.weights = loader, weights

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        try:
            for pixels, labels, *changes in self.loader:
                weight = next(self.weights) if self.weights else 1.0
                yield Batch(pixels, labels, changes[0] if changes else None, weight)
        except UserError as error:  # a worker's has a traceback before its message, then the hint
            _, _, said = str(error).rpartition(f"{type(error).__name__}: ")
            message, _, hint = said.partition("\nhint: ")
            raise UserError(message.strip(), error.hint or hint.strip()) from None


def refuse_unshared(split: images.Split | folder.Folder, processes: int) -> None:
    """Refuse a split of fewer images than processes.

    Raises:
        UserError: there is not one image for each process; the run would wait forever.
    """
    if len(split.labels) < processes:
        raise UserError(
            f"{len(split.labels)} images cannot be shared among {processes} processes",
            f"use --devices {len(split.labels)} or fewer",
        )


class ImageData(L.LightningDataModule):
    """Training, validation and test images of an experiment.

    ``classes`` are known after ``setup``. ``normalize``: of training images alone, or ImageNet's.
    ``learned``: a checkpoint's classes; class folders then need only test images. ``protocol``:
    replaces the experiment's first in evaluation. ``tell``: called with a line on anything slow, or
    left out.
    ``processes``: how many share a batch, to count an epoch's batches before there is a trainer.
    """

    classes: tuple[str, ...]
    normalize: Normalize
    digest: str = ""  # of the images, or of their names if they are read from files
    train: images.Split | folder.Folder
    val: images.Split | folder.Folder
    test: images.Split | folder.Folder

    def __init__(
        self,
        experiment: Experiment,
        learned: tuple[str, ...] = (),
        tell: Tell = silent,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.experiment, self.learned, self.tell = experiment, learned, tell
        self.processes, self.protocol = processes, ""
        self.dataset = DATASETS[experiment.dataset]
        self.root = expanded(experiment.data_dir)
        self._ready = False

    def setup(self, stage: str | None = None) -> None:
        """Read the images.

        Raises:
            UserError: they are missing or incomplete, do not have the number of classes that was
                asked for, or are fewer than ``val`` or ``batch_size`` need.
        """
        if self._ready:
            return
        e = self.experiment
        if self.dataset.decoded:
            self.train, self.val, self.test = self._setup_images()
            self.classes = self.dataset.classes
            assert isinstance(self.train, images.Split)
            self.normalize = Normalize(*statistics(self.train, e.normalize))
        else:
            self.train, self.val, self.test = self._setup_folder()
            self.normalize = Normalize(folder.MEAN, folder.STD)
        if e.classes not in (None, len(self.classes)):
            names = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            raise UserError(
                f"{e.classes} classes were asked for, the images have {len(self.classes)}: {names}",
                "one folder is one class; leave --classes out to take them as they are",
            )
        if e.batch_size > self.train_images and not self.learned:
            raise UserError(
                f"the batch of {e.batch_size} is larger than the {self.train_images} training "
                "images",
                f"use --batch-size {self.train_images} or less",
            )
        self._ready = True

    def _setup_images(self) -> tuple[images.Split, images.Split, images.Split]:
        loaded = images.load(self.experiment.dataset, self.root, self.tell)
        self.digest = loaded.digest
        kept, held = self._hold_out(len(loaded.train.labels))
        train = images.Split(loaded.train.images[kept], loaded.train.labels[kept])
        val = images.Split(loaded.train.images[held], loaded.train.labels[held])
        return train, val, loaded.test

    def _setup_folder(self) -> tuple[folder.Folder, folder.Folder, folder.Folder]:
        if self.learned:
            nothing = folder.Folder([], torch.zeros(0, dtype=torch.int64), self.learned)
            test = folder.scan(self.root, "test", self.learned, "the checkpoint", self.tell)
            self.classes, self.digest = test.classes, folder.digest(test)
            return nothing, nothing, test
        train = folder.scan(self.root, "train", tell=self.tell)
        self.classes = train.classes
        test = folder.scan(self.root, "test", train.classes, tell=self.tell)
        self.digest = folder.digest(train, test)
        kept, held = self._hold_out(len(train.files))
        train, val = (
            folder.Folder([train.files[i] for i in rows], train.labels[rows], train.classes)
            for rows in (kept, held)
        )
        return train, val, test

    def _hold_out(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows kept and rows held out: one row from each of ``val`` equal stretches.

        Images are sorted by class, so each class gives its share; all seeds have the same split.
        """
        val = self.experiment.val
        if val >= n:
            raise UserError(f"cannot hold out {val} of {n} training images", f"--val 0 to {n - 1}")
        held = (np.arange(val) * n + n // 2) // max(val, 1)
        return np.setdiff1d(np.arange(n), held), held

    @property
    def train_images(self) -> int:
        """The number of training images."""
        return len(self.train.labels)

    @property
    def facts(self) -> dict[str, Any]:
        """What a manifest records about the images."""
        return {
            "dataset": self.experiment.dataset,
            "digest": self.digest,
            "digest_of": "pixels and labels" if self.dataset.decoded else "names of files",
            "train_images": self.train_images,
            "held_out_images": self.experiment.val,
            "test_images": len(self.test.labels),
            "steps_per_epoch": self.steps_per_epoch,
        }

    @property
    def steps_per_epoch(self) -> int:
        """The number of iterations that cover every training image once."""
        return self._schedule().steps_per_epoch

    @property
    def scored(self) -> str:
        """The split evaluated during training: ``val`` if images are held out, else ``test``."""
        return "val" if self.experiment.val else "test"

    def refuse_few(self, processes: int) -> None:
        """Refuse more processes than can share a batch, or the images that are evaluated.

        Raises:
            UserError: a batch, or a split to be evaluated, has too few images for them.
        """
        self._shared(0, processes)
        for split in (self.val, self.test) if self.experiment.val else (self.test,):
            refuse_unshared(split, processes)

    def one_at_a_time(self, processes: int) -> int | None:
        """The first iteration (from 1) in which one of ``processes`` gets one image at a time."""
        schedule = self._shared(0, processes)  # rank 0 has the smallest part: cuts round down
        for number in (1, min(self.experiment.steps, schedule.steps_per_epoch)):
            part = schedule.parts(number - 1)[0]
            if part.stop - part.start == 1:
                return number
        return None

    def _schedule(self) -> Schedule:
        trainer = self.trainer
        ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, self.processes)
        return self._shared(*ranks)

    def _shared(self, rank: int, ranks: int) -> Schedule:
        e = self.experiment
        if e.batch_size < e.accumulate * ranks:
            raise UserError(
                f"the batch of {e.batch_size} cannot be split into {e.accumulate} micro-batches "
                f"on {ranks} devices",
                "use a larger --batch-size",
            )
        return Schedule(self.train_images, e.batch_size, e.accumulate, rank, ranks)

    def train_dataloader(self) -> Stream | FileStream:
        """The batches from the trainer's step on, where a resumed run continues."""
        assert self.trainer is not None
        return self.batches(self.trainer.global_step)

    def batches(self, start: int) -> Stream | FileStream:
        """The batches from iteration ``start`` on."""
        e, trainer = self.experiment, self.trainer
        assert trainer is not None
        schedule = self._schedule()
        parts = Parts(schedule, start, e.steps)
        epoch = EpochMaker(self.train_images, e.seed, self.dataset.flip, e.augment)
        if isinstance(self.train, images.Split):
            return Stream(self.train, parts, epoch, trainer.strategy.root_device)

        def keys() -> Iterator[list[tuple[int, int]]]:
            drawn, order = -1, torch.empty(0)
            for part in parts:
                if part.epoch != drawn:
                    drawn, order = part.epoch, epoch(part.epoch).order
                view = part.epoch if e.augment else -1
                yield [(i, view) for i in order[part.start : part.stop].tolist()]

        return self._files(self.train, keys(), len(parts), (p.weight for p in parts))

    def val_dataloader(self) -> Sequence | FileStream:
        return self._scored(self.val if self.experiment.val else self.test)

    def test_dataloader(self) -> Sequence | FileStream:
        return self._scored(self.test)

    def _scored(self, split: images.Split | folder.Folder) -> Sequence | FileStream:
        """This process's share of a split, each image once: padding would count some twice."""
        trainer = self.trainer
        assert trainer is not None
        refuse_unshared(split, trainer.world_size)
        rows = share(len(split.labels), trainer.global_rank, trainer.world_size)
        if isinstance(split, images.Split):
            return Sequence(split, rows, trainer.strategy.root_device)
        n = at_a_time(self.experiment, view_of(self.experiment, self.normalize, self.protocol))
        starts = range(rows.start, rows.stop, n)
        keys = [[(i, -1) for i in range(s, min(s + n, rows.stop))] for s in starts]
        return self._files(split, keys, len(starts), None)

    def _files(
        self,
        split: folder.Folder,
        keys: Iterable[list[tuple[int, int]]],
        length: int,
        weights: Iterator[float] | None,
    ) -> FileStream:
        e, trainer = self.experiment, self.trainer
        assert trainer is not None
        size = STEMS[e.stem_].size
        view = PROTOCOLS["224"].view(size) if weights else view_of(e, self.normalize, self.protocol)
        loader: DataLoader = DataLoader(
            folder.FolderImages(split, size, e.crop, e.seed, view, e.color),
            batch_sampler=folder.Keys(keys, length),
            **decoded_by(e.workers),
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
        return FileStream(loader, weights)
