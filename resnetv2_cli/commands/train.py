"""``train`` and ``eval``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from resnetv2_cli import console, paper, trust
from resnetv2_cli.commands.app import Config, Json, Saved, Time, app, of_weights
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS, side
from resnetv2_cli.data.protocols import PROTOCOLS
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.flags import of_panels, seconds, with_flags
from resnetv2_cli.quantities import NONE, TOP


@app.command(rich_help_panel="Train")
@with_flags()
def train(
    config: Config = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder: new or empty.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    begun_or_not: Annotated[
        bool,
        typer.Option(
            "--continue",
            help="Continue the run in --output if it has begun, else begin it: one command for "
            "torchrun and SLURM, which restart it. Settings may change as with --resume.",
        ),
    ] = False,
    time: Time = None,
    micro_batch: Annotated[
        str | None,
        typer.Option(
            help="Images at a time on each device: a number, or auto, as many as fit into memory; "
            "sets --accumulate. The gradients of the parts add up to the whole batch's, except "
            "that BN uses each part's statistics.",
            metavar="NUMBER|auto",
            rich_help_panel="Engine",
        ),
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Train a network; the defaults are the paper's on CIFAR.

    For instance: resnetv2 train --depth 1001 --unit full-preact
    """
    from resnetv2_cli.runfolder import RunFolder

    budget = None if time is None else seconds(time)
    if resume and (config or output or begun_or_not):
        hint = "the folder has the settings, and it has begun"
        raise UserError("--resume takes no --config, --output or --continue", hint)
    if begun_or_not and not output:
        raise UserError("--continue needs --output", "the folder to continue in, or to begin")
    if micro_batch and (resume or begun_or_not or "accumulate" in flags):
        raise UserError(
            "--micro-batch sets --accumulate, which is set already", "leave one of them out"
        )
    begun = resume or (output if begun_or_not and output and RunFolder(output).begun else None)
    network = {} if begun else of_weights(config, flags)
    experiment = None if begun else Experiment.load(config, **network, **flags)
    from resnetv2_cli import cluster, machine, run
    from resnetv2_cli.display import Display
    from resnetv2_cli.manifest import origins
    from resnetv2_cli.resume import continued

    taken = os.environ.get(run.FOLDER)  # set in processes that the first of a run launched
    if not (begun or taken or output):
        cluster.refuse_free_folder()
    with cluster.Meeting(console.note) as meeting:
        if taken:  # settled by the first process: each alone may find other free memory
            folder = RunFolder(Path(taken))
            experiment = folder.experiment()
        elif begun:
            folder = RunFolder(begun)
            asked = Experiment.asked(config, flags)
            experiment, changes = continued(folder, asked)
            for change in changes if run.first_process() else []:
                console.note(str(change))
        else:
            assert experiment is not None
            if micro_batch:
                experiment = machine.in_parts(experiment, micro_batch)
            folder = RunFolder(output) if output else RunFolder.free(experiment)
        os.environ[run.FOLDER] = str(folder.path)
        try:
            result = run.train(
                experiment,
                folder,
                resume=bool(begun),
                seconds=budget,
                display=[Display(console.err)],
                origins=origins(config, flags)
                | dict.fromkeys(network, "weights")
                | ({"accumulate": f"--micro-batch {micro_batch}"} if micro_batch else {}),
                tell=console.note,
                meeting=meeting,
            )
        except Stopped as stopped:
            if run.first_process():
                again = trust.command("train", "--resume", folder.path, own=experiment.own)
                console.note(f"{stopped}: saved; continue with: {again}")
            raise
        finally:
            os.environ.pop(run.FOLDER, None)  # another run of this process has a folder of its own
    if not run.first_process():
        return
    if json:
        console.as_json(result)
        return
    for line in told(result, experiment.val > 0):
        console.say(line)
    console.note(f"curves:   {folder.curves}")
    console.note(f"evaluate: {trust.command('eval', folder.path, own=experiment.own)}")


def told(result: dict[str, Any], chosen: bool) -> Iterator[str]:
    """The result of a training, a line for each protocol. ``chosen``: its checkpoint was, on images
    held out."""
    from resnetv2_cli.runfolder import OTHERS

    def shown(error: float, top5: float) -> str:
        five = f" (top-5 {top5:.2f} %)" if result.get("classes", TOP + 1) > TOP else ""
        return f"{error:.2f} %{five}"

    error = shown(result["test_error"], result["test_top5_error"])
    images, steps = result["test_images"], result["steps"]
    after = f"{steps:,} iterations"
    if chosen:
        after = f"{result.get('test_step', steps):,} iterations, chosen by --val, of {steps:,}"
    yield f"test error {error} of {images:,} images after {after}"
    for protocol, scores in result.get(OTHERS, {}).items():
        yield f"by --protocol {protocol}: {shown(scores['error'], scores['top5_error'])}"


