"""export: BN directly after a convolution is folded; files compute what the network computes."""

import json
import os
import re
import tomllib
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from resnetv2_cli import checkpoint
from resnetv2_cli.checkpoint import read, weights, write
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.protocols import View
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import card, check, fold, formats, hub, study
from resnetv2_cli.inference import network
from resnetv2_cli.plans import UNITS, shortcuts
from resnetv2_cli.resnet import ResNet

PACKAGE = Path(card.__file__).parent.parent


def net_of(unit: str, shortcut: str, depth=5, block="single", **more) -> ResNet:
    """A small network whose BN and learned scales are not at their initial values."""
    net = ResNet(depth, block, unit, shortcut, 10, **more)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in net.parameters():
        if parameter.ndim == 0:  # ReZero's a, which at 0 would hide F
            nn.init.constant_(parameter, 0.7)
    return net.eval()


def norms(net) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


# BNs left of the 7 in a basic network of 8 layers, or 9 if its projections have BN too. One that
# follows an addition has no convolution to be folded into.
LEFT = {
    "original": 0,  # every BN is "right after the weight layers" (caption of Fig. 2)
    "bn-after-add": 3,  # one after each of three additions
    "relu-before-add": 0,
    "relu-only-preact": 0,
    "full-preact": 3,  # two pre-activations and the head's; the stem activates for the first unit
}


def test_there_is_a_count_for_each_unit():
    assert LEFT.keys() == UNITS.keys()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("option", ["A", "B"])
def test_bn_directly_behind_a_convolution_is_folded_and_no_other(unit, option):
    net, x = net_of(unit, "identity", 8, "basic", option=option), torch.randn(4, 3, 32, 32)
    expected, before = net(x), norms(net)
    gone = fold.folded_into(net)
    assert norms(net) == LEFT[unit] == before - len(gone)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shortcut", shortcuts())
def test_folding_leaves_every_shortcut_what_it_is(shortcut):
    net, x = net_of("original", shortcut, 11, "bottleneck"), torch.randn(4, 3, 32, 32)
    expected = net(x)
    fold.folded_into(net)
    assert norms(net) == 0
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """Networks side by side in one graph, as each call of an exporter takes seconds."""

    def __init__(self, nets) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, images):
        return torch.cat([net(images) for net in self.nets], 1)


