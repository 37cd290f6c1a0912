"""Conversion of another code base's weights to a checkpoint of this tool."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.data.folder import classes_in
from resnetv2_cli.describe import skeleton
from resnetv2_cli.errors import UserError
from resnetv2_cli.foreign.names import filled, numbers
from resnetv2_cli.foreign.sources import SOURCES, UNIT, Network, Source
from resnetv2_cli.plans import BLOCKS, IMAGENET
from resnetv2_cli.weightfile import sha256

PARTS = ("weight", "bias", "running_mean", "running_var")
WNIDS = Path(__file__).parent.parent / "data" / "imagenet_classes.txt"
BN = nn.BatchNorm2d(1).eps


class Imported(NamedTuple):
    """A network of this tool, and what it was made from."""

    experiment: Experiment
    weights: dict[str, Tensor]  # of ResNet, float64
    classes: int
    network: Network


def imported(given: Mapping[str, Tensor], source: str, file: str = "the file") -> Imported:
    """Return this tool's exact equivalent of the network that another code base's tensors make.

    Raises:
        UserError: there is none; says what differs.
    """
    row = SOURCES[source]
    network = recognized(given, row, Path(file).name, f"{file}, from {source}")
    key = head(given, network, file)
    experiment = experiment_of(given, network, file)
    classes = len(given[key])
    weights = translated(experiment, classes, given, network, row.shapes, file)
    return Imported(experiment, weights, classes, network)


def recognized(names: Iterable[str], source: Source, file: str, where: str) -> Network:
    """Return the network of a source whose tensors have these names.

    Raises:
        UserError: the network has no counterpart here, with the reason; or it is unknown.
    """
    names = list(names)

    def like(has: str, lacks: str) -> bool:
        there = any(re.search(has, name) for name in names)
        return there and not (lacks and any(re.search(lacks, name) for name in names))

    for refusal in source.refusals:
        if like(refusal.has, refusal.lacks) and re.search(refusal.file, file):
            raise UserError(f"{where}, cannot be imported: {refusal.why}", source.doc)
    for network in source.networks:
        if like(network.has, network.lacks):
            return network
    seen = ", ".join(names[:3])
    raise UserError(f"{where}, is not a known network: it has {seen}, ...", source.doc)


def head(given: Mapping[str, Tensor], network: Network, file: str) -> str:
    """The name of the classifier's weights.

    Raises:
        UserError: the file has none.
    """
    key = network.keys["head.fc"] + ".weight"
    if key not in given or given[key].ndim < 2:
        raise UserError(f"{file} has no classifier {key}", "import the whole network")
    return key


def places(given: Mapping[str, Tensor], network: Network, ending: str) -> list[dict[str, int]]:
    """Stage, unit and k of every 4-dimensional weight whose layer here is named ``ending``."""
    found = []
    for name, tensor in given.items():
        there = name.removesuffix(".weight")
        if there == name or tensor.ndim != 4:
            continue
        for ours, theirs in network.keys.items():
            if ours.endswith(ending) and (holes := numbers(theirs, there)) is not None:
                found.append(numbers(UNIT + ending, filled(ours, holes)) or {})
                break
    return found


def experiment_of(given: Mapping[str, Tensor], network: Network, file: str) -> Experiment:
    """The experiment that builds the network, with depth and block read from its layers.

    Raises:
        UserError: no network here has these numbers of units and convolutions.
    """
    convolutions = places(given, network, "residual.conv{k}")
    units = Counter(p["s"] for p in convolutions if p["k"] == 1)
    stages = tuple(units[s] for s in sorted(units))
    deep = max((p["k"] for p in convolutions), default=0)
    block = next((b for b, row in BLOCKS.items() if len(row.kernels) == deep), None)
    if network.settings["stem"] == "imagenet":
        depth = next((d for d, known in IMAGENET.items() if known == (block, stages)), None)
    else:
        even = len(stages) == 3 and len(set(stages)) == 1
        depth = deep * sum(stages) + 2 if even else None
    if depth is None or block is None:
        raise UserError(
            f"{file}: no network here has stages of {', '.join(map(str, stages)) or 'no'} units of "
            f"{deep} convolutions",
            "resnetv2 list shows what there is",
        )
    projections = len(places(given, network, "shortcut.carry.conv"))
    option = "A" if not projections else "C" if projections == sum(stages) else "B"
    settings: dict[str, Any] = {"option": option} | network.settings
    return Experiment(depth=depth, block=block, dataset="folder", **settings)


def translated(
    experiment: Experiment,
    classes: int,
    given: Mapping[str, Tensor],
    network: Network,
    shapes: str,
    file: str,
) -> dict[str, Tensor]:
    """Our tensor names and their values, in float64.

    A bias of their convolutions is subtracted from the mean of the BN that follows: (x + b) - m is
    x - (m - b). Another epsilon goes into the variance: v + e' is (v + e' - e) + e.

    Raises:
        UserError: a tensor is missing, left over or of another shape; names the first.
    """
    left, made = dict(given), dict[str, Tensor]()
    waiting = torch.zeros(())  # the bias of a convolution, until the loop reaches its BN
    deep = len(BLOCKS[experiment.block_].kernels)
    for name, module in skeleton(experiment, classes).named_modules():
        if not isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            continue
        there = called(name, network, deep)
        for part, ours in tensors_of(module):
            value = taken(left, f"{there}.{part}", tuple(ours.shape), shapes, file)
            made[f"{name}.{part}"] = value
        if isinstance(module, nn.Conv2d) and network.biased:
            waiting = optional(left, f"{there}.bias", (module.out_channels,), shapes, file)
        if isinstance(module, nn.BatchNorm2d):
            counted = optional(left, f"{there}.num_batches_tracked", (), shapes, file)
            made[f"{name}.num_batches_tracked"] = counted.long()
            made[f"{name}.running_mean"] -= waiting
            made[f"{name}.running_var"] += network.epsilon - BN
            waiting = torch.zeros(())
    if left:
        raise UserError(
            f"{file} has {next(iter(left))}, which the network here lacks",
            f"{len(left)} of its tensors would be left over",
        )
    if network.bgr:
        made["stem.conv.weight"] = made["stem.conv.weight"].flip(1)
    return made


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A layer's parameters and BN's running statistics, without its count of batches."""
    there = [(part, getattr(module, part, None)) for part in PARTS]
    return [(part, tensor) for part, tensor in there if tensor is not None]


