"""Files of tensors, opened without running anything in them."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli import form
from resnetv2_cli.errors import UserError

WRAPPERS = ("state_dict", "model", "net")  # keys of the weights in training checkpoints
PARALLEL = "module."  # prefix that DataParallel gives every name

KERAS = {  # variable name in Keras: in PyTorch
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
KNOWN = "safetensors, .pth, .h5 or .keras"
KERAS_ORDER = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, in PyTorch's layout.

    Raises:
        UserError: the file is missing, of an unsupported kind, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}", "name a file of weights")
    reader = READERS.get(path.suffix.lower(), _torch)
    try:
        found = reader(path)
        refuse_unsound(found, path)
    except UserError:
        raise
    except pickle.UnpicklingError:
        if not is_pickled(path):
            raise UserError(f"{path} is no file of weights", KNOWN) from None
        hint = "such a file could run any code; save its state_dict() alone, or as safetensors"
        raise UserError(f"{path} holds more than tensors", hint) from None
    except Exception as error:  # three libraries, each with its own errors for a broken file
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {path}: {line}", "is it complete?") from None
    if not found:
        raise UserError(f"{path} holds no tensors", "name a file of weights")
    return found


def refuse_unsound(found: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that cannot be weights.

    Raises:
        UserError: a tensor is quantized, sparse or otherwise not plain, or has a number that is not
            finite, or a variance below 0.
    """
    for name, tensor in found.items():
        if not form.is_plain(tensor.detach()):  # detach turns a parameter into a tensor
            hint = "quantized and sparse networks cannot be imported"
            raise UserError(f"{path}: {name} is no plain tensor", hint)
        variance = name.endswith(("running_var", "moving_variance"))
        if not tensor.isfinite().all() or (variance and (tensor < 0).any()):
            said = (
                "a variance below 0" if tensor.isfinite().all() else "numbers that are not finite"
            )
            raise UserError(f"{path}: {name} has {said}", "are they from a run that diverged?")


def is_pickled(path: Path) -> bool:
    """Whether a file begins as a zip, which ``torch.save`` writes now, or as an old pickle."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def _torch(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings(action="ignore"):  # about what is checked below
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    return _plain(loaded)


def _plain(loaded: Any) -> dict[str, Tensor]:
    given = loaded if isinstance(loaded, Mapping) else {}
    found = {str(name): value for name, value in given.items() if isinstance(value, Tensor)}
    if found and all(name.startswith(PARALLEL) for name in found):
        return {name.removeprefix(PARALLEL): value for name, value in found.items()}
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return _plain(load_file(path))


def _torch7(path: Path) -> dict[str, Tensor]:
    raise UserError(
        f"{path} is a Torch7 file, which no maintained reader opens",
        "PyTorch 1.0 dropped support for them; --from fb takes tensors named by their positions in "
        "Torch7's containers, as converters of that time saved them (.pth)",
    )


def _keras_zip(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.keras`` archive, which contains a ``.weights.h5``."""
    with zipfile.ZipFile(path) as archive:
        form.refuse_bomb(archive, path)
        return _keras(io.BytesIO(archive.read("model.weights.h5")))


def _keras(file: Path | io.BytesIO) -> dict[str, Tensor]:
    """The tensors of an HDF5 file of either form: named by layer and variable; or Keras 3's
    ``.weights.h5``, which numbers the variables of a layer and stores its name beside them."""
    try:
        import h5py
    except ModuleNotFoundError:
        hint = "pip install 'resnetv2-cli[import]'"
        raise UserError("reading Keras files needs h5py", hint) from None
    found: dict[str, Tensor] = {}

    def keep(layer: str, variable: str, data: Any) -> None:
        array = torch.from_numpy(data[()])
        if variable == "kernel":  # (H, W, in, out) or (in, out) in Keras
            array = array.permute(3, 2, 0, 1) if array.ndim == 4 else array.T
        found[f"{layer}.{KERAS[variable]}"] = array.contiguous()

    def visit(name: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset) or not node.shape:
            return
        variable = name.rsplit("/", 1)[-1].removesuffix(":0")
        if variable in KERAS:
            keep(name.split("/")[-2], variable, node)
        elif variable.isdigit() and "name" in node.parent.attrs:
            order = KERAS_ORDER.get(len(node.parent), ())
            if int(variable) < len(order):
                keep(str(node.parent.attrs["name"]), order[int(variable)], node)

    with h5py.File(file) as opened:
        opened.visititems(visit)
    return found


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _safetensors,
    ".h5": _keras,
    ".hdf5": _keras,
    ".keras": _keras_zip,
    ".t7": _torch7,
}
