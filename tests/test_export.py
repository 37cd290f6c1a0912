"""export: BN is folded where a convolution feeds it alone; files compute what the network does."""

import json
import re
import shutil
import tomllib
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from resnetv2_cli.ablation.studies import identity
from resnetv2_cli.checkpoint import experiment_of, read, weights, write
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.augment import Normalize
from resnetv2_cli.data.protocols import View
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import card, check, fold, formats, hub, study
from resnetv2_cli.inference import network
from resnetv2_cli.plans import UNITS, shortcuts
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.runfolder import RunFolder

PACKAGE = Path(card.__file__).parent.parent


def net_of(unit: str, shortcut: str, depth=5, block="single", **more) -> ResNet:
    """A small network whose BN and learned scales are not what they begin as."""
    net = ResNet(depth, block, unit, shortcut, 10, **more)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in net.parameters():
        if parameter.ndim == 0:  # ReZero's a, which would hide F
            nn.init.constant_(parameter, 0.7)
    return net.eval()


def norms(net) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


# Of 9 in a basic network of 8 layers with projections: the stem's, two of each F, one behind it
# or a projection's. What stands behind an addition has no convolution to go into.
LEFT = {
    "original": 0,  # every BN is "right after the weight layers" (caption of Fig. 2)
    "bn-after-add": 3,  # one behind each of three additions
    "relu-before-add": 0,
    "relu-only-preact": 0,
    "full-preact": 3,  # two pre-activations and the head's; the first unit comes activated
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
    """Networks side by side in one graph: an exporter takes seconds each time it is called."""

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
def test_the_script_of_a_card_has_the_logits_of_the_network(trained, tmp_path, monkeypatch, format):
    path = trained / "checkpoints" / "last.ckpt"
    made = study.export(path, format, tmp_path / f"net{formats.FORMATS[format].suffix}", None, None)
    monkeypatch.chdir(tmp_path)
    [script] = re.findall(r"```python\n(.*?)```", made.card.read_text(), re.DOTALL)
    images = torch.rand(3, 3, 32, 32)
    names = {"images": images.numpy() if format == "onnx" else images}
    with torch.inference_mode():
        exec(script, names)
        wanted = network(path, precision="32-true")(255 * images.permute(0, 2, 3, 1))
    torch.testing.assert_close(torch.as_tensor(names["logits"]), wanted, rtol=1e-4, atol=1e-4)


def test_a_card_of_folded_weights_reads_them(trained, tmp_path, monkeypatch):
    path = trained / "checkpoints" / "last.ckpt"
    made = study.export(path, "safetensors", tmp_path / "net.safetensors", True, None)
    monkeypatch.chdir(tmp_path)
    [script] = re.findall(r"```python\n(.*?)```", made.card.read_text(), re.DOTALL)
    exec(script, names := {})
    assert all(isinstance(w, torch.Tensor) for w in names["weights"].values())
    with pytest.raises(UserError, match="folded"):
        network(made.file)


def unpacked(file: Path) -> bytes:
    """All bytes of a file; of a zip those of its members."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return b"".join(map(archive.read, archive.namelist()))


def metadata(format: str, file) -> dict[str, str]:
    """What a file says of itself, by the package that reads its kind."""
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
    """Wherever a checkpoint is read that is not continued."""
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
    before, after = weights(file), weights(again.file)
    torch.testing.assert_close(before.pop("state_dict"), after.pop("state_dict"), rtol=0, atol=0)
    assert before == after and after["imported"] == {"from": "timm"}


def test_a_failed_check_leaves_no_file_and_the_one_before(trained, tmp_path):
    """A network that changed between the export and the check."""
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
    """Code of one's own that looks at what it computes."""

    def forward(self, images):
        return images.mean((2, 3)) * (2 if images.mean() > 0 else 1)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_a_network_that_a_format_cannot_follow_is_one_line(trained, tmp_path, capfd, format):
    task = network(trained / "checkpoints" / "last.ckpt", precision="32-true")
    model = fold.Exported(task.normalize, Untraceable()).eval()
    message = f"^--format {format} cannot follow this network: .*data-dependent.*$"
    with pytest.raises(UserError, match=message) as caught:
        check.written(task, model, format, View(32), tmp_path / "net", {})
    assert caught.value.hint == "--format safetensors keeps the weights alone"
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


def test_a_recipe_for_photographs_has_no_normalization_that_they_do_not_have():
    assert "normalize: pixel-mean" in card.recipe(Experiment())
    assert "normalize" not in card.recipe(Experiment(dataset="folder", depth=18))


def test_a_file_says_how_photographs_are_resized_and_cropped():
    made = study.metadata({"classes": [], "global_step": 0}, Experiment(), [], View(224, 224 / 256))
    assert json.loads(made["input"])["resize"].items() >= {"shorter_side": 256, "crop": 224}.items()


def test_a_card_has_the_spread_over_the_seeds_beside_the_run(trained, tmp_path):
    """Runs of the same experiment count, each seed once; another experiment's do not."""
    for seed, error, lr in ((0, 19.0, "0.1"), (1, 21.0, "0.1"), (2, 24.0, "0.1"), (3, 1.0, "0.2")):
        other = RunFolder(tmp_path / f"s{seed}")
        shutil.copytree(trained, other.path)
        text = re.sub(r"^seed: 0", f"seed: {seed}", other.config.read_text(), flags=re.M)
        other.config.write_text(re.sub(r"^lr: 0.1", f"lr: {lr}", text, flags=re.M))
        result = json.loads(other.result.read_text()) | {"seed": seed, "test_error": error}
        other.result.write_text(json.dumps(result))
    (tmp_path / "no run").mkdir()
    assert card.seeds(tmp_path / "s1") == {0: 19.0, 1: 21.0, 2: 24.0}
    file = tmp_path / "s1" / "checkpoints" / "last.ckpt"
    made = study.export(file, "safetensors", None, None, None)
    assert made.file == tmp_path / "s1" / "export" / "last.safetensors"
    assert "21.00 (21.33±2.52) %, median (mean±std), n = 3 (0: 19.00, 1: 21.00, 2: 24.00)" in (
        made.card.read_text()
    )
    other = RunFolder(tmp_path / "s2").manifest  # the same settings, and other code behind them
    with other.change() as said:
        said["code"]["unit"] = {"sha256": "0" * 64}
    assert card.seeds(tmp_path / "s1") == {0: 19.0, 1: 21.0}
    shutil.copytree(trained, tmp_path / "t")  # of seed 0 again
    assert card.seeds(tmp_path / "s0") == {0: 19.0, 1: 21.0}


def exported_as(trained, to: Path, **given) -> tuple[Experiment, study.Export]:
    """The export of a checkpoint that says that it was trained by other settings."""
    saved = read(trained / "checkpoints" / "last.ckpt")
    e = Experiment(**saved["experiment"] | {"log_every": 100} | given)  # no recipe has that one
    write(saved | {"experiment": asdict(e)}, to / "other.ckpt")
    return e, study.export(to / "other.ckpt", "safetensors", None, None, None)


def read_recipe(made: study.Export, **flags) -> Experiment:
    """What ``--config`` makes of the recipe that a card has."""
    text, _, needs = made.card.read_text().partition("```yaml\n")[2].partition("```")
    assert ("It needs `--weights FILE`" in needs) is bool(flags)
    file = made.card.with_name("recipe.yaml")
    file.write_text(text)
    return Experiment.load(file, **flags)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.05, "nesterov": True, "val": 500, "shortcut": "dropout", "precision": "32-true"},
        {"accumulate": 4, "sync_bn": True, "precision": "bf16-mixed"},
    ],
)
def test_the_recipe_of_a_card_makes_the_same_experiment(given, trained, tmp_path):
    """Whatever the check computed in, and on this machine."""
    e, made = exported_as(trained, tmp_path, **given)
    assert identity(read_recipe(made)) == identity(e)
    assert ("accumulate" in made.card.read_text()) is ("accumulate" in given)
    says = json.loads(metadata("safetensors", made.file)["experiment"])
    assert identity(Experiment(**says)) == identity(e)


