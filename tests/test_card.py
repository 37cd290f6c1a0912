"""The card beside an exported file: its recipe reproduces the run, its script runs, and it claims
nothing that was not measured."""

import ast
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from resnetv2_cli import form
from resnetv2_cli.ablation.studies import identity
from resnetv2_cli.checkpoint import experiment_of, read, weights, write
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import card, formats, study
from resnetv2_cli.inference import network
from resnetv2_cli.runfolder import RunFolder


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


def test_a_recipe_for_photographs_has_no_normalization_that_they_do_not_have():
    assert "normalize: pixel-mean" in card.recipe(Experiment())
    assert "normalize" not in card.recipe(Experiment(dataset="folder", depth=18))


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
    other = RunFolder(tmp_path / "s2").manifest  # the same settings, but other code
    with other.change() as said:
        said["code"]["unit"] = {"sha256": "0" * 64}
    assert card.seeds(tmp_path / "s1") == {0: 19.0, 1: 21.0}
    shutil.copytree(trained, tmp_path / "t")  # seed 0 once more
    assert card.seeds(tmp_path / "s0") == {0: 19.0, 1: 21.0}


def exported_as(trained, to: Path, **given) -> tuple[Experiment, study.Export]:
    """Export a checkpoint that says it was trained with the settings ``given``."""
    saved = read(trained / "checkpoints" / "last.ckpt")
    e = Experiment(**saved["experiment"] | {"log_every": 100} | given)  # recipes omit it
    write(saved | {"experiment": asdict(e)}, to / "other.ckpt")
    return e, study.export(to / "other.ckpt", "safetensors", None, None, None)


def read_recipe(made: study.Export, **flags) -> Experiment:
    """The experiment that ``--config`` reads from the recipe of a card."""
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
    """With the run's precision and engine, not those of the export's check on this machine."""
    e, made = exported_as(trained, tmp_path, **given)
    assert identity(read_recipe(made)) == identity(e)
    assert ("accumulate" in made.card.read_text()) is ("accumulate" in given)
    says = form.exported(made.file)["experiment"]
    assert identity(Experiment(**says)) == identity(e)


@pytest.mark.parametrize("freeze", ["", "stem,stage1"])
def test_the_recipe_of_a_run_that_began_with_weights_names_no_place_of_theirs(
    freeze, trained, tmp_path
):
    """Nor does the exported file; and neither names the folder of the images."""
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
        assert folder.path.absolute() == tmp_path / "run"
    made = study.export(Path("last.ckpt"), "safetensors", None, None, None)
    assert made.file == tmp_path / "run" / "export" / "last.safetensors"
    assert "360 test images" in made.card.read_text()
    monkeypatch.chdir(tmp_path)
    assert RunFolder.of(Path("run/any.ckpt")).path == Path("run")
    assert RunFolder.of(Path("any.ckpt")).path == tmp_path


def test_a_card_knows_that_bn_was_made_precise(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    saved = read(run / "checkpoints" / "last.ckpt")
    write(saved | {"precise_bn": 1408}, run / "last-precise-bn.ckpt")
    made = study.export(run / "last-precise-bn.ckpt", "safetensors", None, None, None)
    said = made.card.read_text()
    assert "with BN's statistics from 1,408 images: not measured" in said
    assert made.file.parent == run / "export" and "Not known" not in said


def test_a_card_of_a_run_of_another_version_has_its_own_seed_alone(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    with (run / "config.yaml").open("a") as config:
        config.write("of_another_version: 1\n")
    made = study.export(run / "checkpoints" / "last.ckpt", "safetensors", None, None, None)
    assert "One seed, n = 1" in made.card.read_text()


@pytest.mark.parametrize("name", ["net", "it's", 'a "b"', 'it\'s "b"', "n😀t", "caf\udce9", "a\\b"])
def test_a_name_in_a_script_is_that_name(name):
    assert ast.literal_eval(study.quoted(name)) == name
    assert study.quoted("net") == '"net"'


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
    assert form.exported(made.file)["imported"] == imported
    for mistaken in (3, {"from": [3]}):
        write(saved | {"imported": mistaken}, tmp_path / "b.ckpt")
        with pytest.raises(UserError, match="is not a checkpoint of resnetv2"):
            read(tmp_path / "b.ckpt")
