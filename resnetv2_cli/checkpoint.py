"""Checkpoints: written atomically, and opened without running anything in them."""

import pickle
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load

from resnetv2_cli import files, form
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import Damaged, NotSaved, UserError, shown
from resnetv2_cli.options import OF_FILES
from resnetv2_cli.runfolder import refuse_needed
from resnetv2_cli.settings import renewed
from resnetv2_cli.telling import Tell

SEALED = "sealed"  # a key: the file ends with its digest
PRECISE = "precise_bn"  # a key: how many training images BN's statistics were recomputed from
WHOLE = [name for name, row in DATASETS.items() if row.decoded]  # datasets decoded whole


class WholeFiles(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, flushes it to disk, reads it back, renames it.

    ``failure``: why the last checkpoint could not be written. It is not raised, because only the
    first of several processes writes, and the others wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: NotSaved | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. ``storage_options``, ``{"before": path, "also": [path]}``: the name
        that the file now at ``path`` gets, and further names for the new one."""
        path, names = Path(path), storage_options or {}
        beside, target = files.partial(path), Path(path)
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(checkpoint, beside)
            if path.exists() and "before" in names:
                files.name_too(path, names["before"])
            beside.replace(path)
            for target in names.get("also", []):
                files.name_too(path, target)
            files.flush_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            said = f"cannot save {target}: {error.strerror or error}"
            hint = left_in(path.parent) if target == path else f"{path.name} is saved"
            self.failure = NotSaved(said, hint)


def refuse_taken(path: Path) -> None:
    """Refuse a path at which a new checkpoint cannot be saved, before the work for it is done.

    Raises:
        UserError: something is there, it belongs to a run, it cannot be written, or its name is
            that of another kind of file.
    """
    hint = "name another file with --output"
    refuse_needed(path)
    if path.exists():
        raise UserError(f"{path} exists", hint)
    if path.suffix.lower() == ".safetensors":
        named = path.with_suffix(".ckpt")
        raise UserError(f"{path} would be a checkpoint, not safetensors", f"such as {named}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot save {path}: {error.strerror or error}", hint) from None


def leave(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a new checkpoint.

    Raises:
        UserError: it cannot be written, or something is there by now.
    """
    refuse_taken(path)
    writer = WholeFiles()
    writer.save_checkpoint(checkpoint, path)
    if writer.failure:
        raise UserError(str(writer.failure), "name another file with --output")


def left_in(folder: Path) -> str:
    """The hint where a checkpoint cannot be saved: whether there is an earlier one."""
    if any(folder.glob("*.ckpt")):
        return "the checkpoint before it is kept"
    return "none is saved yet: make room for the first"


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its seal, and read it back from the disk.

    Raises:
        OSError: it cannot be written, or does not read back as it was written.
    """
    with path.open("wb") as file:
        sealing = files.Sealing(file)
        try:
            torch.save({**checkpoint, SEALED: True}, sealing)  # type: ignore[arg-type]
        except RuntimeError:
            if sealing.error is None:
                raise
        written = sealing.seal()
        files.flush(file)
    if files.seal_of(path) != (written, written):
        raise OSError(f"{path} does not read back as it was written")


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint of this tool, as tensors and plain values.

    Raises:
        Damaged: the file is cut short or changed.
        UserError: it is no checkpoint, or not one of this tool.
    """
    again = "copy it again; in a run's folder, resnetv2 train --resume takes the one before it"
    try:
        sealed, digest = files.seal_of(path)
        if sealed not in (None, digest):
            raise Damaged(f"{path} is damaged: it fails its checksum, SHA-256", again)
        with zipfile.ZipFile(path) as archive:
            form.refuse_bomb(archive, path)
            broken = None if sealed else archive.testzip()
        if broken:
            raise Damaged(f"{path} is damaged: {broken} fails its checksum", again)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        damaged = Damaged(f"{path} is no checkpoint, or is cut short", again)
        raise form.other(path) or damaged from None
    except pickle.UnpicklingError:
        hint = "such a file could run any code; only tensors and plain values are read"
        raise UserError(f"{path} holds more than tensors", hint) from None
    except UserError:
        raise
    except Exception as error:  # a file that was tampered with may fail in any way
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise form.other(path) or UserError(
            f"cannot read {path}: {line}", "was it changed?"
        ) from None
    form.refuse_misshapen(checkpoint, path)
    if checkpoint.get(SEALED) and not sealed:
        raise Damaged(f"{path} is damaged: the checksum at its end is incomplete", again)
    return checkpoint


def network(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, or of its safetensors export: ``state_dict``, ``experiment``,
    ``classes`` and ``global_step``.

    Raises:
        UserError: it is neither, or its BN is folded.
    """
    saved = weights(path)
    if "experiment" not in saved:
        raise form.other(path) or form.misshapen(path, "it names no network")
    return saved


def weights(path: Path) -> dict[str, Any]:
    """As ``network``; of a safetensors file of weights alone, which it takes too, ``state_dict``.

    Raises:
        UserError: it is neither, or its BN is folded.
    """
    if path.suffix.lower() != ".safetensors" and not form.header(path):
        return read(path)
    try:
        state = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", "copy it again") from None
    if known := form.exported(path):
        form.refuse_misshapen({"state_dict": state, **known}, path)
    if known.get("folded"):
        hint = "resnetv2 export --no-fold keeps it"
        raise UserError(f"{path} has no BN any more: it is folded into the weights", hint)
    if not any(name.startswith("net.") for name in state):
        state = {f"net.{name}": value for name, value in state.items()}
    return {"state_dict": state, **known}


def newest(folder: Path, last: Path, tell: Tell) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run continues from, and its contents: ``last``, or, if it is missing or
    damaged, the intact one in ``folder`` with the most iterations; None if there are none.

    Raises:
        UserError: there are some, and none is intact.
    """
    if not any(folder.glob("*.ckpt")):
        return None
    try:
        return last, read(last)
    except UserError as error:
        damaged = error
    path, held = last, None
    for other in sorted(folder.glob("*.ckpt")):
        with suppress(UserError):
            found = read(other)
            if held is None or found["global_step"] > held["global_step"]:
                path, held = other, found
    if held is None:
        again = f"resnetv2 train --config {quote(str(folder.parent / 'config.yaml'))}"
        hint = f"put back an intact one, or begin another run: {again}"
        raise UserError(f"{damaged}, and there is no intact one beside it", hint)
    tell(f"{damaged}; continuing from {path.name}, iteration {held['global_step']:,}")
    return path, held


def settings_of(checkpoint: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The settings that a checkpoint was made with, except those that ``overrides`` make moot.

    Raises:
        UserError: it has a setting that this version does not know.
    """
    known = {f.name for f in fields(Experiment)}
    written = renewed(checkpoint["experiment"])
    for name in written:
        if name not in known:
            raise UserError(
                f"the checkpoint has an unknown setting {shown(name)}", "of another version?"
            )
    if not written.get("weights"):  # as in older exports
        written.pop("weights_sha256", None)
    # A network of photographs has these settings, and so do files of versions that ignored them.
    if overrides.get("dataset", written.get("dataset")) in WHOLE:
        written = {name: value for name, value in written.items() if name not in OF_FILES}
    return written


def experiment_of(checkpoint: dict[str, Any], **overrides: Any) -> Experiment:
    """The experiment that a checkpoint was made with, on this machine: its settings of devices and
    arithmetic are left out, except for float32, which every machine has.

    Raises:
        UserError: it has a setting that this version does not know.
    """
    known = {f.name: f for f in fields(Experiment)}
    written = settings_of(checkpoint, **overrides)
    saved = {
        name: value for name, value in written.items() if known[name].metadata["panel"] != "Engine"
    }
    if written.get("precision") == "32-true":
        saved["precision"] = "32-true"
    return Experiment(**{**saved, **overrides})


def preprocesses(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is the mean or std of the channels, or a mean image, which may have any size."""
    square = len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]
    return square and (name == "normalize.mean" or (name == "normalize.std" and shape[1] == 1))


def load_weights(module: torch.nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a module.

    Raises:
        UserError: they are of another architecture; the message names the first difference.
    """
    own, given = module.state_dict(), checkpoint["state_dict"]
    for name in [*own, *given]:
        if name in own and name in given and preprocesses(name, given[name].shape):
            continue  # the module's takes the shape of the given one
        if name not in given or name not in own or own[name].shape != given[name].shape:
            here = tuple(own[name].shape) if name in own else "nothing"
            there = tuple(given[name].shape) if name in given else "nothing"
            raise UserError(
                f"{path} is of another architecture: {name} is {there} there and {here} here",
                "leave out the flags that describe the network",
            )
    module.load_state_dict(given)
