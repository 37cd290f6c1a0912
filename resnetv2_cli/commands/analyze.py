"""``analyze``."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from resnetv2_cli import console
from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.commands.app import SAVED, Config, Json, app, of_weights, saved
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.flags import with_flags

PANELS = ("Engine", "Run")  # panels of flags that an analysis does not use
UNUSED = [f.name for f in fields(Experiment) if f.metadata["panel"] in PANELS]
TOPIC_HELP = "; ".join(f"{name}: {topic.doc}" for name, topic in TOPICS.items())


@app.command(rich_help_panel="Study the paper")
@with_flags(*UNUSED)
def analyze(
    checkpoint: Annotated[
        Path | None, typer.Argument(help=f"{SAVED}; or give flags.", callback=saved)
    ] = None,
    config: Config = None,
    topic: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this one; may be repeated. {TOPIC_HELP}.", metavar="NAME"),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another network in the same pictures: a checkpoint, a run's folder, or settings "
            "that differ, such as depth=110,unit=original; may be repeated.",
            metavar="WHAT",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Training images in the batch.", min=1)] = 8,
    test_images: Annotated[
        int, typer.Option(help="Test images on which lesions are evaluated.", min=1)
    ] = 250,
    pairs: Annotated[
        int, typer.Option(help="Pairs of units to delete together, at most.", min=1)
    ] = 100,
    bn: Annotated[
        Literal["batch", "kept"],
        typer.Option(help="BN's statistics: the batch's, as in training, or the stored ones."),
    ] = "batch",
    precision: Annotated[
        Literal["float64", "float32"], typer.Option(help="float64 shows what holds exactly.")
    ] = "float64",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for pictures and analysis.json.")
    ] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Check the paper's equations in a network, at initialization or trained, and draw them.

    For instance: resnetv2 analyze --unit full-preact --compare unit=original
    """
    for name in topic or []:
        if name not in TOPICS:
            raise unknown("topic", name, TOPICS)
    for flag, value in {"config": config, "weights": flags.get("weights")}.items():
        if checkpoint and value:
            hint = "it has its own, and names its network and images itself"
            raise UserError(f"a checkpoint takes no --{flag}", hint)
    network = {} if checkpoint else of_weights(config, flags)
    experiment = Experiment() if checkpoint else Experiment.load(config, **network, **flags)
    from resnetv2_cli import source
    from resnetv2_cli.analysis import study, subject

    at_start = source.Source(experiment)
    main = source.from_checkpoint(checkpoint, **flags) if checkpoint else at_start
    sources = source.labelled([main, *(source.beside(main, what) for what in compare or [])])
    topics = study.fitting(list(dict.fromkeys(topic or [])), sources)
    to = output or study.folder_of(sources)
    batch = subject.Batch(images, test_images, precision, bn, pairs)
    result = study.study(sources, topics, batch, to, console.note)
    if json:
        console.as_json(result)
        return
    for made in study.tables(result, topics):
        console.table(made.title, made.columns, made.rows)
        for line in made.notes:
            console.say(line)
    console.note(f"pictures and numbers: {to}")
