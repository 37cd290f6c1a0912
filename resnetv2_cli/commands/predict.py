"""``predict``."""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from resnetv2_cli import console
from resnetv2_cli.commands.app import Saved, app
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.protocols import listed
from resnetv2_cli.errors import UserError
from resnetv2_cli.flags import with_flags

if TYPE_CHECKING:  # help does not wait for torch
    from resnetv2_cli.inference import Prediction

USED = ("precision", "accelerator", "workers", "protocol")
UNUSED = [f.name for f in fields(Experiment) if f.name not in USED]


@app.command(rich_help_panel="Train")
@with_flags(*UNUSED)
def predict(
    checkpoint: Saved,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Files; folders, with all images below them; or -: file names on standard input, "
            "one per line, or one image.",
            metavar="IMAGE|FOLDER|-",
        ),
    ],
    top: Annotated[int, typer.Option(help="Classes shown per image.", min=1)] = 3,
    format: Annotated[
        Literal["table", "jsonl", "csv"],
        typer.Option("--format", help="How results are shown; jsonl: one JSON object per line."),
    ] = "table",
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the first sixty images with their classes in this file."),
    ] = None,
    **flags: Any,
) -> None:
    """Classify any images; a checkpoint is all it needs.

    For instance: resnetv2 predict runs/mine holiday/ --picture seen.png
    """
    from resnetv2_cli import inference
    from resnetv2_cli.weightfile import find

    drawn = 0
    if picture:
        from resnetv2_cli.plot import refuse_suffix
        from resnetv2_cli.sheet import MOST, sheet

        refuse_suffix(picture)
        drawn = MOST
    if "," in listed(flags.get("protocol", "224")):
        raise UserError("predict takes only one protocol", "--protocol 320")
    task = inference.network(find(checkpoint), **flags, devices="1")
    first: list[Prediction] = []
    broken: list[Prediction] = []

    def noted(predictions: Iterable["Prediction"]) -> Iterator["Prediction"]:
        for prediction in predictions:
            if len(first) < drawn:
                first.append(prediction)
            if prediction.error:
                broken.append(prediction)
            yield prediction

    with inference.pictures(images, sys.stdin.buffer, console.note) as found:
        if picture and os.path.realpath(picture) in {os.path.realpath(p.name) for p in found}:
            raise UserError(f"{picture} is one of the pictures", "name another with --picture")
        top = min(top, len(task.classes))
        SHOW[format](noted(inference.predict(task, found, top)), top)
        count = len(found)
    if picture:
        sheet(first, picture)
        console.note(f"picture: {picture}" + (f" ({drawn} of {count})" if count > drawn else ""))
    if len(broken) == count:
        raise UserError(f"none of the {count} files could be classified", f"{broken[0].error}")
    if broken:
        console.note(f"{len(broken)} of {count} files could not be classified")


def as_table(predictions: Iterable["Prediction"], top: int) -> None:
    """A row for each file, its likeliest class first."""
    rows = []
    for p in predictions:
        cells = [f"{name} {100 * share:.1f} %" for name, share in p.top]
        rows.append([p.name, *(cells or [p.error, *[""] * (top - 1)])])
    console.table("", ["file", *map(str, range(1, top + 1))], rows)


def as_lines(predictions: Iterable["Prediction"], top: int) -> None:
    """A JSON object per line: ``file``, and ``predictions`` or ``error``; printed when known."""
    for p in predictions:
        pairs = [{"class": name, "probability": round(share, 6)} for name, share in p.top]
        rest = {"error": p.error} if p.error else {"predictions": pairs}
        print(json.dumps({"file": p.name, **rest}), flush=True)


def as_csv(predictions: Iterable["Prediction"], top: int) -> None:
    """CSV: ``file,error,class_1,probability_1,...``; a row is printed when known."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    places = [f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability")]
    out.writerow(["file", "error", *places])
    for p in predictions:
        cells = [cell for name, share in p.top for cell in (name, f"{share:.6f}")]
        out.writerow([p.name, p.error, *(cells or [""] * len(places))])
        sys.stdout.flush()


SHOW = {"table": as_table, "jsonl": as_lines, "csv": as_csv}
