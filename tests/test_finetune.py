"""Fine-tuning: what comes from the given weights, what is new, what is frozen; the walk-through."""

import json
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import asdict

import pytest
import torch
from conftest import REPOSITORY, SHARED
from iterations import FakeTrainer
from PIL import Image

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import evaluation, form, plans, resume, run
from resnetv2_cli.ablation.studies import identity
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.images import digits
from resnetv2_cli.data.module import view_of
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import study
from resnetv2_cli.finetune import begin, network_of, refuse_another_architecture
from resnetv2_cli.inference import Picture, network, predict
from resnetv2_cli.runfolder import RunFolder

SMALL = {"dataset": "digits", "depth": 8, "batch_size": 64, "warmup": 0, "precision": "32-true"}


@pytest.fixture
def own_folder(tmp_path):
    """A user's own photographs: digits 0 to 2, as larger files in class folders."""
    for split, part in zip(("train", "val"), digits()[:2], strict=True):
        for i, (pixels, label) in enumerate(zip(*part, strict=True)):
            if label < 3 and i % 3 == 0:
                place = tmp_path / "own" / split / "abc"[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).resize((48, 40)).save(place / f"{i}.png")
    return tmp_path / "own"


def weights_of(folder) -> dict:
    return checkpoints.read(folder / "checkpoints" / "last.ckpt")["state_dict"]


def started(experiment: Experiment):
    task, _ = run.build(experiment)
    fresh = {name: value.clone() for name, value in task.state_dict().items()}
    return fresh, begin(task), task.state_dict()


def test_all_is_taken_where_the_classes_are_the_same(trained):
    """However the new network was initialized."""
    _, lines, now = started(Experiment(**SMALL, weights=str(trained), init="fan_in"))
    torch.testing.assert_close(now, weights_of(trained), rtol=0, atol=0)
    assert lines[0].startswith(f"weights: {len(now)} of {len(now)} tensors")


def test_the_network_is_that_of_the_weights_unless_it_is_said(trained, tmp_path, here):
    given = ["--weights", trained, "--dataset", "digits", "--stem", "cifar"]
    lines = here("show", *given, "--init", "fan_in").stdout.splitlines()
    assert {"depth: 8  # weights", "block: basic  # weights", "stem: cifar  # flag"} <= {*lines}
    assert "init: fan_in  # flag" in lines
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"depth: 20\nweights: {trained}\n")
    assert "depth: 20  # file" in here("show", "--config", recipe).stdout
    here("train", *given, "--steps", 1, "--output", tmp_path / "run", "--precision", "32-true")
    assert RunFolder(tmp_path / "run").manifest.read()["settings"]["depth"]["from"] == "weights"
    assert json.loads(here("describe", *given, "--json").stdout)["depth"] == 8
    given_to_gates = {
        "experiment": asdict(Experiment(**SMALL, shortcut="exclusive-gate", gate_bias=-3))
    }
    saved = checkpoints.read(trained / "checkpoints" / "last.ckpt") | given_to_gates
    checkpoints.write(saved, tmp_path / "gates.ckpt")
    gates = ["--weights", tmp_path / "gates.ckpt", "--dataset", "digits"]
    assert "gate_bias: -3.0  # weights" in here("show", *gates).stdout
    assert "gate_bias: null\n" in here("show", *gates, "--shortcut", "conv1x1").stdout
    other = [*given, "--unit", "original"]
    for command in (["train"], ["analyze", "--topic", "forward"], ["verify-resume"]):
        said = here(*command, *other, status=2, cwd=tmp_path).stderr
        assert "another architecture: unit full-preact there, unit original here" in said


