"""Checkpoints: written whole or not at all, and opened without running anything in them."""

import os
import pickle
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from resnetv2_cli import form
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError, shown
from resnetv2_cli.origin import find  # noqa: F401  (config needs it, and no torch)


class WholeFiles(TorchCheckpointIO):
    """Writes to a temporary name in the same folder, flushes it to disk, then renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"cannot save {path}: {error.strerror}", "the checkpoint before it is kept"
            ) from None


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint of this tool holds, as tensors and plain values.

    Raises:
        UserError: the file is cut short, is no checkpoint, or is not one of this tool.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            form.refuse_bomb(archive, path)
            broken = archive.testzip()
        if broken:
            raise UserError(f"{path} is damaged: {broken} fails its checksum", "copy it again")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise UserError(f"{path} is no checkpoint, or is cut short", "copy it again") from None
    except pickle.UnpicklingError:
        hint = "such a file could run anything; only tensors and plain values are read"
        raise UserError(f"{path} holds more than tensors", hint) from None
    except UserError:
        raise
    except Exception as error:  # what was tampered with fails in any way
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read {path}: {line}", "was it changed?") from None
    form.refuse_misshapen(checkpoint, path)
    return checkpoint


def experiment_of(checkpoint: dict[str, Any], **overrides: Any) -> Experiment:
    """The experiment a checkpoint was made by, on the machine that is here: what it says of
    devices and arithmetic is left out.

    Raises:
        UserError: it has a setting that this version does not know.
    """
    known = {f.name: f for f in fields(Experiment)}
    for name in checkpoint["experiment"]:
        if name not in known:
            raise UserError(
                f"the checkpoint has an unknown setting {shown(name)}", "of another version?"
            )
    saved = {
        name: value
        for name, value in checkpoint["experiment"].items()
        if known[name].metadata["panel"] != "Engine"
    }
    return Experiment(**{**saved, **overrides})


def load_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a module.

    Raises:
        UserError: they are of another architecture; names the first difference.
    """
    own, given = module.state_dict(), checkpoint["state_dict"]
    for name in [*own, *given]:
        if name in own and name in given and name.startswith("normalize."):
            continue  # it takes the shape of what is given
        if name not in given or name not in own or own[name].shape != given[name].shape:
            here = tuple(own[name].shape) if name in own else "nothing"
            there = tuple(given[name].shape) if name in given else "nothing"
            raise UserError(
                f"{path} is of another architecture: {name} is {there} there and {here} here",
                "leave out the flags that describe the network",
            )
    module.load_state_dict(given)
