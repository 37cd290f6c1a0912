"""The official archives of CIFAR: pickles, which could run arbitrary code.

Only files with the published md5 are read, and only arrays, numbers and text are taken from them.
Nothing is ever unpacked to disk.
"""

import hashlib
import pickle
import tarfile
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import in_turn, left_as_it_was

PLACES = {  # where an official archive is in a folder: unpacked, or as downloaded
    "cifar10": ("cifar-10-batches-py/*_batch*", "cifar-10-python.tar.gz"),
    "cifar100": (
        "cifar-100-python/train",
        "cifar-100-python/test",
        "cifar-100-python.tar.gz",
    ),
}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}

_REBUILD = np.empty(0).__reduce__()[0]  # the function that rebuilds an array from its pickle
ARRAYS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain values; any other name in a pickle is not even looked up."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ARRAYS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read(name: str, root: Path) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Images (N, 32, 32, 3) and labels (N,) of train and test, in the archive's order.

    Raises:
        UserError: the archive is absent and cannot be downloaded, or is damaged.
    """
    from torchvision import datasets

    official = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / official.base_folder
    files = unpacked(folder) if folder.is_dir() else packed(name, official, root)
    halves = []
    for rows in (official.train_list, official.test_list):
        parts = [plain(files.get(file), md5, f"{folder}/{file}") for file, md5 in rows]
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = [label for part in parts for label in part[LABELS[name]]]
        halves.append((pixels.transpose(0, 2, 3, 1), np.array(labels)))
    return halves


def whole(name: str, root: Path) -> bool:
    """Whether the official archive is there, unpacked, or packed and intact, so that no download is
    needed."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    official = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}.get(name)
    if official is None:
        return False
    folder, file = root / official.base_folder, root / official.filename
    return folder.is_dir() or check_integrity(file, official.tgz_md5)


def unpacked(folder: Path) -> dict[str, bytes]:
    """The content of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def packed(name: str, official: Any, root: Path) -> dict[str, bytes]:
    """The content of each file in the official archive, by name. The archive is downloaded if it is
    missing or not intact.

    Raises:
        UserError: it is missing or not intact, and cannot be downloaded.
    """
    from torchvision.datasets.utils import download_url

    try:
        with left_as_it_was(root):
            root.mkdir(parents=True, exist_ok=True)
            with in_turn(root):  # another process may be downloading it
                download_url(official.url, root, official.filename, official.tgz_md5)
        with tarfile.open(root / official.filename) as archive:
            members = [m for m in archive if m.isfile()]
            return {Path(m.name).name: archive.extractfile(m).read() for m in members}  # type: ignore
    except (URLError, HTTPException, RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        raise UserError(
            f"{name} is not in {root} and could not be downloaded: {error}",
            f"put it there as {name}/train/<class>/*.png and {name}/test/<class>/*.png, name "
            "its folder with --data-dir, or try --dataset digits",
        ) from None


def plain(content: bytes | None, md5: str, name: str) -> dict[str, Any]:
    """The dictionary in a pickle, if it is the published one.

    Raises:
        UserError: it is missing, has another md5, or holds more than arrays.
    """
    hint = "remove the folder to have the archive downloaded again"
    if content is None:
        raise UserError(f"{name} is missing", hint)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{name} is damaged: its md5 is not the published one", hint)
    try:
        return ArraysOnly(BytesIO(content), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{name} holds more than arrays: {error}", hint) from None
