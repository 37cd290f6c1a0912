"""Precise BN: statistics over many training images, in a checkpoint that is otherwise the same."""

import json
import shlex
import shutil
from itertools import islice

import pytest
import torch
from conftest import SMALL
from iterations import FakeTrainer
from torch.optim.swa_utils import update_bn
from trainings import TINY, same, trained_as

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import evaluation, jsonfile
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.precise import precise

OWN = """
from resnetv2_cli.shortcuts import Shortcut


class Own(Shortcut):
    def forward(self, x, residual):
        return 0.9 * self.carry(x) + residual
"""
STATISTICS = ("running_mean", "running_var")


def states(*files) -> list[dict]:
    return [checkpoints.read(file)["state_dict"] for file in files]


@pytest.mark.parametrize("shortcut, images, batches", [("identity", None, 89), ("dropout", 100, 6)])
def test_they_are_the_means_of_whole_batches_and_nothing_else_changes(
    tmp_path, shortcut, images, batches
):
    """The same as by PyTorch's ``update_bn`` over the same batches."""
    file = trained_as(tmp_path / "run", shortcut=shortcut).last
    heard: list[tuple[int, int]] = []
    made, n = precise(file, images, lambda *counts: heard.append(counts))
    assert heard == [(k + 1, batches) for k in range(batches)]
    assert n == 16 * batches == made["precise_bn"]
    saved = checkpoints.read(file)
    assert {k: made[k] for k in ("experiment", "classes", "global_step", "data")}.items() <= (
        saved.items()
    )
    before, after = saved["state_dict"], made["state_dict"]
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(STATISTICS)}

    _, task, _ = evaluation.restore(file)
    task, data = evaluation.restore_as(file, task.experiment)
    data.trainer = FakeTrainer()

    def inputs():
        for number, batch in enumerate(islice(data.batches(0), batches)):
            task.draw(number, 0)
            yield task.pixels(batch)

    if images:
        data.experiment = Experiment(**TINY, shortcut=shortcut)  # of 12 iterations
    else:
        data.experiment = Experiment(**TINY | {"steps": 89}, shortcut=shortcut)
    update_bn(inputs(), task.net)
    for name in changed:
        torch.testing.assert_close(after[name], task.state_dict()[name])


def test_the_command_leaves_a_checkpoint_that_every_other_takes(trained, tree, tmp_path, here):
    to = tmp_path / "precise.ckpt"
    said = here("precise-bn", trained, "--images", 640, "--output", to, "--json").stdout
    assert json.loads(said) == {"checkpoint": str(to), "images": 640}
    losses = [json.loads(here("eval", f, "--json").stdout)["loss"] for f in (trained, to)]
    assert losses[0] != losses[1]
    assert here("predict", to, tree / "val", "--format", "csv").stdout.count("\n") == 3
    begun = here("train", "--weights", to, "--dataset", "digits", "--steps", 1, "--output",
                 tmp_path / "run")  # fmt: skip
    assert "test error" in begun.stdout
    refused = here("precise-bn", trained, "--output", to, status=2).stderr
    assert f"{to} exists" in refused


@pytest.mark.parametrize(
    "images, given, n",
    [(None, {"batch_size": 500}, 1000), (100, {"batch_size": 64}, 64), (3, {}, 3)],
)
def test_batches_are_as_large_as_asked_for_and_no_larger_than_all(tmp_path, images, given, n):
    file = trained_as(tmp_path / "run", warmup=4).last  # longer than precise-bn's one iteration
    assert precise(file, images, **given)[1] == n


