"""How a network is named on the command line: a checkpoint, a config, or settings."""

from collections import Counter
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import unknown
from resnetv2_cli.flags import parsed
from resnetv2_cli.plans import laid_out, shortcuts
from resnetv2_cli.recipes import CONFIGS
from resnetv2_cli.weightfile import find

SAID = {"weights_sha256": "weights"}  # the digest identifies weights, but a label names their path


class Source(NamedTuple):
    """Where a network comes from: an experiment at initialization, or a checkpoint."""

    experiment: Experiment
    checkpoint: Path | None = None
    step: int | None = None  # iterations it was trained for
    label: str = ""
    classes: int | None = None  # their number, from a checkpoint


def from_checkpoint(path: Path, **overrides: Any) -> Source:
    """The source at a path: a checkpoint, an export of one or a run's folder, which itself names
    the network and the images.

    Raises:
        UserError: there is no checkpoint, or it is not one of this tool.
    """
    file = find(path)
    saved = checkpoints.network(file)
    experiment = checkpoints.experiment_of(saved, **overrides)
    return Source(experiment, file, saved["global_step"], classes=len(saved["classes"]))


def beside(main: Source, text: str) -> Source:
    """A network to compare with ``main``: a checkpoint, a run's folder, or ``main`` with other
    settings, such as ``depth=110,unit=original``, at initialization.

    Raises:
        UserError: it is neither, or there is no such setting.
    """
    if "=" not in text or there(Path(text)):
        return from_checkpoint(Path(text), data_dir=main.experiment.data_dir)
    known = ["layout", *(f.name for f in fields(Experiment))]
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if name not in known:
            raise unknown("setting", name, known, where=f"{text}: ")
        given[name] = value if name == "layout" else parsed(name, value)
    own: dict[str, Any] = {}
    if "depth" in given:  # another depth may mean another block
        own["block"] = None
    if "shortcut" in given:  # another shortcut may lack the settings of main's
        rows = shortcuts()
        row = rows.get(str(given["shortcut"]))
        has = row.settings if row else {}
        own |= {name: None for row in rows.values() for name in row.settings if name not in has}
    if "weights" in given:  # other weights have another digest, and may be none
        own |= {"weights_sha256": None, "freeze": ""}
    kept = None if {"dataset", "classes"} & given.keys() else main.classes
    return Source(replace(main.experiment, **(own | laid_out(given))), classes=kept)


def there(path: Path) -> bool:
    """Whether there is such a file or folder; False for settings too long to be a file name."""
    with suppress(OSError):
        return path.exists()
    return False


def named(text: str, main: Source) -> Source:
    """A network as ``diff`` takes it: a config, by its name or its file, or whatever ``beside``
    takes.

    Raises:
        UserError: it is none of these, or there is no such setting.
    """
    if Path(text).suffix in (".yaml", ".yml") or there(CONFIGS / f"{text}.yaml"):
        return Source(Experiment.load(text))
    return beside(main, text)


def said(experiment: Experiment, name: str) -> str:
    """A setting as a label shows it; empty if it was not given."""
    told = SAID.get(name, name)
    value = getattr(experiment, told)
    if value is None:
        return ""
    return value if isinstance(value, str) and told == name else f"{told}={value}"


def labelled(sources: list[Source]) -> list[Source]:
    """The sources with labels that tell them apart: the settings in which they differ, or the name
    of the experiment if there are none, and the number of iterations."""
    differing = [
        f.name
        for f in fields(Experiment)
        if not f.metadata["free"] and len({getattr(s.experiment, f.name) for s in sources}) > 1
    ]
    made, seen = [], Counter[str]()
    for source in sources:
        parts = [said(source.experiment, name) for name in differing]
        label = ", ".join(filter(None, parts)) or source.experiment.name
        if source.step is not None:
            label += f" @{source.step}"
        seen[label] += 1
        numbered = label if seen[label] == 1 else f"{label} ({seen[label]})"
        made.append(source._replace(label=numbered))
    return made
