"""Untrusted files: at every entry point, one that would do harm if it were trusted."""

import hashlib
import io
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import write_archive
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import console, trust
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import archive, images
from resnetv2_cli.data.catalog import CIFAR10 as CLASSES
from resnetv2_cli.errors import UserError
from resnetv2_cli.inference import network
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import shortcut_class


class Canary:
    """An object that makes a folder when Python's own reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """A path that must never exist; that the trap works is first shown on another."""
    trap = Canary(tmp_path / "trap-works")
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()
    place = tmp_path / "canary"
    yield place
    assert not place.exists(), "code of the file has run"


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "inside the weights"])
def test_a_checkpoint(canary, tmp_path, form):
    file = tmp_path / "stranger.ckpt"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Canary(canary)))
    else:
        value = {"state_dict": {"w": Canary(canary)}} if "inside" in form else Canary(canary)
        torch.save(value, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(UserError, match=r"holds more than tensors|is no checkpoint"):
        checkpoints.read(file)


def header(metadata: dict) -> bytes:
    text = json.dumps({"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


EXPORT = {"experiment": "{}", "classes": "[]", "global_step": "1", "folded": "[]"}


@pytest.mark.parametrize("name, content, said, hint", [
    ("a.safetensors", header({}), "holds weights alone", "resnetv2 import.*train --weights"),
    ("a.safetensors", b"no header", "cannot read", "copy it again"),
    ("a.safetensors", header({"experiment": "{}"}), "its classes is None", "another version"),
    ("a.safetensors", header(EXPORT | {"folded": "[1]"}), "has no BN any more", "--no-fold"),
    ("a.onnx", b"a program", "was exported from a checkpoint", "from$"),
    ("resnet50.pth", b"of before 2020", "holds weights alone", "resnetv2 import makes"),
    ("a.safetensors", header({"experiment": "baseline-7"}), "holds weights alone", "import"),
    ("a.safetensors", header({"experiment": 30_000 * "["}), "holds weights alone", "import"),
    ("caf\udce9.safetensors", header({"experiment": "{}"}), "its classes is None", "version"),
    ("a.ckpt", header({}), "holds weights alone", "train --weights"),
    ("a.ckpt", b"half of one", "is no checkpoint, or is cut short", "copy it again"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_named_with_the_way_that_works(
    tmp_path, name, content, said, hint
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        checkpoints.network(tmp_path / name)
    assert re.search(hint, refused.value.hint)


def test_a_run_is_not_continued_from_an_export(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(header(EXPORT))
    with pytest.raises(UserError, match="was exported from a checkpoint, and is not one"):
        checkpoints.read(tmp_path / "last.ckpt")


def test_a_checkpoint_that_would_unpack_to_any_size(tmp_path):
    file = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(UserError, match="packed as no checkpoint is"):
        checkpoints.read(file)


@pytest.fixture
def whole_network(tmp_path):
    """Writes a checkpoint of ResNet-8 on the digits with the given mean and standard deviation."""
    net = ResNet(8).state_dict()

    def write(**normalize: torch.Tensor) -> Path:
        saved = {
            "state_dict": {f"net.{name}": value for name, value in net.items()}
            | {f"normalize.{name}": value for name, value in normalize.items()},
            "experiment": {"depth": 8, "dataset": "digits"},
            "classes": list("0123456789"),
            "global_step": 1,
        }
        torch.save(saved, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return write


ONE = torch.ones(1, 1, 1)


def test_a_small_checkpoint_that_would_take_any_memory(whole_network):
    """A single stored number, expanded to an image of any size."""
    large = torch.zeros(1).expand(3, 10**4, 10**4)
    with pytest.raises(UserError, match=r"its weight .normalize.mean. is no plain tensor"):
        network(whole_network(mean=large, std=ONE))


@pytest.mark.parametrize(
    "normalize, said",
    [
        ({"mean": torch.zeros(7), "std": ONE}, r"normalize\.mean is \(7,\) there"),
        ({"mean": torch.zeros(()), "std": ONE}, r"normalize\.mean is \(\) there"),
        ({"mean": torch.zeros(3, 32, 16), "std": ONE}, r"normalize\.mean is \(3, 32, 16\) there"),
        ({"mean": ONE, "std": torch.ones(3, 16, 16)}, r"normalize\.std is \(3, 16, 16\) there"),
        ({"std": ONE}, r"normalize\.mean is nothing there"),
        ({"mean": torch.zeros(3, 16, 16), "std": ONE}, r"subtracts is 16x16; it sees 32x32"),
    ],
)
def test_a_mean_image_that_fits_no_image(whole_network, normalize, said):
    with pytest.raises(UserError, match=said):
        network(whole_network(**normalize))


@pytest.mark.parametrize("mean", [(1, 1, 1), (3, 1, 1), (3, 32, 32)])
def test_a_mean_comes_as_it_is(whole_network, mean):
    task = network(whole_network(mean=torch.full(mean, 0.5).double(), std=ONE))
    assert task.normalize.mean.shape == mean and task.normalize.mean.dtype == torch.float32


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"])
def test_a_config(canary, tmp_path, tag):
    file = tmp_path / "stranger.yaml"
    file.write_text(f"depth: !!python/{tag} [{canary}]\n")
    with pytest.raises(UserError, match="is not YAML"):
        Experiment.load(file)


def test_a_config_that_would_grow_to_any_size(tmp_path):
    """A billion laughs: each line is ten times the line before."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file = tmp_path / "laughs.yaml"
    file.write_text("\n".join([*lines, "unit: *a9"]))
    with pytest.raises(UserError) as refused:
        Experiment.load(file)
    assert len(str(refused.value)) < 500


