"""One training step under each option of the tool, compared with plain float32 and the floor.

To add an option: a row in OPTIONS.
"""

from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from resnetv2_cli import graphs
from resnetv2_cli.bench.floor import convolutions_alone, floor
from resnetv2_cli.bench.plain import usual_sgd
from resnetv2_cli.bench.turns import Arm, in_turns, ratios, rows, timed
from resnetv2_cli.compiling import compile_units
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import known_classes, side
from resnetv2_cli.errors import UserError
from resnetv2_cli.machine import ready
from resnetv2_cli.manifest import environment
from resnetv2_cli.optim import sgd
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.telling import Tell

PLAIN = "plain"


class Option(NamedTuple):
    """How a step is computed."""

    doc: str
    mixed: bool = True  # bf16 autocast; else float32
    last: bool = True  # channels last; else NCHW
    plain: bool = False  # ``usual_sgd``; else ``optim.sgd``
    fused: bool = False  # BN and ReLU as one compiled operation
    forget: bool = False  # what they compute is recomputed in backward
    recompute: int = 0  # segments of the body to recompute; -1: each unit is one
    compile: bool = False
    graphs: bool = False  # replayed as a CUDA graph
    usual: tuple[str, ...] = ("cpu", "cuda")  # devices on which it is timed by default

    @property
    def precision(self) -> str:
        return "bf16-mixed" if self.mixed else "32-true"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed else torch.float32

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format

    @property
    def floor(self) -> str:
        """The name of the arm that runs its convolutions alone."""
        return f"floor {'bf16' if self.mixed else 'fp32'} {'NHWC' if self.last else 'NCHW'}"


OPTIONS = {
    PLAIN: Option("float32, NCHW, eager", mixed=False, last=False, plain=True),
    "channels-last": Option("float32, channels last", mixed=False),
    "channels-last-fused": Option(
        "the same, BN, ReLU and convolutions compiled operations", mixed=False, fused=True
    ),
    "bf16": Option("bf16 autocast, NCHW", last=False),
    "bf16-channels-last": Option("bf16 autocast, channels last"),
    "fused": Option("the same, BN, ReLU and convolutions compiled operations", fused=True),
    "recompute-bn": Option("the same, recomputed in backward", fused=True, forget=True),
    "recompute-units": Option("fused, every unit recomputed", fused=True, recompute=-1),
    "compile": Option("bf16, channels last, compiled unit by unit", compile=True, usual=("cuda",)),
    "graphs": Option("bf16, channels last, as one CUDA graph", graphs=True, usual=("cuda",)),
    "compile-graphs": Option(
        "compiled unit by unit, as one CUDA graph", compile=True, graphs=True, usual=("cuda",)
    ),
    "fused-graphs": Option("fused, as one CUDA graph", fused=True, graphs=True, usual=("cuda",)),
}


def step_arm(experiment: Experiment, option: Option, device: torch.device) -> Arm:
    """An arm that runs forward, backward and update on one batch of noise.

    Raises:
        UserError: the device does not support the option.
    """
    torch.manual_seed(experiment.seed)
    classes = known_classes(experiment.dataset, experiment.classes)
    net = ResNet(**experiment.architecture, classes=classes).to(device)
    net.to(memory_format=option.layout)  # type: ignore[call-overload]
    net.activate(option.fused, option.forget)
    net.segments = len(net.units) if option.recompute < 0 else option.recompute
    if option.compile:
        compile_units(net)
    optimizer = usual_sgd(net) if option.plain else sgd(net, experiment)
    size = side(experiment.dataset, experiment.stem_)
    x = torch.randn(experiment.batch_size, 3, size, size, device=device)
    x = x.contiguous(memory_format=option.layout)
    y = torch.randint(classes, (experiment.batch_size,), device=device)

    def step() -> None:
        with graphs.arithmetic(device, option.precision):
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if not option.graphs:
        return timed(step, device)
    replay, why = graphs.replayed(step, device)
    if replay is None:
        raise UserError(f"no CUDA graphs: {why}", "leave out the arms that replay them")
    return timed(replay, device)


def bench_step(
    experiment: Experiment,
    names: list[str],
    rounds: int,
    steps: int,
    tell: Tell,
) -> dict[str, Any]:
    """Each option's time, and its speed relative to the plain step and to its floor.

    The floor of an option is the convolutions alone in its precision and layout, timed in turn with
    the options. ``floors``: a second one for each dtype, the bytes that a step must move and the
    seconds that they take at the bandwidth of a copy.
    """
    device = ready(experiment)
    options = {name: OPTIONS[name] for name in [PLAIN, *(n for n in names if n != PLAIN)]}
    arms: dict[str, Arm] = {}
    of: dict[str, str] = {}  # option -> the arm that is its floor
    for name, option in options.items():
        arms[name] = step_arm(experiment, option, device)
        of[name] = option.floor
    for name, option in options.items():
        if of[name] not in arms:
            arms[of[name]] = convolutions_alone(experiment, option.dtype, option.layout, device)
    tell(f"{len(arms)} arms of {rounds} turns of {steps} iterations")
    turns = in_turns(arms, rounds, steps, device)
    made = rows(turns, PLAIN, experiment.batch_size)
    for name in options:
        share = median(ratios(turns, name, of[name]))
        made[name] |= {"doc": options[name].doc, "of_floor": share}
    return {
        "bench": "step",
        "network": experiment.name,
        "batch_size": experiment.batch_size,
        "rounds": rounds,
        "steps": steps,
        "arms": made,
        "floors": {
            str(d): floor(experiment, d, device) for d in {o.dtype for o in options.values()}
        },
        "environment": environment([device]),
    }
