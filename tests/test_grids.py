"""Grids: their values win; which settings make another run; where the paper has a number."""

from dataclasses import asdict

import pytest
from conftest import ended, two_rows

from resnetv2_cli import trust
from resnetv2_cli.ablation import arms, planning, probe, record, studies, tables
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError

OWN = """
from resnetv2_cli.shortcuts import Shortcut


class {}(Shortcut):
    \"\"\"{}\"\"\"
"""


def planned(root, *axes, given=None, **how):
    [study] = studies.studies(grid=list(axes))
    return planning.plan(study, 1, given or {}, root, **how)


def runs(*given, **how) -> list[arms.Arm]:
    return [line.arms[0] for line in planned(*given, **how).lines]


def experiments(*given, **how) -> list[Experiment]:
    return [arm.experiment for arm in runs(*given, **how)]


@pytest.mark.parametrize(
    "axis, expected",
    [
        ("lr=0.1,0.01", [{"lr": 0.1}, {"lr": 0.01}]),
        ("batch_size=32,128", [{"batch_size": 32}, {"batch_size": 128}]),
        ("drops=0.3/0.5,0.75", [{"drops": "0.3"}, {"drops": "0.5,0.75"}]),
        ("steps=100,800", [{"steps": 100}, {"steps": 800}]),
        ("epochs=1,2", [{"epochs": 1.0}, {"epochs": 2.0}]),
        ("depth=20,110", [{"depth": 20}, {"depth": 110}]),
    ],
)
def test_what_a_grid_varies_wins_over_the_budget(tmp_path, axis, expected):
    found = runs(tmp_path, axis, scale="laptop")
    for arm, values in zip(found, expected, strict=True):
        less = {"depth": 38, "batch_size": 64, "lr": 0.05} | values
        assert {name: getattr(arm.experiment, name) for name in less} == less
    assert len({arm.folder for arm in found}) == 2


def test_epochs_of_a_grid_are_no_steps_of_the_budget(tmp_path):
    """Otherwise each would train for its epochs under a name with 400 iterations."""
    default = Experiment().steps
    assert [e.steps for e in experiments(tmp_path, "epochs=1,2", scale="laptop")] == [default] * 2


@pytest.mark.parametrize(
    "axis, given, how, said",
    [
        ("lr=0.1,0.01", {"lr": 0.2}, {}, "lr is an axis of the grid"),
        ("batch_size=32,64", {"batch_size": 8}, {"scale": "laptop"}, "batch-size is an axis"),
        ("val=0,5000", {}, {"protocol": "val"}, "val is an axis of the grid"),
        ("epochs=1,2", {"steps": 9}, {}, "epochs is an axis of the grid"),
        ("steps=100,200", {"epochs": 1.0}, {}, "steps is an axis of the grid"),
    ],
)
def test_a_flag_that_is_an_axis_is_refused(tmp_path, axis, given, how, said):
    with pytest.raises(UserError, match=said):
        planned(tmp_path, axis, given=given, **how)


@pytest.mark.parametrize(
    "table, given, said",
    [
        (1, {"gate_bias": -5.0}, "rows of Table 1 have a gate-bias of their own"),
        (2, {"depth": 20}, "rows of Table 2 have a depth of their own"),
        (4, {"batch_size": 32}, "rows of Table 4 have a batch-size of their own"),
        (4, {"epochs": 1.0}, ""),
        (1, {"depth": 20, "lr": 0.05}, ""),
    ],
)
def test_a_flag_does_not_change_what_rows_are_named_after(tmp_path, table, given, said):
    [study] = studies.studies(tables=[table])
    if said:
        with pytest.raises(UserError, match=said):
            planning.plan(study, 1, given, tmp_path)
    else:
        made = planning.plan(study, 1, given, tmp_path).lines
        assert all(given.items() <= asdict(line.arms[0].experiment).items() for line in made)


def test_a_file_has_the_recipe_of_all_rows(tmp_path):
    """Except for the settings that a row is named after; flags win over the file."""
    file = tmp_path / "mine.yaml"
    file.write_text("depth: 8\nunit: full-preact\nlr: 0.02\nepochs: 3\nwarmup: 7\n")
    by_lr = runs(tmp_path, "lr=0.1,0.3", given={"steps": 9}, config=file)
    assert [arm.experiment.lr for arm in by_lr] == [0.1, 0.3]
    for arm in by_lr:
        e = arm.experiment
        assert (e.depth, e.unit, e.warmup, e.epochs, e.steps) == (8, "full-preact", 7, None, 9)
        assert arm.origins["warmup"] == f"file {file}" and arm.origins["steps"] == "flag of ablate"
    [study] = studies.studies(shortcut="exclusive-gate")
    made = planning.plan(study, 1, {}, tmp_path, config=file)
    names = {line.arms[0].experiment.shortcut for line in made.lines}
    assert names == {"identity", "exclusive-gate"} and "here with depth 8" in made.title
    lengths = experiments(tmp_path, "steps=4,5", config=file)
    assert [(e.steps, e.epochs) for e in lengths] == [(4, None), (5, None)]


