"""``bench``."""

from typing import Annotated, Any

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Config, Json, app
from resnetv2_cli.config import Experiment
from resnetv2_cli.flags import with_flags


@app.command(rich_help_panel="Train")
@with_flags()
def bench(
    config: Config = None,
    rounds: Annotated[int, typer.Option(help="Turns that each arm has.", min=1)] = 5,
    stretch: Annotated[int, typer.Option(help="Iterations of one turn.", min=1)] = 5,
    json: Json = False,
    **flags: Any,
) -> None:
    """Time training beside a plain PyTorch loop, taking turns in one process."""
    experiment = Experiment.load(config, **flags)
    from resnetv2_cli.bench import bench as timed

    made = timed(experiment, rounds, stretch)
    if json:
        console.as_json(made)
        return
    rows = [
        (
            name,
            f"{a['images_per_second']:,.0f}",
            f"{a['ratio']:.2f}",
            f"{a['least']:.2f}-{a['most']:.2f}",
        )
        for name, a in made["arms"].items()
    ]
    title = f"{made['network']}, batch {made['batch_size']}, {made['precision']}"
    console.table(title, ["", "images/s", "ratio", "least-most"], rows)
    console.out.print(
        f"The Trainer, its files and callbacks cost {made['trainer_overhead']:+.1%} over the bare "
        f"step; normalization and augmentation are {made['augmentation']:.2%} of it."
    )