def test_other_classes_get_a_new_classifier_and_the_normalization_of_the_weights(
    trained, own_folder
):
    """The normalization of photographs would feed a frozen stem at another scale."""
    data = {"dataset": "folder", "data_dir": str(own_folder), "stem": "cifar", "batch_size": 8}
    fresh, lines, now = started(Experiment(**{**SMALL, **data}, weights=str(trained)))
    given = weights_of(trained)
    for name, value in now.items():
        expected = fresh if name.startswith("net.head.fc.") else given
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert now["net.head.fc.weight"].shape[0] == 3 and now["normalize.mean"].shape[-1] == 32
    assert lines[1] == "the classifier is new: 10 classes there, 3 here"


def photographs_of(own_folder, trained, **given) -> Experiment:
    small = {**SMALL, "dataset": "folder", "data_dir": str(own_folder), "stem": "cifar"}
    small |= {"crop": "scale-aspect", "batch_size": 8, "steps": 2, "workers": 0}
    return Experiment(**small, weights=str(trained), **given)


def test_photographs_behind_a_mean_image_are_predicted_and_exported_as_evaluated(
    trained, own_folder, tmp_path
):
    """Each photograph is 48x40; evaluation sees its middle 35x35, resized to 32x32."""
    run.train(photographs_of(own_folder, trained), RunFolder(tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    _, task, data = evaluation.restore(file)
    assert task.normalize.mean.shape == (3, 32, 32)
    data.trainer = FakeTrainer()
    evaluated = torch.cat([batch.images for batch in data.test_dataloader()])
    found = [Picture(path.name, path) for path in data.test.files]
    seen = torch.stack([p.pixels for p in predict(network(file, devices="1"), found, 1)])
    assert torch.equal(seen, evaluated)
    made = study.export(file, "safetensors", tmp_path / "a.safetensors", None, None)
    assert "shorter side is resized to 37 (bicubic" in made.card.read_text()
    assert "SHA-256 of the files' names and labels `" in made.card.read_text()


def test_another_size_than_that_of_the_mean_image_is_refused(trained, own_folder, tmp_path):
    message = "mean image .* is 32x32; with --protocol 320 it sees 46x46"
    with pytest.raises(UserError, match=message) as caught:
        run.train(photographs_of(own_folder, trained, protocol="320"), RunFolder(tmp_path / "a"))
    assert caught.value.hint == "--protocol 224 or ten-crop fits" and not (tmp_path / "a").exists()
    run.train(photographs_of(own_folder, trained), RunFolder(tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=message):
        evaluation.evaluate(file, protocol="320")
    with pytest.raises(UserError, match=message):
        network(file, protocol="320")
    large = Experiment(dataset="folder", depth=18)
    with pytest.raises(UserError, match="it sees 224x224") as caught:
        view_of(large, run.build(Experiment(**SMALL))[0].normalize)
    assert "--normalize channel" in caught.value.hint


def test_as_many_classes_in_another_order_get_a_new_classifier_too(trained, tmp_path):
    saved = checkpoints.read(trained / "checkpoints" / "last.ckpt")
    checkpoints.write(saved | {"classes": saved["classes"][::-1]}, tmp_path / "other.ckpt")
    fresh, lines, now = started(Experiment(**SMALL, weights=str(tmp_path / "other.ckpt")))
    torch.testing.assert_close(now["net.head.fc.weight"], fresh["net.head.fc.weight"])
    assert lines[1] == "the classifier is new: 10 classes there, 10 here"
    with pytest.raises(UserError, match="; frozen, it would stay random"):
        started(Experiment(**SMALL, weights=str(tmp_path / "other.ckpt"), freeze="stem,head"))


def test_an_older_export_has_the_digest_of_the_weights_it_began_with_and_not_their_name(
    trained, tmp_path
):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a.safetensors"
    study.export(trained / "checkpoints" / "last.ckpt", "safetensors", file, None, None)
    about = form.exported(file)
    about["experiment"] |= {"weights_sha256": 64 * "a"}
    save_file(load_file(file), file, {key: json.dumps(said) for key, said in about.items()})
    _, [line], _ = started(Experiment(**SMALL, weights=str(file)))
    assert line.startswith("weights: ")


def test_another_architecture_is_explained(trained):
    wrong = {**SMALL, "depth": 14, "unit": "original", "shortcut": "dropout", "dropout_ratio": 0.3}
    with pytest.raises(UserError) as caught:
        started(Experiment(**wrong, weights=str(trained)))
    said = "shortcut identity, dropout_ratio None, dropout_inverted None there, depth 14"
    assert f"depth 8, unit full-preact, {said}" in str(caught.value)
    assert caught.value.hint == "it is that of --depth 8 --unit full-preact --shortcut identity"


def test_the_flags_of_another_architecture_can_be_typed(trained):
    saved = checkpoints.weights(trained / "checkpoints" / "last.ckpt")
    other = {"unit": "bn + | bn relu", "shortcut": "dropout", "dropout_inverted": False}
    saved["experiment"] |= other
    with pytest.raises(UserError) as caught:
        refuse_another_architecture(saved, Experiment(**SMALL), trained)
    flags = shlex.split(caught.value.hint.removeprefix("it is that of "))
    of_shortcut = ["--dropout-ratio", "0.5", "--no-dropout-inverted"]
    assert flags == ["--unit", "bn + | bn relu", "--shortcut", "dropout", *of_shortcut]


@pytest.mark.parametrize(
    "shortcut, name", [(s, n) for s, row in plans.shortcuts().items() for n in row.settings]
)
def test_a_default_of_a_shortcut_is_the_same_architecture_given_or_not(shortcut, name, tmp_path):
    left, default = {**SMALL, "shortcut": shortcut}, plans.shortcuts()[shortcut].settings[name]
    given = left | {name: default}
    for there, here in ((left, given), (given, left)):
        saved = {"experiment": asdict(Experiment(**there))}
        refuse_another_architecture(saved, Experiment(**here), tmp_path)


def test_plain_safetensors_are_taken_by_name(trained, tmp_path):
    from safetensors.torch import save_file

    given = weights_of(trained)
    plain = {n.removeprefix("net."): v.contiguous() for n, v in given.items() if "net." in n}
    save_file(plain, tmp_path / "plain.safetensors", {"classes": "2", "folded": "fc"})  # not ours
    file = str(tmp_path / "plain.safetensors")
    _, lines, now = started(Experiment(**SMALL, weights=file))
    assert lines[1] == "the classifier is taken as it is: the file names no classes"
    torch.testing.assert_close(now, given, rtol=0, atol=0)  # the same data, so the same mean image
    with pytest.raises(UserError, match="another architecture: net.body.stage1.unit1.*conv1"):
        started(Experiment(**{**SMALL, "block": "bottleneck", "depth": 11}, weights=file))
    theirs = {f"layer{i}.weight": v.contiguous() for i, v in enumerate(plain.values())}
    save_file(theirs, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="has no net.stem.conv.weight") as refused:
        network_of(tmp_path / "theirs.safetensors")  # before a network is planned
    assert "resnetv2 import" in refused.value.hint
    (tmp_path / "broken.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot read"):
        started(Experiment(**SMALL, weights=str(tmp_path / "broken.safetensors")))


@pytest.mark.parametrize("name", ["W.SAFETENSORS", "w.bin"])
def test_safetensors_are_known_by_what_is_in_them(name, tmp_path):
    from safetensors.torch import save_file

    save_file({"head.fc.bias": torch.arange(3.0)}, tmp_path / name)
    [bias] = checkpoints.weights(tmp_path / name)["state_dict"].values()
    assert bias.tolist() == [0, 1, 2]


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(trained, tmp_path):
    frozen = {"weights": str(trained), "freeze": "stem, stage1,stage2", "weight_decay": 0.1}
    e = Experiment(**SMALL, **frozen, steps=30, lr=0.01, eval_every=0.5)  # evaluated in between
    run.train(e, RunFolder(tmp_path / "run"))
    before, now = weights_of(trained), weights_of(tmp_path / "run")
    for name, value in now.items():
        part = "stage3" if "stage3" in name else "head" if "head" in name else "frozen"
        same = torch.equal(value, before[name])
        assert same if part == "frozen" or name.startswith("normalize.") else not same, name
    error = json.loads((tmp_path / "run" / "result.json").read_text())["test_error"]
    assert error < 40  # chance is 90: it started from the weights
    momenta = checkpoints.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    kept = [n for n, _ in run.build(e)[0].net.named_parameters() if "stage3" in n or "head" in n]
    assert len(momenta[0]["state"]) == len(kept)


def test_a_stopped_run_continues_without_its_weights_file(trained, tmp_path):
    """It stays frozen as before, and ends bit for bit as a run that was never stopped."""
    moved = tmp_path / "weights.ckpt"
    shutil.copy(trained / "checkpoints" / "last.ckpt", moved)
    e = Experiment(
        **SMALL, weights=str(moved), freeze="stem,stage1", steps=30, save_every=10, lr=0.01
    )
    whole = RunFolder(tmp_path / "whole")
    run.train(e, whole)
    folder = RunFolder(tmp_path / "stopped")
    shutil.copytree(whole.path, folder.path)
    folder.result.unlink()
    shutil.copy(folder.checkpoints / "step-00000010.ckpt", folder.last)
    moved.unlink()
    run.train(resume.continued(folder, {})[0], folder, resume=True)
    ended, expected = (checkpoints.read(f.last) for f in (folder, whole))
    assert ended["global_step"] == 30
    torch.testing.assert_close(ended["state_dict"], expected["state_dict"], rtol=0, atol=0)


def test_a_run_is_continued_with_the_weights_it_was_begun_with(trained, tmp_path):
    """Their file may have moved; one with other bytes is refused."""
    folder = RunFolder(tmp_path)
    folder.create(Experiment(**SMALL, weights=str(trained), freeze="stem"), {})
    moved = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "moved.ckpt")
    experiment, [change] = resume.continued(folder, {"weights": str(moved)})
    assert experiment.weights == str(moved) and "the weights are the same" in str(change)
    (tmp_path / "other.safetensors").write_bytes(b"other bytes")
    for other in (str(tmp_path / "other.safetensors"), None):
        with pytest.raises(UserError, match="--weights .* would make this another experiment"):
            resume.continued(folder, {"weights": other})


def test_an_experiment_is_the_same_by_the_bytes_of_its_weights(trained, tmp_path):
    one = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "one.ckpt")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other bytes")
    e = Experiment(**SMALL, weights=str(trained))
    assert identity(e) == identity(Experiment(**SMALL, weights=str(one)))
    assert identity(e) != identity(Experiment(**SMALL, weights=str(other)))
    assert identity(e) != identity(Experiment(**SMALL))
    assert identity(e) != identity(Experiment(**SMALL, weights=str(trained), freeze="stem"))
    (tmp_path / "config.yaml").write_text(e.dump())
    assert Experiment.load(tmp_path / "config.yaml") == e
    changed = Experiment.load(tmp_path / "config.yaml", weights=str(other))
    assert changed.weights_sha256 != e.weights_sha256
    one.write_bytes(bytes(one.stat().st_size))  # replaced since, by a file of the same size
    os.utime(one, (1, 1))
    with pytest.raises(UserError, match="is not what this run began with: its SHA-256 differs"):
        started(Experiment(**SMALL, weights=str(one), weights_sha256=e.weights_sha256))


def test_a_recipe_is_taken_with_the_weights_that_it_was_made_with_alone(tmp_path):
    """The recipe has the SHA-256 of its weights, not their name."""
    for name in ("right", "wrong"):
        (tmp_path / name).write_bytes(name.encode())
    right, wrong = str(tmp_path / "right"), str(tmp_path / "wrong")
    made = Experiment(**SMALL, weights=right)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset: digits\ndepth: 8\nweights_sha256: {made.weights_sha256}\n")
    assert Experiment.load(recipe, weights=right).weights_sha256 == made.weights_sha256
    with pytest.raises(UserError, match="weights_sha256 is given, and no weights") as caught:
        Experiment.load(recipe)
    assert caught.value.hint == "--weights names the file with this SHA-256"
    with pytest.raises(UserError, match="wrong is not what weights_sha256 asks for") as caught:
        Experiment.load(recipe, weights=wrong)
    assert str(made.weights_sha256) in caught.value.hint


@pytest.mark.parametrize(
    "given, error, hint",
    [
        ({"weights": "nowhere.ckpt"}, "there is no checkpoint nowhere.ckpt", "a run folder"),
        ({"weights": "~no-user/it"}, "there is no checkpoint ~no-user/it", "a run folder"),
        ({"freeze": "stem"}, "frozen layers would stay random", "--weights"),
        ({"freeze": "stage9"}, "freeze: unknown part 'stage9'", "stage"),
        ({"freeze": "stem,stage1,stage2,stage3,head", "weights": "x", "weights_sha256": "0"},
         "nothing is left to train", "freeze some of"),
    ],
)  # fmt: skip
def test_mistakes(given, error, hint):
    with pytest.raises(UserError, match=error) as caught:
        Experiment(**SMALL, **given)
    assert hint in caught.value.hint


WALK = (REPOSITORY / "docs" / "finetune.md").read_text()
COMMANDS = re.findall(r"^resnetv2 (.+)$", WALK, re.MULTILINE)
QUICK = {"train": ["--batch-size", "8", "--epochs", "0.3", "--warmup", "0", "--workers", "0"]}


def unpacked(archive: str, choose) -> None:
    """Unpack some members of an archive of real images; ``choose``: name -> path, or None."""
    with zipfile.ZipFile(SHARED / archive) as file:
        for name in file.namelist():
            if to := choose(name):
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(file.read(name))


@pytest.fixture
def walk(shared_data, tmp_path, monkeypatch):
    """A few images of each class of CIFAR-10 in data/, and photographs in photos/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counts: dict[str, int] = {}

    def few(name):
        split, label, _ = name.split("/") if name.count("/") == 2 else ("", "", "")
        most = {"train": 8, "test": 2}.get(split, 0)
        counts[split + label] = counts.get(split + label, 0) + 1
        return tmp_path / "data" / "cifar10" / name if counts[split + label] <= most else None

    for part in sorted(p.name for p in (shared_data / "cifar10").glob("*.zip")):
        unpacked(f"cifar10/{part}", few)
    places = iter(range(1000))

    def own(name):
        if not name.endswith(".JPEG"):
            return None
        split = "val" if next(places) % 4 == 0 else "train"
        label = "animal" if name.split("/")[1] < "n0266" else "thing"
        return tmp_path / "photos" / split / label / name.split("/")[-1]

    unpacked("imagenet-sample.zip", own)


def test_the_walk_through_from_its_very_text(walk, tmp_path, monkeypatch, here):
    """Run each of its commands as written, with three iterations instead of hundreds."""
    said = noted = ""
    assert [shlex.split(c)[0] for c in COMMANDS] == ["train", "train", "eval", "predict"]
    for command in COMMANDS:
        monkeypatch.delenv(run.FOLDER, raising=False)
        words = shlex.split(command)
        done = here(*words, *QUICK.get(words[0], []))
        said, noted = said + done.stdout, noted + done.stderr
    assert "the classifier is new: 10 classes there, 2 here" in noted
    assert "224 as 32" in said and "error by class" in said and "animal" in said and "thing" in said
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    before, now = weights_of(tmp_path / "runs/pretrained"), weights_of(tmp_path / "runs/photos")
    frozen = [name for name in now if re.search(r"stem|stage1|stage2", name)]
    assert frozen and all(torch.equal(now[name], before[name]) for name in frozen)
