"""``export``."""

from pathlib import Path
from typing import Annotated

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Json, Saved, app
from resnetv2_cli.export.formats import FORMATS
from resnetv2_cli.settings import rows

Kind = rows(FORMATS)


@app.command(rich_help_panel="Train")
def export(
    checkpoint: Saved,
    format: Annotated[
        Kind,  # type: ignore[valid-type]
        typer.Option("--format", help="What is written."),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; by itself in export/ beside the run."),
    ] = None,
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold",
            help="Fold BN into the convolutions it stands directly behind; by itself yes, but for "
            "safetensors.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the test images for the check are.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload file and card to this repository of a hub.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a network for others to run, with a model card, and check it against its own logits.

    For instance: resnetv2 export runs/mine --format onnx
    """
    from resnetv2_cli.export import hub, study
    from resnetv2_cli.weightfile import find

    if push:
        hub.check_package()
    made = study.export(find(checkpoint), format, output, fold, data_dir)
    if json:
        console.as_json(made.as_json())
    else:
        folded = f", {len(made.folded)} of {made.norms} BN folded" if made.folded else ""
        console.say(f"{made.file}: {made.size / 1e6:.2f} MB{folded}")
        console.say(f"checked: {made.agreement}")
        console.note(f"card: {made.card}")
    if push:
        console.note(f"uploaded: {hub.push(push, made.file, made.card)}")
