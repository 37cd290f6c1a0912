"""What a run records about itself: where every value came from, how often the test set was read,
which code ran, and which weights were chosen."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback
from trainings import TINY, At, trained_as

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import evaluation, leaving, manifest, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.manifest import ORIGINS, origins
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.weightfile import find


def test_the_manifest_knows_where_values_came_from(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("depth: 8\nlr: 0.05\nepochs: 1\n")
    assert origins(config, {"lr": 0.1, "steps": 3}) == {
        "depth": f"file {config}", "lr": "flag", "steps": "flag"
    }  # fmt: skip
    config.write_text("layout: timm\ntest_size: 320\nweights: a.ckpt\nweights_sha256: ab\n")
    keys = ["stride_on", "option", "first_act", "protocol"]
    assert origins(config, {"weights": "mine.ckpt", "pad": "raw"}) == {
        **dict.fromkeys(keys, f"file {config}"), "weights": "flag", "pad": "flag",
        "weights_sha256": "the file of weights",
    }  # fmt: skip
    row = "row 'a' of table1"
    config.with_suffix(ORIGINS).write_text(json.dumps({"depth": row, "epochs": row}))
    assert origins(config, {}) == {"depth": row, "epochs": row}
    assert origins(config, {"steps": 3}) == {"depth": row, "steps": "flag"}
    for damaged in ("{", "[1]"):
        config.with_suffix(ORIGINS).write_text(damaged)
        assert origins(config, {}).keys() == {*keys, "pad", "weights", "weights_sha256"}


def test_the_manifest_counts_how_often_the_test_set_was_read(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    said = folder.manifest.read()
    lines = folder.metrics.read_text().splitlines()[1:]
    assert said["test_set_readings"] == sum(not line.endswith(",") for line in lines) == 2
    evaluation.evaluate(folder.last)
    assert folder.manifest.read()["test_set_readings"] == 3
    assert said["data"]["digest"] == checkpoints.read(whole.last)["data"] != ""
    assert said["settings"]["lr"] == {"value": 0.1, "from": "default"}
    assert said["settings"]["block"] == {"value": "basic", "from": "follows from the others"}
    assert len(said["code"]["source_sha256"]) == 64 and said["resumes"] == []


OTHERS = '{"name": "web app", "icons": []}'


@pytest.mark.parametrize("place", ["weights", "checkpoints"])
@pytest.mark.parametrize("text", [OTHERS, "[1]", "no JSON"])
def test_a_manifest_of_something_else_is_left_alone(whole, tmp_path, place, text):
    (tmp_path / place).mkdir()
    file = shutil.copy(whole.last, tmp_path / place / "net.ckpt")
    (tmp_path / "manifest.json").write_text(text)
    assert evaluation.manifest_of(file) is None
    if text == OTHERS:
        evaluation.evaluate(file)
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize("text", ["[1]", "no JSON"])
def test_a_manifest_that_a_run_cannot_read_any_more_is_named(whole, tmp_path, text):
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    folder.manifest.path.write_text(text)
    with pytest.raises(UserError, match="manifest.json is not the manifest of a run"):
        evaluation.evaluate(folder.last)
    folder.result.unlink()
    with pytest.raises(UserError, match="manifest.json is not the manifest of a run"):
        trained_as(folder.path, resume={})


def test_a_manifest_keeps_all_that_is_said_of_an_environment():
    said = manifest.environment()
    assert manifest.environment_in(said) == said


def test_a_checkout_that_was_changed_says_so_and_how(monkeypatch):
    says = {"ls-files": "__init__.py", "status": " M a.py", "rev-parse": "abc1234\n"}
    diffs = {("diff", "HEAD", "--", "."): "+ one line"}  # including what is staged
    monkeypatch.setattr(manifest, "git", lambda *words: diffs.get(words, says.get(words[0], "")))
    code = manifest.code(Experiment())
    assert code["commit"] == "abc1234+" and code["diff"] == "+ one line"


def test_the_digest_of_the_source_is_of_its_kernels_too(monkeypatch, tmp_path):
    package = shutil.copytree(manifest.PACKAGE, tmp_path / "package")
    monkeypatch.setattr(manifest, "PACKAGE", package)
    digests = {manifest.code(Experiment())["source_sha256"]}
    for name in ("run.py", "kernels.c", "vectors.h"):
        with (package / name).open("a") as file:
            file.write("\n")
        digests.add(manifest.code(Experiment())["source_sha256"])
    assert len(digests) == 4


def test_a_validation_split_leaves_the_test_set_unread_until_the_end(tmp_path):
    folder = trained_as(tmp_path / "run", val=1000, eval_every=0.2)
    assert folder.manifest.read()["test_set_readings"] == 1


@pytest.mark.parametrize("by", ["time", "signal"])
def test_a_test_that_a_run_leaves_before_is_made_when_it_continues(tmp_path, monkeypatch, by):
    over = SimpleNamespace(monotonic=lambda: math.inf)
    end = {
        "time": (lambda: monkeypatch.setattr(leaving, "time", over), 0),
        "signal": (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
    }
    do, status = end[by]
    folder, e = RunFolder(tmp_path / "run"), Experiment(**TINY | {"steps": 3, "eval_every": 2 / 90})
    with pytest.raises(Stopped) as stopped:
        run.train(e, folder, seconds=600, display=[At(3, do)])
    assert stopped.value.status == status and not folder.result.exists()
    assert folder.manifest.read()["test_set_readings"] == 1  # after the second iteration
    trained_as(folder.path, resume={})
    result = json.loads(folder.result.read_text())
    assert (result["test_step"], result["test_set_readings"]) == (3, 2)


class Ruin(Callback):
    """Zeroes the classifier's weights shortly before the last iteration."""

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 48:
            torch.nn.init.zeros_(task.net.head.fc.weight)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_chosen_is_what_is_tested(tmp_path, stopped):
    """Even if chosen before the run was stopped, with everything later being worse."""
    long = {"batch_size": 64, "steps": 50, "eval_every": 1.0, "warmup": 0, "val": 200}
    if stopped:
        leave = At(41, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            trained_as(tmp_path / "run", display=[leave], **long)
    resume = {} if stopped else None
    folder = trained_as(tmp_path / "run", display=[Ruin()], resume=resume, **long)
    errors = dict(read_metrics(folder.metrics)["val_error"])
    assert list(errors) == [20, 40, 50]  # the last iteration too, mid-epoch
    result = json.loads(folder.result.read_text())
    assert result["test_step"] == min(errors, key=errors.__getitem__) < 50
    for what in (folder.path, folder.best):
        scores, _ = evaluation.evaluate(find(what))
        assert scores["error"] == result["test_error"]


def test_what_a_flag_or_a_file_makes_of_another_setting_is_no_default(whole, tmp_path, here):
    flags = [*SMALL, "--steps", 1, "--micro-batch", 16, "--weights", whole.path]
    here("train", *flags, "--output", tmp_path / "run")
    settings = RunFolder(tmp_path / "run").manifest.read()["settings"]
    assert settings["accumulate"] == {"value": 4, "from": "--micro-batch 16"}
    assert settings["weights_sha256"]["from"] == "the file of weights"
