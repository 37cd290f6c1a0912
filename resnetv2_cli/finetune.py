"""Start from existing weights: what is loaded, what stays new, and what does not fit."""

from pathlib import Path
from typing import Any

import torch

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.flags import of_panels, typed
from resnetv2_cli.task import Classification
from resnetv2_cli.weightfile import find, sha256

FIRST, HEAD = "net.stem.conv.weight", "net.head.fc."


def network_of(path: Path) -> dict[str, Any]:
    """The network settings of a weight file, except the initialization; empty if it names none.

    Raises:
        UserError: there is no such file, it cannot be read, or it is another code base's.
    """
    saved = checkpoints.weights(find(path))
    if FIRST not in saved["state_dict"]:
        hint = "resnetv2 import makes a checkpoint of another code base's weights"
        raise UserError(f"{path} has no {FIRST}, as this tool's weights have", hint)
    if "experiment" not in saved:
        return {}
    theirs = checkpoints.experiment_of(saved)
    network = {name: getattr(theirs, name) for name in of_panels("Network") if name != "init"}
    return network | {"block": theirs.block_, "stem": theirs.stem_}


def begin(task: Classification) -> list[str]:
    """Load the weights that an experiment names into its new network, and report what was loaded.

    The classifier stays new if the classes differ. Normalization comes with the weights, which
    were trained on its output.

    Raises:
        UserError: the file is not the one that the run began with, or is of another architecture;
            or a new classifier would be frozen.
    """
    e = task.experiment
    if not e.weights:
        return []
    path = find(Path(e.weights))
    if sha256(path) != e.weights_sha256:
        hint = "name the original file with --weights, or begin another run"
        raise UserError(f"{path} is not what this run began with: its SHA-256 differs", hint)
    saved = checkpoints.weights(path)
    refuse_another_architecture(saved, e, path)
    given, own = saved["state_dict"], task.state_dict()
    classes = saved.get("classes")
    shape = given.get(HEAD + "weight", torch.empty(0)).shape
    known = list(task.classes) == classes if classes else shape == own[HEAD + "weight"].shape
    new = [name for name in own if name.startswith(HEAD) and not known]
    new += [name for name in own if name.startswith("normalize.") and name not in given]
    state = given | {name: own[name] for name in new}
    checkpoints.load_weights(task, {"state_dict": state}, path)
    lines = [f"weights: {len(own) - len(new)} of {len(own)} tensors are those of {path}"]
    if known and not classes:
        lines.append("the classifier is taken as it is: the file names no classes")
    if not known:
        there = len(classes) if classes else int(shape[0]) if shape else 0
        lines.append(f"the classifier is new: {there} classes there, {len(task.classes)} here")
        if "head" in e.freeze_:
            raise UserError(f"{lines[-1]}; frozen, it would stay random", "--freeze without head")
    if e.freeze_:
        lines.append(f"frozen: {', '.join(e.freeze_)}")
    return lines


def refuse_another_architecture(saved: dict[str, Any], here: Experiment, path: Path) -> None:
    """Refuse weights of another network than the experiment's.

    Raises:
        UserError: the file names another network; says which settings differ, and the flags for
            that network.
    """
    if "experiment" not in saved:
        return
    theirs, ours = (network_settings(e) for e in (checkpoints.experiment_of(saved), here))
    differing = [k for k in theirs | ours if theirs.get(k) != ours.get(k)]
    if not differing:
        return
    there = ", ".join(f"{name} {theirs.get(name)}" for name in differing)
    this = ", ".join(f"{name} {ours.get(name)}" for name in differing)
    flags = " ".join(typed(name, theirs[name]) for name in differing if name in theirs)
    message = f"{path} is of another architecture: {there} there, {this} here"
    raise UserError(message, f"it is that of {flags}" if flags else "leave these flags out")


def network_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings of a network, with defaults resolved, except the initialization."""
    whole = {k: v for k, v in experiment.architecture.items() if k not in ("init", "settings")}
    return whole | experiment.shortcut_settings
