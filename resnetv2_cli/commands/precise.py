"""``precise-bn``."""

from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Json, Saved, app
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.flags import with_flags

USED = ("data_dir", "batch_size", "workers", "precision", "accelerator")
UNUSED = [f.name for f in fields(Experiment) if f.name not in USED]


@app.command("precise-bn", rich_help_panel="Train")
@with_flags(*UNUSED)
def precise_bn(
    checkpoint: Saved,
    images: Annotated[
        int | None,
        typer.Option(help="Training images, in whole batches; all unless given.", min=2),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The checkpoint: a new file.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Make BN's statistics anew, as means over training images, in a new checkpoint.

    The authors' released models have such; training leaves moving averages.
    """
    from resnetv2_cli.checkpoint import WholeFiles
    from resnetv2_cli.precise import precise
    from resnetv2_cli.runfolder import RunFolder, refuse_needed
    from resnetv2_cli.weightfile import find

    file = find(checkpoint)
    run = RunFolder.of(file)  # not among its checkpoints, of which it may continue from any
    to = output or (run.path if run else file.parent) / f"{file.stem}-precise-bn.ckpt"
    refuse_needed(to)
    if to.exists():
        raise UserError(f"{to} exists", "name another file with --output")
    with console.progress() as tick:
        made, n = precise(file, images, tick, **flags)
    writer = WholeFiles()
    writer.save_checkpoint(made, to)
    if writer.failure:
        raise UserError(str(writer.failure), "name another file with --output")
    if json:
        console.as_json({"checkpoint": str(to), "images": n})
        return
    console.out.print(f"{to}: BN's statistics are those of {n:,} training images")
    console.note(f"evaluate: resnetv2 eval {quote(str(to))}")
