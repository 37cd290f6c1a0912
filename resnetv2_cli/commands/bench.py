"""``bench step``, ``bench train`` and ``bench data``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console, jsonfile, quantities
from resnetv2_cli.commands.app import Config, Json, app, of_weights
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import unknown
from resnetv2_cli.flags import of_panels, with_flags

bench = typer.Typer(
    no_args_is_help=True,
    help="Time the tool against what most people run, and against what the machine allows.",
)
app.add_typer(bench, name="bench", rich_help_panel="Train")

Rounds = Annotated[int, typer.Option(help="Turns of each arm.", min=1)]
Stretch = Annotated[int, typer.Option(help="Iterations of one turn.", min=1)]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the picture and the JSON.")
]
OF_ARMS = ("accumulate", "compile", "recompute", "precision", "recompute_bn", "graphs", "kernels")
OF_NETWORKS = {*of_panels("Network", "Optimization", "Fine-tuning", "Engine", "Run")}
OF_NETWORKS -= {"stem", "seed", "accelerator"}
ANY = 50  # layers that both CIFAR's and ImageNet's networks may have, where none is run
COLUMNS = ["", "images/s", "ratio", "of rounds", "peak"]


def shown(made: dict[str, Any], output: Path | None, json: bool) -> bool:
    """Write a bench's picture and JSON to a folder, print its JSON; whether a table is wanted."""
    if output:
        from resnetv2_cli.bench.draw import bars

        rates = {name: a["images_per_second"] for name, a in made["arms"].items()}
        output.mkdir(parents=True, exist_ok=True)
        bars(title(made), rates, "images/s", output / f"{made['bench']}.png")
        jsonfile.write(output / f"{made['bench']}.json", made)
    if json:
        console.as_json(made)
    return not json


def title(made: dict[str, Any]) -> str:
    """What was timed."""
    parts = [made.get("network") or made["dataset"], f"batch {made['batch_size']}"]
    return ", ".join([*parts, *filter(None, [made.get("precision")])])


def row(name: str, arm: dict[str, Any]) -> list[str]:
    """An arm as cells of a table, under COLUMNS."""
    peak = arm["peak_bytes"]
    return [
        name,
        f"{arm['images_per_second']:,.0f}",
        f"{arm['ratio']:.2f}",
        f"{arm['least']:.2f}-{arm['most']:.2f}",
        quantities.NONE if peak is None else quantities.size(peak),
    ]


@bench.command()
@with_flags()
def train(
    config: Config = None,
    rounds: Rounds = 5,
    stretch: Stretch = 5,
    output: Output = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Time whole training against a plain PyTorch loop, taking turns in one process."""
    experiment = Experiment.load(config, **of_weights(config, flags), **flags)
    from resnetv2_cli.bench.train import bench_train

    made = bench_train(experiment, rounds, stretch, console.note)
    if not shown(made, output, json):
        return
    rows = [
        [*row(name, a), f"{a['waiting']:.1%}" if "waiting" in a else quantities.NONE]
        for name, a in made["arms"].items()
    ]
    console.table(title(made), [*COLUMNS, "waiting"], rows)
    console.say(
        f"The Trainer, its files and callbacks cost {made['trainer_overhead']:+.1%} over the bare "
        f"step; normalization and augmentation are {made['augmentation']:.2%} of it. A new process "
        f"ends its first iteration after {made['first_step_seconds']:.1f} s."
    )


@bench.command()
@with_flags(*OF_ARMS, *of_panels("Run"), "devices", "nodes", "strategy", "sync_bn")
def step(
    config: Config = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, next to plain; may be repeated.", metavar="NAME"),
    ] = None,
    rounds: Rounds = 5,
    stretch: Stretch = 3,
    output: Output = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Time one training step under each option, against plain float32 and against the floor.

    The floor is the network's convolutions alone, in the same precision and layout.
    """
    experiment = Experiment.load(config, **of_weights(config, flags), **flags)
    from resnetv2_cli.bench.step import OPTIONS, bench_step
    from resnetv2_cli.machine import devices_of

    for name in arm or []:
        if name not in OPTIONS:
            raise unknown("arm", name, OPTIONS)
    device = devices_of(experiment)[0].type
    names = arm or [name for name, option in OPTIONS.items() if device in option.usual]
    made = bench_step(experiment, names, rounds, stretch, console.note)
    if not shown(made, output, json):
        return
    rows = [
        [*row(name, a), f"{a['of_floor']:.0%}" if "of_floor" in a else quantities.NONE]
        for name, a in made["arms"].items()
    ]
    console.table(title(made), [*COLUMNS, "of floor"], rows)
    for dtype, floor in made["floors"].items():
        rate = quantities.size(floor["copy_bytes_per_second"])
        console.say(
            f"{dtype.removeprefix('torch.')}: {quantities.size(floor['bytes'])} must move, which "
            f"takes {floor['seconds']:.3f} s at the {rate}/s of a copy."
        )


@bench.command()
@with_flags(*OF_NETWORKS)
def data(
    config: Config = None,
    prepared: Annotated[
        list[Path] | None,
        typer.Option(
            help="The same photographs after data prepare, for comparison; may be repeated."
        ),
    ] = None,
    rounds: Rounds = 5,
    stretch: Stretch = 20,
    output: Output = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Time each way from stored images to batches, without training, against torchvision's."""
    fits = {} if "depth" in Experiment.asked(config, flags) else {"depth": ANY}
    experiment = Experiment.load(config, **fits, **flags)
    from resnetv2_cli.bench.data import bench_data

    made = bench_data(experiment, rounds, stretch, prepared or [])
    if shown(made, output, json):
        console.table(title(made), COLUMNS, [row(name, a) for name, a in made["arms"].items()])