@pytest.mark.parametrize("freeze", ["", "stem,stage1"])
def test_the_recipe_of_a_run_that_began_with_weights_names_no_place_of_theirs(
    freeze, trained, tmp_path
):
    """Nor does the file, which says of the images' place as little."""
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    file = str(tmp_path / "w.safetensors")
    e, made = exported_as(trained, tmp_path, weights=file, freeze=freeze, data_dir=str(tmp_path))
    for written in (made.card, made.file):
        assert str(tmp_path).encode() not in written.read_bytes()
    assert f"weights whose file has the SHA-256 `{e.weights_sha256}`" in made.card.read_text()
    assert identity(read_recipe(made, weights=file)) == identity(e)
    of_file = experiment_of(weights(made.file))
    assert (of_file.weights, of_file.weights_sha256) == ("w.safetensors", e.weights_sha256)


def test_a_card_claims_nothing_for_weights_that_were_not_measured(trained, tmp_path):
    loose = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "loose.ckpt")
    made = study.export(loose, "safetensors", None, None, None)
    assert "Not known: the checkpoint lay in no run's folder" in made.card.read_text()
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    result = json.loads((run / "result.json").read_text()) | {"steps": 500, "test_step": 300}
    (run / "result.json").write_text(json.dumps(result))
    made = study.export(run / "checkpoints" / "last.ckpt", "safetensors", None, None, None)
    assert "Of this file, iteration 92: not measured" in made.card.read_text()
    assert "the run's headline, after 300 iterations" in made.card.read_text()
    (run / "result.json").unlink()
    made = study.export(run / "checkpoints" / "last.ckpt", "safetensors", None, None, None)
    assert "the run has not ended; this is iteration 92 of 92" in made.card.read_text()
    assert "Not known" not in made.card.read_text() and "torchvision" in made.card.read_text()


