"""Small copies of CIFAR-10 in each layout that it may have on disk."""

import hashlib
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10 as Official

from resnetv2_cli.data.catalog import CIFAR10


def write_tree(root: Path, small: dict, suffix: str = "png") -> Path:
    for split, classes in small.items():
        for name, arrays in classes.items():
            place = root / split / name
            place.mkdir(parents=True)
            for i, pixels in enumerate(arrays):
                Image.fromarray(pixels).save(place / f"{i}.{suffix}", lossless=True)
    return root


def write_archive(root: Path, small: dict, monkeypatch) -> Path:
    """The official layout, with the md5 sums of these files in the place of the official ones."""
    place = root / Official.base_folder
    place.mkdir(parents=True)
    pixels = {
        split: [(im, CIFAR10.index(c)) for c, ims in classes.items() for im in ims]
        for split, classes in small.items()
    }

    def batch(name: str, chosen: list) -> list[str]:
        rows = np.stack([im.transpose(2, 0, 1).reshape(-1) for im, _ in chosen])
        content = pickle.dumps({"data": rows, "labels": [label for _, label in chosen]})
        (place / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    train = [batch(f"data_batch_{k + 1}", pixels["train"][k::5][::-1]) for k in range(5)]
    monkeypatch.setattr(Official, "train_list", train)
    monkeypatch.setattr(Official, "test_list", [batch("test_batch", pixels["test"])])
    meta = pickle.dumps({"label_names": list(CIFAR10)})
    (place / "batches.meta").write_bytes(meta)
    md5 = hashlib.md5(meta).hexdigest()
    monkeypatch.setattr(Official, "meta", Official.meta | {"md5": md5})
    return root


def write_zips(root: Path, small: dict) -> Path:
    tree = write_tree(root / "loose", small, "webp")
    (root / "cifar10").mkdir()
    files = [p for p in sorted(tree.rglob("*")) if p.is_file()]
    for part in range(2):
        with zipfile.ZipFile(root / "cifar10" / f"part-{part}.zip", "w") as archive:
            for file in files[part::2]:
                archive.write(file, file.relative_to(tree))
    shutil.rmtree(tree)
    return root
