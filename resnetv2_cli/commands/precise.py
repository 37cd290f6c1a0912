"""``precise-bn``."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console, trust
from resnetv2_cli.commands.app import Json, Saved, app
from resnetv2_cli.config import Experiment
from resnetv2_cli.flags import with_flags

USED = ("data_dir", "batch_size", "workers", "precision", "accelerator")
UNUSED = [f.name for f in fields(Experiment) if f.name not in USED]


@app.command("precise-bn", rich_help_panel="Train")
@with_flags(*UNUSED)
def precise_bn(
    checkpoint: Saved,
    images: Annotated[
        int | None,
        typer.Option(help="Training images, in whole batches; an epoch's unless given.", min=2),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new checkpoint; must not exist.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Recompute BN's statistics as means over training batches, in a new checkpoint.

    The authors' released models have such means; training leaves moving averages. All batches
    weigh the same, and are whole (--batch-size), even where training split them into parts.
    """
    from resnetv2_cli.checkpoint import experiment_of, leave, refuse_taken
    from resnetv2_cli.precise import precise
    from resnetv2_cli.runfolder import RunFolder
    from resnetv2_cli.weightfile import find

    file = find(checkpoint)
    run = RunFolder.of(file)  # not among its checkpoints: a run may continue from any there
    to = output or run.path / f"{file.stem}-precise-bn.ckpt"
    refuse_taken(to)
    with console.progress() as tick:
        made, n = precise(file, images, tick, **flags)
    leave(made, to)
    if json:
        console.as_json({"checkpoint": str(to), "images": n})
        return
    console.say(f"{to}: BN's statistics are those of {n:,} training images")
    where = ["--data-dir", flags["data_dir"]] if "data_dir" in flags else []
    console.note(f"evaluate: {trust.command('eval', to, *where, own=experiment_of(made).own)}")
