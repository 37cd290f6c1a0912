"""What a network is made of, layer by layer, counted without computing anything."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from resnetv2_cli.anatomy import kinds
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import side
from resnetv2_cli.errors import UserError
from resnetv2_cli.fused import ONE_VALUE
from resnetv2_cli.paper import ELSEWHERE, TABLES, PaperTable, Row, percent, published
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import settings_in, settings_of, shortcut_class

GLOBAL = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)  # layers that see the whole image
COUNTED = "describe, --dry-run and --micro-batch auto count; train, eval and analyze do not"
CLASSES = 10  # of a described network, unless its dataset is known to have another number


class Uncounted(UserError):
    """The layers and memory of a network cannot be counted without computing."""


@contextmanager
def counting(experiment: Experiment) -> Iterator[None]:
    """Report code of the user's own that fails on the meta device, where there are no numbers.

    Raises:
        Uncounted: it looks at numbers, or fails there for another reason.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not experiment.own:
            raise
        said = str(error).partition("\n")[0]
        names = " and ".join(experiment.own.values())
        raise Uncounted(f"{names} cannot be counted without computing: {said}", COUNTED) from error


def skeleton(experiment: Experiment, classes: int = CLASSES) -> ResNet:
    """The network on the meta device: shapes and names, no memory and no weights."""
    with torch.device("meta"):
        return ResNet(**experiment.architecture, classes=classes)


def refuse_one_value(experiment: Experiment, iteration: int) -> None:
    """Check that BN can train in ``iteration``, which takes one image at a time.

    Raises:
        UserError: BN would see one value per channel, and so no variance. With code of the user's
            own that cannot be counted, only training finds this out.
    """
    net = skeleton(experiment).train()
    for name in experiment.freeze_:
        net.part(name).eval()
    size = side(experiment.dataset, experiment.stem_)
    with suppress(Uncounted), torch.no_grad(), counting(experiment):
        try:
            net(torch.empty(1, 3, size, size, device="meta"))
        except ValueError as error:
            if not str(error).startswith(ONE_VALUE):
                raise
            raise UserError(
                f"iteration {iteration} trains on one image at a time, of which BN has one value "
                "per channel, and so no variance",
                "use another --batch-size, or larger micro-batches; on several devices, --sync-bn",
            ) from None


def describe(experiment: Experiment, classes: int = CLASSES) -> dict[str, Any]:
    """A network's settings, counts, published errors, units and parts, as plain values.

    ``macs``: multiply-adds of one image. ``published``: test errors of this network, and of others
    with its unit and with its shortcut. ``units``: groups of consecutive units built alike, with
    what stands for h, F and f in each (Eqns. 1 and 2). ``parts``: stem, units and head, each with
    output shape (C, H, W), parameters, MACs and ``receptive_field``, the side in pixels of the
    square that one of its values can see (None after global pooling).

    Every multiply-add of a convolution or the classifier counts as one; BN, ReLU, additions and
    the products of gates are left out, as in [1].
    """
    net = skeleton(experiment, classes).eval()
    macs: dict[nn.Module, int] = {}
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor):  # a module of the user's own may return anything
            shapes[module] = tuple(out.shape[1:])
        if isinstance(module, nn.Conv2d):
            macs[module] = module.weight.numel() * out.shape[-2] * out.shape[-1]
        elif isinstance(module, nn.Linear):
            macs[module] = module.weight.numel() * out.numel() // module.out_features

    for module in net.modules():
        module.register_forward_hook(note)
    size = side(experiment.dataset, experiment.stem_)
    with torch.no_grad(), counting(experiment):
        net(torch.empty(1, 3, size, size, device="meta"))

    # Receptive field of a value (None: all), and distance between those of neighbors, in pixels.
    field: int | None = 1
    step = 1

    def part(name: str, module: nn.Module, path: nn.Module | None = None) -> dict[str, Any]:
        nonlocal field, step
        for kernel, stride in windows(path) if path else ():
            field, step = field + (kernel - 1) * step if field else None, step * stride
        if path and any(isinstance(m, GLOBAL) for m in path.modules()):
            field = None
        return {
            "name": name,
            "output": list(shapes[module]),
            "receptive_field": field if path else None,
            "parameters": parameters(module),
            "macs": sum(macs.get(m, 0) for m in module.modules()),
        }

    stem = part("stem", net.stem, net.stem)
    units = [
        part(name, unit, unit.residual)  # type: ignore[arg-type]
        for name, unit in net.named_units.items()
    ]
    parts = [stem, *units, part("head", net.head)]
    batch_norm = sum(parameters(m) for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    return {
        "network": experiment.name.removesuffix(f"-s{experiment.seed}"),
        "depth": experiment.depth,
        "block": experiment.block_,
        "unit": experiment.unit,
        "shortcut": experiment.shortcut,
        "settings": experiment.settings,
        "classes": classes,
        "parameters": parameters(net),
        "parameters_without_bn": parameters(net) - batch_norm,
        "macs": sum(macs.values()),
        "published": errors(experiment),
        "units": [alike.plain() for alike in kinds(net)],
        "parts": parts,
    }


def decided(experiment: Experiment) -> dict[str, Any]:
    """The settings that determine a network, with defaults resolved."""
    e = experiment
    known = settings_of(shortcut_class(e.shortcut))
    found = e.architecture
    made = known | settings_in(e.shortcut, found.pop("settings"))
    if ":" in e.shortcut:  # the user's own, whose settings may have any name
        made = {f"{name} of the shortcut": value for name, value in made.items()}
    return found | made


def errors(experiment: Experiment) -> dict[str, str]:
    """The errors that the paper publishes for this network, and on CIFAR-10 for its unit and its
    shortcut in Tables 1 and 2, each with its table and what is noted there."""

    def seen(e: Experiment) -> dict[str, Any]:
        return decided(e) | {"dataset": e.dataset}

    wanted = seen(experiment)

    def here(table: PaperTable) -> list[Row]:
        rows = [row for row in table.rows if row.tested in ("", *experiment.protocols)]
        return [row for row in rows if seen(Experiment(**table.base | row.at(wanted))) == wanted]

    found: dict[str, list[str]] = {}
    for number, table in TABLES.items():
        for row in here(table):
            by = row.tested if len(experiment.protocols) > 1 else ""
            top5 = f"top-5 {row.top5}" if row.top5 else ""
            told = ", ".join(filter(None, [str(number), by, top5, row.note]))
            found.setdefault(percent(row.published), []).append(told)
    own = [f"{e} (Table{'s' * (len(n) > 1)} {', '.join(n)})" for e, n in found.items()]
    own += [f"{percent(row.published)} ({row.source})" for row in here(ELSEWHERE)]
    made = {"network": ", ".join(own)} if own else {}
    if experiment.dataset == "cifar10":
        made |= {kind: published(kind, getattr(experiment, kind)) for kind in ("unit", "shortcut")}
    return made


def windows(path: nn.Module) -> list[tuple[int, int]]:
    """Kernel and stride, in pixels, of each layer that sees more than one place or skips some."""
    layers = [m for m in path.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)]
    sizes = [
        [s[0] if isinstance(s, tuple) else s for s in (m.kernel_size, m.dilation, m.stride)]
        for m in layers
    ]
    return [((kernel - 1) * apart + 1, stride) for kernel, apart, stride in sizes]


def parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())
