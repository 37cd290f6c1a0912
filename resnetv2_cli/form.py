"""The form of a checkpoint: what must hold before anything in a stranger's file is used."""

import json
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from resnetv2_cli.errors import UserError, shown

KEYS: dict[str, type] = {  # keys that evaluation needs, and the types of their values
    "state_dict": dict,
    "experiment": dict,
    "classes": list,
    "global_step": int,
}


def refuse_bomb(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse a zip file that is not as PyTorch writes it, with records that are not compressed:
    compressed ones could unpack to any size, and overlapping ones could be read for ever.

    Raises:
        UserError: a record is compressed, or the records together are larger than the file.
    """
    records = archive.infolist()
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        raise UserError(f"{path} is packed as no checkpoint is", "it could unpack to any size")


def refuse_misshapen(checkpoint: Any, path: Path) -> None:
    """Refuse a file whose content is not that of a checkpoint.

    Raises:
        UserError: a key is missing, or its value is not what it must be.
    """
    if not isinstance(checkpoint, dict) or not {"state_dict", "experiment"} <= set(checkpoint):
        raise other(path) or UserError(
            f"{path} is not a checkpoint of resnetv2", "it names no experiment"
        )
    for key, kind in KEYS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise misshapen(path, f"its {key} is {shown(checkpoint.get(key))}")
    for name, value in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not is_plain(value):
            raise misshapen(path, f"its weight {shown(name)} is no plain tensor")
    if type(checkpoint.get("precise_bn", 0)) is not int:
        raise misshapen(path, f"its precise_bn is {shown(checkpoint['precise_bn'])}")
    imported = checkpoint.get("imported", {})  # only in those that ``import`` made
    if not isinstance(imported, dict):
        raise misshapen(path, f"its imported is {shown(imported)}")
    names = [*checkpoint["experiment"], *checkpoint["classes"], *imported, *imported.values()]
    for name in names:
        if not isinstance(name, str):
            raise misshapen(path, f"{shown(name)} is no name")


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of real numbers with as many in memory as its shape says: an
    expanded one has a single number for any shape."""
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def misshapen(path: Path, why: str) -> UserError:
    """The error for a file that is intact, but not what this tool writes."""
    return UserError(f"{path} is not a checkpoint of resnetv2: {why}", "of another version?")


WEIGHTS = (".safetensors", ".pth", ".h5", ".hdf5", ".keras")  # which import reads
PROGRAMS = (".onnx", ".pt2")  # which export writes
EXPORTED = ("experiment", "classes", "global_step", "imported", "folded")  # export's metadata keys
HEADER = 2**21  # bytes of a safetensors file's header, at most; ResNet-1001's has 664,080


def other(path: Path) -> UserError | None:
    """The error for a file whose name or header says that it is something other than a checkpoint;
    None if neither does."""
    kind = path.suffix.lower()
    if kind in PROGRAMS or exported(path):
        hint = "name the checkpoint that it was made from"
        return UserError(f"{path} was exported from a checkpoint, and is not one", hint)
    if kind in WEIGHTS or header(path):
        hint = "resnetv2 import makes a checkpoint of another code base's weights"
        if kind == ".safetensors" or header(path):
            hint += "; train --weights takes such a file if the names in it are this tool's"
        return UserError(f"{path} is no checkpoint: it holds weights alone", hint)
    return None


def exported(path: Path) -> dict[str, Any]:
    """What ``export`` states beside the weights in a safetensors file; empty for any other file,
    and for another tool's, where the same names may mean anything."""
    known: dict[str, Any] = {}
    with suppress(ValueError, TypeError, RecursionError):
        metadata = dict(header(path).get("__metadata__", {}))
        known = {key: json.loads(metadata[key]) for key in EXPORTED if key in metadata}
    return known if isinstance(known.get("experiment"), dict) else {}


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, whatever it is called; empty for any other file."""
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(length)) if length <= HEADER else {}
        return found if isinstance(found, dict) else {}
    return {}