def called(name: str, network: Network, deep: int) -> str:
    """The other code base's name of our layer; ``deep``: K, the number of weight layers of F."""
    for ours, theirs in network.keys.items():
        if (holes := numbers(ours, name)) is not None:
            return filled(theirs, holes | {"K": deep})
    raise AssertionError(f"no name for {name}")  # the tests import every kind of network


def taken(
    left: dict[str, Tensor], name: str, shape: tuple[int, ...], shapes: str, file: str
) -> Tensor:
    """Remove a tensor from ``left`` and return it in float64.

    Raises:
        UserError: it is missing, or its shape is not ours.
    """
    value = left.pop(name, None)
    if value is None:
        raise UserError(f"{file} has no {name}, which the network here needs", "is it complete?")
    if value.ndim == len(shape) + 2 and value.shape[len(shape) :] == (1, 1):
        value = value.flatten(1)  # a classifier written as a 1x1 convolution
    if tuple(value.shape) != shape:
        raise UserError(f"{file}: {name} is {tuple(value.shape)} there and {shape} here", shapes)
    return value.double().clone()


def optional(
    left: dict[str, Tensor], name: str, shape: tuple[int, ...], shapes: str, file: str
) -> Tensor:
    """The same as ``taken``, or zeros if there is no such tensor."""
    return taken(left, name, shape, shapes, file) if name in left else torch.zeros(shape)


def class_names(classes: int, stem: str, given: Path | None) -> tuple[str, tuple[str, ...]]:
    """The dataset, and its classes in the order of the logits.

    ``given``: a text file with one class per line, or a folder of class folders, which are sorted
    by name. Without it, the classes of CIFAR or ImageNet if their number fits.

    Raises:
        UserError: the network has another number of classes, one is named twice, nothing names
            them, or the file is not text.
    """
    if given is None:
        known = {
            ("cifar", 10): ("cifar10", DATASETS["cifar10"].classes),
            ("cifar", 100): ("cifar100", DATASETS["cifar100"].classes),
            ("imagenet", 1000): ("imagenet", tuple(WNIDS.read_text(encoding="utf-8").split())),
        }
        if (stem, classes) not in known:
            hint = "--classes FILE, one name per line, or a folder with one folder per class"
            raise UserError(f"the network has {classes} classes, and nothing names them", hint)
        return known[stem, classes]
    if given.is_dir():
        inside = given / "train" if (given / "train").is_dir() else given
        names = tuple(classes_in(inside))
    else:
        try:
            lines = given.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{given} is no text", "one name per line, in UTF-8") from None
        names = tuple(filter(None, map(str.strip, lines)))
    if len(names) != classes or len(set(names)) != classes:
        what = f"{len(names)} classes" if len(names) == len(set(names)) else "a class twice"
        raise UserError(f"{given} names {what}, and the network has {classes}", "one name per line")
    return "folder", names


def checkpoint(
    made: Imported, source: str, file: Path, classes: Path | None, normalize: Any = None
) -> dict[str, Any]:
    """The checkpoint of an imported network, as ``checkpoint.read`` expects it.

    It has the source's normalization unless another is given. Its step is 0: it was never trained
    here.

    Raises:
        UserError: the classes are not known.
    """
    dataset, names = class_names(made.classes, made.experiment.stem_, classes)
    experiment = replace(made.experiment, dataset=dataset)  # type: ignore[arg-type]
    weights = {
        f"net.{name}": value if value.dtype == torch.int64 else value.float()
        for name, value in made.weights.items()
    }
    normalize = normalize or made.network.normalization(made.classes)
    for name, values in zip(("mean", "std"), normalize, strict=True):
        weights[f"normalize.{name}"] = torch.tensor(values)[:, None, None]
    return {
        "state_dict": weights,
        "experiment": asdict(experiment),
        "classes": list(names),
        "global_step": 0,
        "imported": {
            "from": source,
            "network": made.network.doc,
            "file": file.name,
            "sha256": sha256(file),
        },
    }
