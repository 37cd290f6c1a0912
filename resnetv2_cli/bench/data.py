"""Images per second of each way to make input batches from stored images, without training.

To add one: a row in PATHS.
"""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from resnetv2_cli.bench.plain import forever, plain_loader
from resnetv2_cli.bench.turns import Arm, in_turns, rows, timed
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import folder, images, picture
from resnetv2_cli.data.augment import augmented
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.data.module import EpochMaker, ImageData, Parts, Stream
from resnetv2_cli.data.order import Schedule
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import UserError
from resnetv2_cli.inventory import apart
from resnetv2_cli.machine import ready
from resnetv2_cli.manifest import environment
from resnetv2_cli.plans import STEMS
from resnetv2_cli.run import images_of

Make = Callable[[ImageData, torch.device], Arm]


class InputPath(NamedTuple):
    """One way to read images; ``make(data, device)`` gives its arm, which reads a batch a step."""

    doc: str
    decoded: bool  # for images decoded in memory; else for image files
    make: Make


def small(data: ImageData) -> images.Split:
    """The training images, decoded in memory."""
    assert isinstance(data.train, images.Split)
    return data.train


def from_memory(data: ImageData, device: torch.device) -> Arm:
    """What ``train`` does: uint8 on the device; a batch is indexed and augmented as a whole."""
    e, n = data.experiment, data.train_images
    parts = Parts(Schedule(n, e.batch_size), 0, 10**9)
    stream = iter(Stream(small(data), parts, EpochMaker(n, e.seed, True, True), device))
    normalize = data.normalize.to(device)

    def step() -> torch.Tensor:
        batch = next(stream)
        assert batch.views is not None
        return augmented(normalize, batch.images, batch.views)

    return timed(step, device)


def from_pil(workers: int) -> Make:
    """torchvision's transforms on PIL images, in a DataLoader."""

    def make(data: ImageData, device: torch.device) -> Arm:
        batches = forever(plain_loader(small(data), data.experiment.batch_size, workers))
        return timed(lambda: [part.to(device) for part in next(batches)], device)

    return make


def photographs(data: ImageData) -> folder.Folder:
    """The training images, as files."""
    assert isinstance(data.train, folder.Folder)
    return data.train


def one_by_one(reader: Callable[[], Callable[[bytes], torch.Tensor]]) -> Make:
    """Files read one by one, as in a worker process, by the function that ``reader`` returns."""

    def make(data: ImageData, device: torch.device) -> Arm:
        read, files = reader(), itertools.cycle(photographs(data).files)
        return on_one_core(
            lambda: read(folder.content_of(next(files))), data.experiment.batch_size, device
        )

    return make


def on_one_core(read: Callable[[], torch.Tensor], images: int, device: torch.device) -> Arm:
    """An arm that stacks ``images`` results of ``read``, on one thread as in a worker process."""
    arm = timed(lambda: torch.stack([read() for _ in range(images)]), device)

    def run(steps: int) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return arm(steps)
        finally:
            torch.set_num_threads(threads)

    return run


def pil_crop() -> Callable[[bytes], torch.Tensor]:
    """The usual ImageNet training transforms, on PIL images."""
    usual = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*usual, transforms.PILToTensor()])
    return lambda content: transform(picture.rgb(content, "it"))


def tensor_crop() -> Callable[[bytes], torch.Tensor]:
    """torchvision's decoder and its transforms on tensors; PIL for files that it cannot decode."""
    # It warns that a later version will leave decoding to another package.
    warnings.filterwarnings("ignore", module="torchvision.io", category=DeprecationWarning)
    from torchvision.io import ImageReadMode, decode_jpeg

    usual = [transforms.RandomResizedCrop(224, antialias=True), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose(usual)

    def read(content: bytes) -> torch.Tensor:
        try:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return transform(decode_jpeg(data, mode=ImageReadMode.RGB))
        except RuntimeError:
            return transform(pil_to_tensor(picture.rgb(content, "it")))

    return read


def decode_alone(content: bytes) -> torch.Tensor:
    """Decode a whole picture with PIL and drop it: what every path costs that decodes it whole."""
    picture.rgb(content, "it")
    return torch.empty(0)


def ours(crop: str) -> Make:
    """What ``train`` does in each of its worker processes."""

    def make(data: ImageData, device: torch.device) -> Arm:
        found, e = photographs(data), data.experiment
        size, n = STEMS[e.stem_].size, len(found.files)
        view = PROTOCOLS["224"].view(size)
        views = folder.FolderImages(found, size, crop, e.seed, view, e.color)
        keys = ((i % n, i // n) for i in itertools.count())
        return on_one_core(lambda: views[next(keys)][0], e.batch_size, device)

    return make


PATHS = {
    "PIL, RandomResizedCrop": InputPath("one core", False, one_by_one(pil_crop)),
    "torchvision, RandomResizedCrop": InputPath("one core", False, one_by_one(tensor_crop)),
    "PIL, decode alone": InputPath("one core", False, one_by_one(lambda: decode_alone)),
    "resnetv2, scale": InputPath("one core", False, ours("scale")),
    "resnetv2, scale-aspect": InputPath("one core", False, ours("scale-aspect")),
    "torchvision, in the process": InputPath("PIL images, no worker", True, from_pil(0)),
    "torchvision, 2 workers": InputPath("PIL images, two workers", True, from_pil(2)),
    "resnetv2": InputPath("uint8 on the device, batch by batch", True, from_memory),
}


def prepared_arms(
    experiment: Experiment, folders: list[Path], device: torch.device
) -> dict[str, Arm]:
    """What ``train`` does with folders of the same photographs made by ``data prepare``."""
    arms = {}
    names = apart([place.resolve().name for place in folders], folders)
    for name, place in zip(names, folders, strict=True):
        data = images_of(replace(experiment, data_dir=str(place)))
        for crop in ("scale", "scale-aspect"):
            arms[f"{name}, {crop}"] = ours(crop)(data, device)
    return arms


def bench_data(
    experiment: Experiment, rounds: int, steps: int, prepared: list[Path]
) -> dict[str, Any]:
    """Images per second of each way to read the dataset, and the ratio to the first of PATHS.

    Each way reads photographs on one core; n workers are n times as fast. ``prepared``: folders of
    the same photographs made by ``data prepare``, timed in turn with the rest.

    Raises:
        UserError: the images are missing, or are not photographs where ``prepared`` is given.
    """
    if prepared and DATASETS[experiment.dataset].decoded:
        raise UserError("only photographs are prepared", "--dataset folder or imagenet")
    data = images_of(experiment)
    device = ready(experiment)
    paths = {name: p for name, p in PATHS.items() if p.decoded == data.dataset.decoded}
    arms = {name: path.make(data, device) for name, path in paths.items()}
    arms |= prepared_arms(experiment, prepared, device)
    turns = in_turns(arms, rounds, steps, device)
    return {
        "bench": "data",
        "dataset": experiment.dataset,
        "batch_size": experiment.batch_size,
        "rounds": rounds,
        "steps": steps,
        "arms": rows(turns, next(iter(arms)), experiment.batch_size),
        "environment": environment([device]),
    }