def test_code_that_only_a_file_asks_for(canary, tmp_path, monkeypatch):
    """A module in the folder that only a config or a checkpoint names is not imported."""
    (tmp_path / "stranger.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    monkeypatch.chdir(tmp_path)
    trust.admit(["train", "--config", "stranger.yaml"])
    with pytest.raises(UserError, match="not the command line") as refused:
        shortcut_class("stranger:Shortcut")
    assert "--allow-code stranger:Shortcut" in refused.value.hint


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--shortcut", "allowed:Own"],
        ["eval", "a.ckpt", "--allow-code", "allowed:Own"],
        ["ablate", "--grid", "depth=20", "shortcut=identity,allowed:Own"],
    ],
)
def test_code_that_the_command_line_names_is_run(tmp_path, monkeypatch, words):
    source = "from resnetv2_cli.shortcuts import Shortcut\nclass Own(Shortcut): pass\n"
    (tmp_path / "allowed.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    trust.admit(words)
    assert shortcut_class("allowed:Own").__name__ == "Own"


def few() -> dict:
    """Five training images of each class and one test image."""
    rng = np.random.default_rng(0)
    picture = lambda: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)  # noqa: E731
    return {
        split: {c: [picture() for _ in range(n)] for c in CLASSES}
        for split, n in (("train", 5), ("test", 1))
    }


def test_cifar_whose_md5_is_another(canary, tmp_path, monkeypatch):
    root = write_archive(tmp_path / "data", few(), monkeypatch)
    (root / CIFAR10.base_folder / "data_batch_3").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UserError, match="md5 is not the published one"):
        archive.read("cifar10", root)


def test_cifar_whose_md5_is_right(canary, tmp_path, monkeypatch):
    """Even then only arrays are read: md5 can be forged."""
    root = write_archive(tmp_path / "data", few(), monkeypatch)
    content = pickle.dumps({"data": Canary(canary), "labels": []})
    (root / CIFAR10.base_folder / "test_batch").write_bytes(content)
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5]])
    with pytest.raises(UserError, match=r"holds more than arrays: it names posix\.mkdir"):
        archive.read("cifar10", root)


def test_an_archive_whose_members_lie_elsewhere(canary, tmp_path, monkeypatch):
    """Members above the folder and links out of it: nothing is ever unpacked."""
    root = write_archive(tmp_path / "data", few(), monkeypatch)
    folder = root / CIFAR10.base_folder
    file = root / CIFAR10.filename
    with tarfile.open(file, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{CIFAR10.base_folder}/{path.name}")
        evil = tarfile.TarInfo("../canary")
        evil.size = 4
        tar.addfile(evil, io.BytesIO(b"evil"))
        link = tarfile.TarInfo(f"{CIFAR10.base_folder}/data_batch_9")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    before = sorted(tmp_path.rglob("*"))
    train, test = archive.read("cifar10", root)
    assert len(train[1]) == 50 and len(test[1]) == 10
    assert sorted(tmp_path.rglob("*")) == before


def test_zip_archives_of_images(canary, tmp_path):
    """A member that would unpack to much more than an image, and one above the folder."""
    (tmp_path / "cifar10").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10" / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../canary/x.png", b"evil")
        for split in ("train", "test"):
            for name in CLASSES:
                file.writestr(f"{split}/{name}/bomb.png", b"\0" * 5_000_000)
    with pytest.raises(UserError, match=r"bomb\.png has 5,000,000 bytes"):
        images.load("cifar10", tmp_path)


def test_what_lies_in_the_cache(canary, tmp_path, monkeypatch):
    """A stranger's file in the cache runs nothing: the originals are decoded again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_archive(tmp_path / "data", few(), monkeypatch)
    good = images.load("cifar10", root)
    [kept] = (tmp_path / "cache").rglob("*.npz")
    trapped = np.empty(1, dtype=object)
    trapped[0] = Canary(canary)
    with open(kept, "wb") as out:
        np.savez(out, train_images=trapped, digest=np.array("x"))
    assert images.load("cifar10", root).digest == good.digest


def test_names_that_a_terminal_would_obey(capsys):
    console.table("[/].ckpt \x1b[2J", ["class", "%"], [["cat\x1b]0;owned\x07", "1.0"]])
    said = capsys.readouterr().out
    assert "[/].ckpt" in said and "cat" in said
    assert not any(c in said for c in "\x1b\x07")


def test_what_a_file_says_beside_its_weights_is_none_of_them(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"net.a": torch.ones(2)}, file, EXPORT | {"state_dict": '{"net.b": 1}'})
    assert checkpoints.network(file)["state_dict"].keys() == {"net.a"}
