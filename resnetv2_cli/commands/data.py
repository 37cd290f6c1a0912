"""``data``: ``check``, ``sort-val`` and ``prepare``."""

import os
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from resnetv2_cli import console, jsonfile, quantities
from resnetv2_cli.commands.app import Json, app
from resnetv2_cli.errors import UserError

data = typer.Typer(no_args_is_help=True, help="Check, sort and prepare photographs.")
app.add_typer(data, name="data", rich_help_panel="Train")

Folder = Annotated[Path, typer.Argument(help="The folder that train and val are in.")]
Workers = Annotated[int, typer.Option(help="Files read at a time.", min=1, max=1024)]
PROCESSORS = os.cpu_count() or 1


@data.command()
def check(
    folder: Folder,
    workers: Workers = PROCESSORS,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The report, JSON; it names every faulty or duplicate file."
        ),
    ] = Path("data-check.json"),
    json: Json = False,
) -> None:
    """Check every file in class folders: what there is, what is broken, odd or duplicate.

    The exit status is 2 if training would stop, or its result would be worthless.
    """
    from resnetv2_cli.data.survey import FAULTS, serious, survey

    if output.is_dir():
        raise UserError(f"{output} is a folder", "name a file, such as data-check.json")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"cannot write {output}", "is its folder there, and is it yours?")
    if output.exists() and not {"folder", "splits"} <= set(jsonfile.mapping(output)):
        raise UserError(f"{output} exists, and is not a report of data check", "name another file")
    with console.progress() as tick:
        report = survey(folder, workers, tick)
    jsonfile.write(output, report)
    found = serious(report)
    if json:
        console.as_json(report)
    else:
        said = show(report, {kind: fault.doc for kind, fault in FAULTS.items()})
        if not said and not found:
            console.say("nothing is wrong")
        for split in report["unread"]:
            console.note(f"{folder / split} is not read: {folder / 'val'} is there")
        console.note(f"report: {output}")
    if found:
        raise UserError(f"{folder}: {', '.join(found)}", remedy(report, folder, output))


def remedy(report: dict[str, Any], folder: Path, output: Path) -> str:
    """The hint for the serious faults in a report."""
    from resnetv2_cli.data.survey import without_images

    flat, splits = report["flat"], report["splits"]
    if flat and "train" not in flat:
        return f"resnetv2 data sort-val {quote(str(folder))} --labels FILE"
    if bare := [*flat, *without_images(report)]:
        return f"images go into one folder per class, such as {folder / bare[0] / 'CLASS'}"
    if "train" not in splits or not splits.keys() & {"val", "test"}:
        return "train and val hold one folder for each class"
    return f"{output} has their names"


def show(report: dict[str, Any], docs: dict[str, str]) -> bool:
    """Print a report as tables: the splits, and what was found; return whether anything was."""
    rows = [
        [
            split,
            f"{s['classes']:,}",
            f"{s['images']:,}",
            f"{s['least']:,}-{s['most']:,}",
            quantities.size(s["bytes"]),
        ]
        for split, s in report["splits"].items()
    ]
    columns = ["split", "classes", "images", "in a class", "size"]
    console.table(report["folder"], columns, rows)
    found = [
        [kind, f"{len(files):,}", docs[kind], files[0]["file"]]
        for kind, files in report["faults"].items()
        if files
    ]
    words = {"across": "in several splits", "classes": "in several classes", "within": "twice"}
    for kind, groups in report["duplicates"].items():
        if groups:
            found.append(["same pixels", f"{len(groups):,}", words[kind], groups[0][0]])
    for split, names in report["classes"].items():
        for kind, classes in names.items():
            if classes:
                doc = f"{split} lacks it" if kind == "missing" else f"only {split} has it"
                found.append([f"class {kind}", f"{len(classes):,}", doc, classes[0]])
    for split, s in report["splits"].items():
        if s["empty"]:
            doc = f"no image of it in {split}"
            found.append(["class empty", f"{len(s['empty']):,}", doc, s["empty"][0]])
    if (trained := report["splits"].get("train")) and trained["classes"] == 1:
        doc = "there is no other to tell it from: does each have a folder in train?"
        found.append(["class alone", "1", doc, str(Path(report["folder"]) / "train")])
    if found:
        console.table("", ["what", "files", "", "for instance"], found)
    return bool(found)


@data.command("sort-val")
def sort_val(
    folder: Folder,
    labels: Annotated[
        Path,
        typer.Option(
            help="The file of labels: lines of image name and class; LOC_val_solution.csv; or "
            "classes alone, in the order of the image names."
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be moved.")
    ] = False,
) -> None:
    """Sort the flat val/ of the official archive into class folders.

    Nothing is moved if anything is wrong; files already in place stay there.
    """
    from resnetv2_cli.data import sortval

    place = sortval.place_of(folder)
    moves, there = sortval.plan(place, sortval.labels_in(labels))
    if not dry_run:
        sortval.move(moves)
    done = "would be moved" if dry_run else "moved"
    classes = len({m.target.parent for m in moves})
    console.say(
        f"{len(moves):,} images {done} into {classes:,} class folders of {place}; "
        f"{there:,} were there already"
    )


@data.command()
def prepare(
    folder: Folder,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the shards: new, or partly filled.")
    ],
    side: Annotated[
        int, typer.Option(help="Shorter side, at most this many pixels.", min=32)
    ] = 512,
    quality: Annotated[int, typer.Option(help="JPEG quality.", min=1, max=100)] = 90,
    raw: Annotated[
        bool, typer.Option("--raw", help="Store pixels: faster to read, ten times the space.")
    ] = False,
    shard: Annotated[int, typer.Option(help="Images per shard.", min=1)] = 1000,
    workers: Workers = PROCESSORS,
) -> None:
    """Re-encode photographs once, into indexed tar shards (WebDataset's format).

    --data-dir of train and eval takes the folder. If interrupted, the same command continues.
    """
    from resnetv2_cli.data.prepare import Form
    from resnetv2_cli.data.prepare import prepare as prepared

    form = Form(side, quality, raw, shard)
    with console.progress() as tick:
        made = prepared(folder, output, form, workers, tick)
    size = quantities.size(sum(p.stat().st_size for p in output.glob("*.tar")))
    counts = ", ".join(f"{n:,} of {name}" for name, n in made.items())
    console.say(f"{counts}: {size} in {output}")