def test_the_arithmetic_is_that_which_is_asked_for(trained):
    file = trained / "checkpoints" / "last.ckpt"
    made = [precise(file, 64, precision=p)[0]["state_dict"] for p in ("32-true", "bf16-mixed")]
    assert any(not torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_the_command_says_how_it_is_evaluated(trained, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mineprecise.py").write_text(OWN)
    own = ["--shortcut", "mineprecise:Own", *SMALL, "--steps", 2, "--output", "own"]
    here("train", *own)
    said = here("precise-bn", "own", "--allow-code", "mineprecise:Own", "--data-dir", "a b").stderr
    line = "evaluate: resnetv2 eval own/last-precise-bn.ckpt --data-dir 'a b'"
    line += " --allow-code mineprecise:Own"
    assert line in said
    before = jsonfile.mapping(tmp_path / "own" / "manifest.json")["test_set_readings"]
    shown = here(*shlex.split(line)[2:]).stdout
    assert "BN's statistics of 1,408 training images" in shown
    after = jsonfile.mapping(tmp_path / "own" / "manifest.json")["test_set_readings"]
    assert after == before + 1


@pytest.mark.parametrize(
    "place, message",
    [
        ("new.safetensors", "would be a checkpoint, not safetensors"),
        ("run/checkpoints/new.ckpt", "is part of a run"),
        ("/proc/new.ckpt", "cannot save /proc/new.ckpt"),
        ("run", "exists"),
    ],
)
def test_a_place_where_it_cannot_be_is_refused_before_the_work(
    trained, tmp_path, monkeypatch, here, place, message
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    monkeypatch.setattr("resnetv2_cli.precise.precise", None)
    refused = here("precise-bn", "run", "--output", place, status=2).stderr
    assert message in refused and "hint: " in refused


def test_on_a_full_disk_nothing_is_left(trained, tmp_path, here, full):
    full(10_000)
    refused = here("precise-bn", trained, "--images", 64, "--output", tmp_path / "a.ckpt", status=2)
    assert "cannot save" in refused.stderr and not [*tmp_path.iterdir()]


def test_by_itself_it_lies_in_the_runs_folder_but_not_among_its_checkpoints(tmp_path, here):
    folder = trained_as(tmp_path / "run")
    told = here("precise-bn", folder.path)
    assert "those of 1,424 training images" in told.stdout
    to = folder.path / "last-precise-bn.ckpt"
    assert to.is_file() and not list(folder.checkpoints.glob("*precise*"))
    ours = trained_as(tmp_path / "run", resume={"steps": 16})
    whole = trained_as(tmp_path / "other", steps=12)
    trained_as(tmp_path / "other", resume={"steps": 16})
    assert same(ours, whole)


def test_what_was_frozen_stays(trained, tmp_path):
    given = {"weights": str(trained), "freeze": "stem,stage1", "steps": 2}
    file = trained_as(tmp_path / "run", **given).last
    before, after = checkpoints.read(file)["state_dict"], precise(file, 160)[0]["state_dict"]
    for name in before:
        if name.endswith(STATISTICS):
            frozen = "stem" in name or "stage1" in name
            assert torch.equal(before[name], after[name]) is frozen, name


def test_photographs_are_decoded_as_in_training(tree, tmp_path):
    given = {"dataset": "folder", "stem": "cifar", "data_dir": str(tree), "batch_size": 2}
    made = [
        precise(trained_as(tmp_path / color, **given, color=color, lr=0, steps=1).last, 4)[0]
        for color in ("none", "lighting")
    ]
    first, second = (m["state_dict"] for m in made)
    assert all(not torch.equal(first[n], second[n]) for n in first if n.endswith(STATISTICS))


@pytest.mark.parametrize("images, message", [(2000, "there are 1,437 training images, not 2,000")])
def test_more_images_than_there_are(trained, images, message):
    with pytest.raises(UserError, match=message) as caught:
        precise(trained / "checkpoints" / "last.ckpt", images)
    assert "--images 1437" in caught.value.hint


def test_where_all_bn_is_frozen_there_is_nothing_to_make_anew(tmp_path):
    begun = trained_as(tmp_path / "begun", unit="original")
    frozen = {"weights": str(begun.path), "freeze": "stem,stage1,stage2,stage3"}
    file = trained_as(tmp_path / "run", unit="original", **frozen).last
    with pytest.raises(UserError, match="has no BN that averages"):
        precise(file, 64)


def test_statistics_that_are_not_finite_are_not_written(trained, tmp_path):
    saved = checkpoints.read(trained / "checkpoints" / "last.ckpt")
    saved["state_dict"]["net.stem.conv.weight"].fill_(float("inf"))
    del saved["sealed"]
    torch.save(saved, tmp_path / "wild.ckpt")
    with pytest.raises(UserError, match="running_mean is not finite"):
        precise(tmp_path / "wild.ckpt", 64)