def test_a_checkpoint_is_in_its_run_from_wherever_it_is_called(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    for place, name in (
        (tmp_path, "run/checkpoints/last.ckpt"),
        (tmp_path / "run", "checkpoints/last.ckpt"),
        (tmp_path / "run" / "checkpoints", "last.ckpt"),
    ):
        monkeypatch.chdir(place)
        folder = RunFolder.of(Path(name))
        assert folder and folder.path.absolute() == tmp_path / "run"
    made = study.export(Path("last.ckpt"), "safetensors", None, None, None)
    assert made.file == tmp_path / "run" / "export" / "last.safetensors"
    assert "360 test images" in made.card.read_text()
    monkeypatch.chdir(tmp_path)
    assert RunFolder.of(Path("run/last.ckpt")) is RunFolder.of(Path("last.ckpt")) is None


def test_a_card_has_classes_whose_names_are_no_text(trained, tmp_path):
    saved = read(trained / "checkpoints" / "last.ckpt")
    write(saved | {"classes": ["caf\udce9", *saved["classes"][1:]]}, tmp_path / "a.ckpt")
    made = study.export(tmp_path / "a.ckpt", "safetensors", None, None, None)
    assert "10 classes: caf\\udce9, 1," in made.card.read_text()


def test_a_card_claims_no_recipe_for_imported_weights(trained, tmp_path):
    saved = read(trained / "checkpoints" / "last.ckpt")
    imported = {"from": "timm", "network": "ResNetV2", "file": "t.pth", "sha256": "0" * 64}
    write(saved | {"imported": imported}, tmp_path / "a.ckpt")
    made = study.export(tmp_path / "a.ckpt", "safetensors", None, None, None)
    text = made.card.read_text()
    assert "lr: 0.1" not in text and all(f"`{value}`" in text for value in imported.values())
    assert json.loads(metadata("safetensors", made.file)["imported"]) == imported
    for mistaken in (3, {"from": [3]}):
        write(saved | {"imported": mistaken}, tmp_path / "b.ckpt")
        with pytest.raises(UserError, match="is not a checkpoint of resnetv2"):
            read(tmp_path / "b.ckpt")


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_file_is_kept(tmp_path, monkeypatch):
    """A port of this machine where nobody listens."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    file = tmp_path / "net.onnx"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="cannot upload to me/mine: ") as caught:
        hub.push("me/mine", file, file)
    assert "net.onnx is kept" in caught.value.hint and file.exists()