def test_a_file_names_a_shortcut_and_its_settings(tmp_path):
    """For rows that differ in something else."""
    file = tmp_path / "gated.yaml"
    file.write_text("unit: original\nshortcut: exclusive-gate\ngate_bias: -7\n")
    made = planned(tmp_path, "depth=110,56", config=file)
    assert [line.arms[0].experiment.gate_bias for line in made.lines] == [-7, -7]
    assert [line.row.published for line in made.lines] == [9.81, None]
    by_shortcut = planned(tmp_path, "shortcut=identity,dropout", config=file)
    assert "gate" not in by_shortcut.title  # of none of these


def test_a_setting_of_a_shortcut_that_no_row_has_is_refused(tmp_path):
    [study] = studies.studies(tables=[2])
    with pytest.raises(UserError, match="no row has a shortcut with --gate-bias"):
        planning.plan(study, 1, {"gate_bias": -3.0}, tmp_path)
    with pytest.raises(UserError, match="identity has no setting 'gate_bias'"):
        planned(tmp_path, "shortcut=identity,exclusive-gate", "gate_bias=-6,-7")


def test_a_grid_has_one_length():
    with pytest.raises(UserError, match="steps and epochs are both the length"):
        studies.studies(grid=["steps=100,200", "epochs=1"])


@pytest.mark.parametrize(
    "axes, given, twins",
    [
        (["devices=1/2"], {}, "devices=1 and devices=2"),
        (["depth=20", "deterministic=true,false"], {}, "depth=20 deterministic=True and depth=20 "),
        (["data_dir=cats,dogs"], {}, "data_dir=cats and data_dir=dogs"),
        (["depth=20,32,20"], {}, "depth=20 and depth=20"),
        (["lr=0.1,0.10"], {}, "lr=0.1 and lr=0.1"),
        (["depth=20", "block=none,basic"], {}, "depth=20 block=None and depth=20 block=basic"),
        (["depth=20,32", "devices=2"], {}, ""),
        (["data_dir=cats,dogs"], {"dataset": "folder", "depth": 18}, ""),
    ],
)
def test_two_rows_are_two_runs(tmp_path, axes, given, twins):
    """Otherwise both would show the same number, with a difference of 0."""
    if twins:
        with pytest.raises(UserError, match=f"^{twins}.* are one and the same run"):
            planned(tmp_path, *axes, given=given)
    else:
        assert len({arm.folder for arm in runs(tmp_path, *axes, given=given)}) == 2


def test_other_images_are_another_run(tmp_path):
    """Only their folder identifies them; the files of a known dataset may have moved."""
    for dataset, folders in [("folder", 2), ("cifar10", 1)]:
        given = {"dataset": dataset, "stem": "cifar", "depth": 8}
        made = [two_rows(tmp_path, 1, given | {"data_dir": d}) for d in ("cats", "dogs")]
        assert len({one.lines[0].arms[0].folder for one in made}) == folders


def test_a_shortcut_whose_file_has_changed_is_another_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    trust.admit(["--shortcut", "own_of_a_grid:Mine"])
    file = tmp_path / "own_of_a_grid.py"
    experiment = Experiment(shortcut="own_of_a_grid:Mine")

    def folder(text):
        file.write_text(OWN.format("Mine", text))
        return arms.Arm.of("mine", experiment, tmp_path).folder

    first = folder("x + F(x), at first")
    assert folder("x + F(x), with another thought") != first
    assert folder("x + F(x), at first") == first


