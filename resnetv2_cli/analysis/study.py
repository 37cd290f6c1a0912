"""Several topics of several networks: measured one after the other, drawn in the same pictures."""

import hashlib
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from resnetv2_cli import jsonfile
from resnetv2_cli.ablation.studies import digest
from resnetv2_cli.analysis.subject import Batch, subject
from resnetv2_cli.analysis.topics import TOPICS, Table
from resnetv2_cli.analysis.trace import trace
from resnetv2_cli.errors import UserError
from resnetv2_cli.jsonfile import finite
from resnetv2_cli.manifest import environment
from resnetv2_cli.runfolder import RUNS, RunFolder
from resnetv2_cli.source import Source
from resnetv2_cli.telling import Tell, silent
from resnetv2_cli.weightfile import sha256


def module(topic: str) -> Any:
    """The module of a topic: ``measure``, ``table`` and ``draw``."""
    return import_module(f"resnetv2_cli.analysis.{topic}")


def fitting(topics: list[str], sources: list[Source]) -> list[str]:
    """The topics asked for, or else all that apply to these networks.

    Raises:
        UserError: one needs a trained network, and there is none.
    """
    trained = any(source.checkpoint for source in sources)
    for topic in topics:
        if TOPICS[topic].trained and not trained:
            raise UserError(
                f"--topic {topic} needs a trained network", "name a checkpoint or a run's folder"
            )
    return topics or [name for name, topic in TOPICS.items() if trained or not topic.trained]


def folder_of(sources: list[Source]) -> Path:
    """The default folder of an analysis: in the run folder of the first network, else beside its
    checkpoint, else in ``runs``; a different one for each set of networks that it is compared with.
    """
    main, *others = sources
    beside = "".join(f"{digest(s.experiment)} {s.checkpoint}\n" for s in others)
    of = f"-with-{hashlib.sha256(beside.encode()).hexdigest()[:6]}" if others else ""
    file = main.checkpoint
    if file is None:
        return RUNS / f"analyze-{main.experiment.name}-{digest(main.experiment)}{of}"
    run = RunFolder.of(file)
    name = "analysis" if run.begun and file.stem == "last" else f"analysis-{file.stem}"
    return run.path / (name + of)


def study(
    sources: list[Source],
    topics: list[str],
    batch: Batch,
    to: Path,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Measure, draw ``TOPIC.png``, write ``analysis.json`` and return its content.

    Topics of an earlier analysis of the same networks stay in the file.
    """
    measured: dict[str, dict[str, Any]] = {topic: {} for topic in topics}
    for source in sources:
        tell(source.label)
        studied = subject(source, batch, tell)
        traced = trace(studied.net, studied.x, studied.labels)
        for topic in topics:
            if source.checkpoint or not TOPICS[topic].trained:
                measured[topic][source.label] = module(topic).measure(studied, traced)
            else:
                tell(f"no {topic} of {source.label}: it is not trained")
    head = {
        "networks": [
            {
                "label": s.label,
                "checkpoint": s.checkpoint and str(s.checkpoint),
                "checkpoint_sha256": s.checkpoint and sha256(s.checkpoint),
                "experiment": asdict(s.experiment),
                "digest": digest(s.experiment),
            }
            for s in sources
        ],
        "batch": batch._asdict(),
    }
    for topic, found in measured.items():
        module(topic).draw(found, to / f"{topic}.png")
    every = kept(to / "analysis.json", head) | measured
    result = finite(
        head
        | {
            "environment": environment(),
            "topics": every,
            "pictures": {topic: f"{topic}.png" for topic in every},
        }
    )
    jsonfile.write(to / "analysis.json", result)
    return result


def kept(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The topics of an earlier analysis, if it was of the same networks in the same way."""
    before = jsonfile.mapping(file)
    same = all(before.get(key) == finite(value) for key, value in head.items())
    topics = before.get("topics")
    return topics if same and isinstance(topics, dict) else {}


def tables(result: dict[str, Any], topics: list[str]) -> list[Table]:
    """A short table for each topic."""
    return [module(topic).table(result["topics"][topic]) for topic in topics]
