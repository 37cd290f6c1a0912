"""``import``: weights that other code bases have trained."""

import math
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Json, app
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.foreign.sources import SOURCES

FROM_HELP = "; ".join(f"{name}: {source.doc}" for name, source in SOURCES.items())


@app.command("import", rich_help_panel="Train")
def import_(
    file: Annotated[
        Path, typer.Argument(help="safetensors, .pth, .h5 or .keras; only tensors are read.")
    ],
    source: Annotated[
        str,
        typer.Option("--from", help=f"Where the weights come from. {FROM_HELP}.", metavar="NAME"),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new checkpoint; must not exist.")
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Names of the classes: a file, one per line, or a folder with one folder per "
            "class. Default: those of CIFAR or ImageNet.",
            metavar="FILE|FOLDER",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Channel means, in 0..1, such as 0.5,0.5,0.5. Default: the source's."),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Channel standard deviations, as --mean.")] = None,
    json: Json = False,
) -> None:
    """Convert another code base's weights to a checkpoint, or say what differs.

    For instance: resnetv2 import resnet50.pth --from torchvision
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together", "as --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5")
    given = None
    if mean is not None and std is not None:
        given = channels("--mean", mean), channels("--std", std)
    if given and not all(0 <= value <= 1 for value in given[0]):
        raise UserError(f"--mean {mean!r} is not in 0..1", "divide values in 0..255 by 255")
    if given and min(given[1]) <= 0:
        raise UserError(f"--std {std!r} is not above 0", "images are divided by it")
    from resnetv2_cli.checkpoint import leave
    from resnetv2_cli.foreign.convert import checkpoint, imported
    from resnetv2_cli.foreign.files import tensors

    made = imported(tensors(file), source, str(file))
    saved = checkpoint(made, source, file, classes, given)
    e = made.experiment
    to = output or Path(f"{source}-resnet{e.depth}-{e.block_}-{e.unit}.ckpt")
    leave(saved, to)
    learned = sum(v.numel() for n, v in made.weights.items() if n.endswith(("weight", "bias")))
    facts = {
        "checkpoint": str(to),
        "from": source,
        "network": made.network.doc,
        "depth": e.depth,
        "block": e.block_,
        **{name: getattr(e, name) for name in ("unit", "option", "stride_on", "first_act", "pad")},
        "classes": made.classes,
        "parameters": learned,
    }
    if json:
        console.as_json(facts)
        return
    rows = [(k, f"{v:,}" if k == "parameters" else str(v)) for k, v in facts.items()]
    console.table(f"{file}, imported", ["what", "is"], rows)
    console.note(f"evaluate: resnetv2 eval {quote(str(to))} --data-dir FOLDER")


def channels(flag: str, text: str) -> tuple[float, ...]:
    """Three numbers from ``0.5,0.5,0.5``.

    Raises:
        UserError: they are not three, or no numbers.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise UserError(f"{flag} {text!r} is not three numbers", "such as 0.5,0.5,0.5")
    return values
