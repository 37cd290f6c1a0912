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
        typer.Option("--format", help="What to write."),
    ] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file; by default in export/ in the run's folder."),
    ] = None,
    fold: Annotated[
        bool | None,
        typer.Option(
            "--fold/--no-fold",
            help="Fold BN into the convolutions that it directly follows; the default, except for "
            "safetensors.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Where the test images for the check are.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Upload file and card to this hub repository.")
    ] = None,
    json: Json = False,
) -> None:
    """Export a network with a model card, and check the file against the network's logits.

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