@pytest.mark.parametrize(
    "axes, given, expected",
    [
        (("unit=original", "shortcut=identity,conv1x1"), {}, [6.61, 12.22]),
        (("unit=original", "shortcut=identity,conv1x1"), {"depth": 20, "dataset": "digits"}, []),
        (("unit=original", "shortcut=identity,conv1x1"), {"lr": 0.05}, []),
        (("unit=original", "shortcut=identity"), {"workers": 1, "precision": "32-true"}, [6.61]),
        (("unit=original", "precision=32-true,bf16-mixed", "eval_every=2"), {}, [6.61, 6.61]),
        (("unit=original", "shortcut=exclusive-gate"), {}, [8.70]),  # its default b_g is -6
        (("unit=original", "shortcut=exclusive-gate", "gate_bias=-7"), {}, [9.81]),
        (("unit=original", "shortcut=exclusive-gate"), {"gate_bias": -7.0}, [9.81]),
        (("unit=original", "shortcut=identity,dropout"), {"dropout_ratio": 0.5}, [6.61, "fail"]),
        (("unit=original", "shortcut=constant-scale"), {}, ["fail"]),  # scales of 0.5 and 1
        (("unit=original", "drops=0.5,0.75/0.5"), {}, [6.61, None]),
        (("unit=original", "weights=a.ckpt", "weights_sha256=" + 64 * "a"), {}, []),
    ],
)
def test_the_papers_error_stands_beside_its_own_settings_alone(tmp_path, axes, given, expected):
    lines = planned(tmp_path, *axes, given=given).lines
    found = [record.number(line.row.published) for line in lines]
    assert found == (expected or [None] * len(lines))


@pytest.mark.parametrize(
    "axes, given, said",
    [
        (["depth=20,32"], {}, ["fail: 45.00", "fail: 45.00"]),
        (["depth=20", "epochs=1,2"], {}, ["45.00", "45.00"]),
        (["depth=20", "lr=0.1,0.01", "log_every=10"], {"seed": 3}, ["fail: 45.00"] * 2),
        (["depth=20", "dataset=cifar10,cifar100"], {}, ["fail: 45.00", "45.00"]),
        (["depth=20", "val=0,5000,10000"], {}, ["fail: 45.00", "fail: 45.00", "45.00"]),
        (["depth=20", "steps=63999,64000"], {}, ["45.00", "fail: 45.00"]),
        (["depth=20", "epochs=163,164"], {}, ["45.00", "fail: 45.00"]),  # epochs of 391 iterations
        (["depth=20"], {"epochs": 1.0}, ["45.00"]),
    ],
)
def test_a_row_that_trained_for_less_than_the_papers_does_not_fail(tmp_path, axes, given, said):
    """Whatever else differs from the paper."""
    made = planned(tmp_path, *axes, given=given)
    ended(made, *[(45.0,)] * len(said))
    assert [tables.measured(line) for line in made.lines] == said


@pytest.mark.parametrize(
    "given, how",
    [({}, {"protocol": "val"}), ({}, {"scale": "laptop"}), ({"weights": "w"}, {})],
)
def test_what_is_not_the_papers_recipe_is_not_comparable(tmp_path, given, how):
    given = {name: str(tmp_path / "w.safetensors") for name in given}
    for place in given.values():
        open(place, "wb").close()
    assert not two_rows(tmp_path, 1, given, **how).comparable


@pytest.mark.parametrize(
    "axes, given, warmups",
    [
        ([], {"steps": 200}, [20]),
        ([], {"steps": 100, "warmup": 7}, [7]),
        ([], {"epochs": 1.0}, [78]),  # of 782 iterations of 64 images, as 40 of the budget's 400
        ([], {"epochs": 1.0, "val": 5000}, [70]),  # of 704 iterations
        ([], {"lr": 0.1}, [40]),
        (["steps=100,800"], {}, [10, 80]),
        (["epochs=1", "warmup=0,5"], {}, [0, 5]),
    ],
)
def test_a_warm_up_keeps_its_share_of_a_budget(tmp_path, axes, given, warmups):
    made = experiments(tmp_path, *(axes or ["unit=original"]), given=given, scale="laptop")
    assert [e.warmup for e in made] == warmups


NOWHERE = {"dataset": "folder", "data_dir": "nowhere", "stem": "cifar"}


def test_images_that_are_not_there_leave_the_warm_up_to_the_run(tmp_path):
    [e] = experiments(tmp_path, "unit=original", given=NOWHERE | {"epochs": 2.0}, scale="laptop")
    assert e.warmup is None


def test_a_forecast_counts_the_images_of_a_folder(tmp_path, monkeypatch):
    """Four images in batches of two make two iterations per epoch; without images the time is
    unknown."""
    monkeypatch.setattr(probe, "step_seconds", lambda e: 0.5)
    for i in range(4):
        (tmp_path / "pets" / "train" / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / "train" / f"class {i % 2}" / f"{i}.jpg").touch()
    given = NOWHERE | {"epochs": 3.0, "batch_size": 2, "depth": 8}
    for place, seconds in [(str(tmp_path / "pets"), 3.0), ("nowhere", None)]:
        made = planned(tmp_path, "unit=original", given=given | {"data_dir": place})
        [line] = probe.forecast(made, measure=True)
        assert line["seconds"] == seconds