IN_TRAINING = """
    batch_size val augment crop color normalize accumulate compile graphs recompute recompute_bn
    sync_bn
""".split()  # settings of other panels that an evaluation has no use for


@app.command("eval", rich_help_panel="Train")
@with_flags(*of_panels("Optimization", "Fine-tuning", "Run"), *IN_TRAINING)
def evaluate(
    checkpoint: Saved,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the picture of the confusion matrix."),
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Evaluate a checkpoint on its test images; network and dataset are read from it."""
    from resnetv2_cli import cluster, evaluation
    from resnetv2_cli.checkpoint import PRECISE
    from resnetv2_cli.manifest import rewritten
    from resnetv2_cli.plot import confusion
    from resnetv2_cli.run import first_process
    from resnetv2_cli.runfolder import OTHERS, RunFolder
    from resnetv2_cli.weightfile import find

    with cluster.Meeting(console.note) as meeting:
        file = find(checkpoint)
        try:
            scores, task = evaluation.evaluate(file, meeting, **flags)
        except Stopped as stopped:
            if first_process():
                console.note(f"{stopped}: it was not evaluated")
            raise
    if not first_process():
        return
    if manifest := evaluation.manifest_of(file):
        for name in rewritten(task.experiment, manifest.read()):
            console.note(f"{name} has changed since this was trained")
    to = (output or RunFolder.of(file).path) / f"confusion-{file.stem}.png"
    picture: str | None = str(to)
    try:
        confusion(scores["confusion"], task.classes, to)
    except OSError as error:
        picture = None
        console.note(f"no picture: cannot write {to}: {error.strerror}")
    if wild := max(each["not_finite"] for each in (scores, *scores[OTHERS].values())):
        console.note(f"the numbers for {wild:,} images are not finite: they count as wrong")
    e, rows = task.experiment, paper.evaluated(task.experiment)
    named = dict(zip(task.classes, scores.pop("class_errors"), strict=True))
    if json:
        known = [
            {"name": r.name, "protocol": r.tested, "error": r.published, "top5_error": r.top5}
            for r in rows
        ]
        extra = {"protocol": e.protocols[0], "published": known}
        console.as_json(scores | extra | {"class_error": named, "picture": picture})
        return
    each = {e.protocols[0]: scores} | scores[OTHERS]
    lines = [measured(e, name, scores | theirs) for name, theirs in each.items()]
    lines += map(published, rows)
    needless = {"protocol"} if DATASETS[e.dataset].decoded else set()  # only one view
    needless |= set() if len(task.classes) > TOP else {"top-5"}
    kept = [i for i, column in enumerate(COLUMNS) if column not in needless]
    bn = scores[PRECISE]
    console.table(
        f"{file}, after {scores['step']:,} iterations"
        + (f", BN's statistics of {bn:,} training images" if bn else ""),
        [COLUMNS[i] for i in kept],
        [[cells[i] for i in kept] for cells in lines],
    )
    if len(named) <= 20:
        cells = [(c, NONE if e is None else f"{e:.2f}") for c, e in named.items()]
        by = f", by --protocol {e.protocols[0]}" if scores[OTHERS] else ""
        console.table(f"error by class{by}", ["class", "%"], cells)
    if picture:
        console.note(f"confusion matrix: {picture}")


COLUMNS = ["network", "protocol", "error", "top-5", "loss", "images"]


def measured(experiment: Experiment, protocol: str, scores: dict[str, Any]) -> list[str]:
    """The scores of a network by a protocol as cells of a table, under COLUMNS."""
    errors = [f"{scores[key]:.2f} %" for key in ("error", "top5_error")]
    counts = [f"{scores['loss']:.2f}", f"{scores['images']:,}"]
    return [experiment.name, seen(experiment, protocol), *errors, *counts]


def seen(experiment: Experiment, protocol: str) -> str:
    """The name of a protocol, with the side of its crops in pixels if the network trains on smaller
    crops, so that the side is not the one in the name."""
    row = PROTOCOLS[protocol]
    size = row.view(side(experiment.dataset, experiment.stem_)).side
    return protocol + (f" as {size}" if size != row.crop else "")


def published(row: paper.Row) -> list[str]:
    """The published errors of a row as cells of a table, under COLUMNS."""
    source = row.source or "Table 5"
    errors = [f"{error:.2f} %" for error in (row.published, row.top5)]
    return [f"{row.name} ({source})", row.tested, *errors, NONE, "50,000"]