@pytest.mark.parametrize(
    "pairs",
    [[(unit, "identity") for unit in UNITS], [("full-preact", name) for name in shortcuts()]],
    ids=["every unit", "every shortcut"],
)
def test_onnx_computes_every_unit_and_shortcut(pairs, tmp_path):
    nets = [net_of(*pair) for pair in pairs]
    model = fold.Exported(Normalize(torch.rand(3, 32, 32), torch.ones(1, 1, 1)), Several(nets))
    model.eval()
    file = tmp_path / "net.onnx"
    formats.write_onnx(model, torch.zeros(2, 3, 32, 32), file, {})
    run, images = formats.read_onnx(model, file), torch.rand(5, 3, 32, 32)
    for n in (5, 1):  # the batch is dynamic
        with torch.no_grad():
            expected = model(images[:n])
        torch.testing.assert_close(run(images[:n]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_extra_that_is_named_has_what_a_format_needs(format):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = {re.match(r"\w+", p)[0] for p in project["optional-dependencies"]["export"]}
    assert extra >= {*formats.FORMATS[format].needs}


def test_what_exporters_print_is_no_part_of_the_json(here, trained, tmp_path, monkeypatch):
    export = torch.onnx.export

    def said(*given, **more):  # as some versions do
        print("Applied 6 of general pattern rewrite rules.")
        return export(*given, **more)

    monkeypatch.setattr(torch.onnx, "export", said)
    flags = ("--format", "onnx", "--output", tmp_path / "net.onnx", "--json")
    assert json.loads(here("export", trained, *flags).stdout)["check"]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_file_is_checked_on_the_test_images_and_has_its_card(trained, tmp_path, here, format):
    file = tmp_path / f"net{formats.FORMATS[format].suffix}"
    done = here("export", trained, "--format", format, "-o", file, "--json")
    made = json.loads(done.stdout)
    assert made["check"]["source"] == "test images of digits"
    assert made["check"]["same"] == made["check"]["images"] == 256
    assert 0 < made["check"]["difference"] < 1e-4
    assert len(made["folded"]) == (0 if format == "safetensors" else 4) and made["bn"] == 7
    text = (tmp_path / f"{file.name}.md").read_text()
    error = json.loads((trained / "result.json").read_text())["test_error"]
    for part in (made["sha256"], f"Test error {error:.2f} % of 360 test images", "torch 2",
                 "depth: 8", "10 classes: 0, 1", "n = 1", file.name):  # fmt: skip
        assert part in text, part
    assert sorted(p.name for p in tmp_path.iterdir()) == [file.name, f"{file.name}.md"]
    says = {key: json.loads(metadata(format, file)[key]) for key in ("classes", "input", "folded")}
    assert says["classes"] == [str(i) for i in range(10)] and says["folded"] == made["folded"]
    assert b"site-packages" not in unpacked(file) and str(PACKAGE).encode() not in unpacked(file)
    assert says["input"]["shape"] == ["N", 3, 32, 32] and says["input"]["range"] == [0, 1]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_folder_s_name_need_be_no_text(format, tmp_path):
    normalize = Normalize(torch.rand(3, 32, 32), torch.ones(1, 1, 1))
    model = fold.Exported(normalize, net_of("full-preact", "identity")).eval()
    images = torch.rand(2, 3, 32, 32)
    file = tmp_path / os.fsdecode(b"h\xff") / "net.tmp"
    file.parent.mkdir()
    formats.FORMATS[format].write(model, images, file, {})
    with torch.no_grad():
        found, expected = formats.FORMATS[format].read(model, file)(images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def unpacked(file: Path) -> bytes:
    """All bytes of a file; if it is a zip, those of its members."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return b"".join(map(archive.read, archive.namelist()))


def metadata(format: str, file) -> dict[str, str]:
    """A file's metadata, read by its format's own package."""
    if format == "onnx":
        import onnx

        return {p.key: p.value for p in onnx.load(file).metadata_props}
    if format == "safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            return opened.metadata()
    found = dict.fromkeys(["classes", "input", "folded"], "")
    torch.export.load(file, extra_files=found)
    return found


def test_safetensors_are_weights_to_start_from_unless_bn_is_folded(trained, tmp_path):
    path = trained / "checkpoints" / "last.ckpt"
    made = study.export(path, "safetensors", tmp_path / "a.safetensors", None, None)
    saved, given = weights(made.file), read(path)
    torch.testing.assert_close(saved["state_dict"], dict(given["state_dict"]), rtol=0, atol=0)
    assert saved["classes"] == given["classes"]
    folded = study.export(path, "safetensors", tmp_path / "b.safetensors", True, None)
    with pytest.raises(UserError, match="has no BN any more") as caught:
        weights(folded.file)
    assert "--no-fold" in caught.value.hint


def test_an_export_stands_for_its_checkpoint(trained, here, tmp_path):
    """Wherever a checkpoint is read, except to continue a run."""
    path, file = trained / "checkpoints" / "last.ckpt", tmp_path / "a.safetensors"
    saved = read(path) | {"imported": {"from": "timm"}}
    write(saved, tmp_path / "a.ckpt")
    study.export(tmp_path / "a.ckpt", "safetensors", file, None, None)
    ours, theirs = (json.loads(here("eval", of, "--json").stdout) for of in (path, file))
    assert ours.pop("picture") != theirs.pop("picture") and ours == theirs and ours["step"] == 92
    flags = ["--topic", "forward", "--json", "--output", tmp_path / "analysis"]
    ours, theirs = (json.loads(here("analyze", of, *flags).stdout) for of in (path, file))
    assert ours["topics"] == theirs["topics"]
    assert json.loads(here("diff", path, file, "--json").stdout)["settings"] == {}
    again = study.export(file, "safetensors", tmp_path / "b.safetensors", None, None)
    assert again.file.read_bytes() == file.read_bytes()  # its metadata is sorted by name
    before, after = weights(file), weights(again.file)
    torch.testing.assert_close(before.pop("state_dict"), after.pop("state_dict"), rtol=0, atol=0)
    assert before == after and after["imported"] == {"from": "timm"}


def test_a_failed_check_leaves_no_file_and_the_one_before(trained, tmp_path):
    """The network is changed between the export and the check."""
    task = network(trained / "checkpoints" / "last.ckpt", precision="32-true")
    model, _ = fold.exported(task, False)
    with torch.no_grad():
        task.net.stem.conv.weight[0] += 0.01
    to = tmp_path / "net.safetensors"
    to.write_text("what was there before")
    with pytest.raises(UserError, match="computes something else: largest logit difference"):
        check.written(task, model, "safetensors", View(32), to, {})
    assert [p.name for p in tmp_path.iterdir()] == [to.name]
    assert to.read_text() == "what was there before"


class Untraceable(nn.Module):
    """User code that branches on the values it computes."""

    def forward(self, images):
        return images.mean((2, 3)) * (2 if images.mean() > 0 else 1)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_a_format_cannot_export_is_one_line(trained, tmp_path, capfd, format):
    task = network(trained / "checkpoints" / "last.ckpt", precision="32-true")
    model = fold.Exported(task.normalize, Untraceable()).eval()
    message = f"^--format {format} cannot export this network: .*data-dependent.*$"
    with pytest.raises(UserError, match=message) as caught:
        check.written(task, model, format, View(32), tmp_path / "net", {})
    assert caught.value.hint == "--format safetensors writes the weights alone"
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, images):
        return torch.full((len(images), 3), self.logit)


@pytest.mark.parametrize(
    "logit, off, rounding",
    [(0, 5e-5, True), (0, 2e-4, False), (0, float("nan"), False), (90, 5e-3, True),
     (90, 2e-2, False)],
)  # fmt: skip
def test_what_is_taken_for_rounding(logit, off, rounding):
    pixels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    with nullcontext() if rounding else pytest.raises(UserError, match="something else"):
        check.compare(Constant(logit), Constant(logit + off), pixels, "images")


def test_without_test_images_it_is_compared_on_noise(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = network(trained / "checkpoints" / "last.ckpt", dataset="cifar10")
    pixels, source = check.test_images(task, View(32))  # and nothing is downloaded
    assert source == "images of noise" and pixels.float().std() > 70
    assert list(tmp_path.iterdir()) == []


def test_the_images_that_are_compared_are_of_every_class(trained):
    """Test images may be sorted by class, so they are sampled evenly to the end. Digits have more
    than are compared, but not twice as many."""
    task = network(trained / "checkpoints" / "last.ckpt")
    pixels, source = check.test_images(task, View(32))
    assert source == "test images of digits" and len(pixels) == check.SMALL
    last = images.load("digits", Path()).test.images[-2:]  # one is among evenly spaced ones
    assert any(torch.equal(pixels[-1], torch.from_numpy(image)) for image in last)


def test_nothing_is_downloaded_over_an_archive_that_was_cut_off(trained, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_url", lambda url, *_: asked.append(url)
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"cut")
    monkeypatch.chdir(tmp_path)
    task = network(trained / "checkpoints" / "last.ckpt", dataset="cifar10")
    assert check.test_images(task, View(32))[1] == "images of noise" and not asked


def test_a_file_says_how_photographs_are_resized_and_cropped():
    made = study.metadata({"classes": [], "global_step": 0}, Experiment(), [], View(224, 224 / 256))
    assert json.loads(made["input"])["resize"].items() >= {"shorter_side": 256, "crop": 224}.items()


def test_what_is_exported_is_read_once(trained, tmp_path, monkeypatch):
    """A run may save meanwhile: read twice, the card would name the iteration of other weights."""
    path, read_, seen = trained / "checkpoints" / "last.ckpt", checkpoint.network, []
    monkeypatch.setattr(checkpoint, "network", lambda file: seen.append(file) or read_(file))
    study.export(path, "safetensors", tmp_path / "net.safetensors", None, None)
    assert seen == [path]


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_file_is_kept(tmp_path, monkeypatch):
    """Nothing listens on the port of this machine that the hub is set to."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    file = tmp_path / "net.onnx"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot upload to me/mine: ") as caught:
        hub.push("me/mine", file, file)
    assert "net.onnx is kept" in caught.value.hint and file.exists()
