"""Files damaged by a power failure or written by hand: whatever is unreadable counts as missing,
and no command that only reads fails on it."""

import json
import shutil

import pytest
from conftest import ended, two_rows
from trainings import same, trained_as

from resnetv2_cli import figures, jsonfile
from resnetv2_cli.ablation import record, tables
from resnetv2_cli.ablation.progress import place
from resnetv2_cli.inventory import Run, look
from resnetv2_cli.report import page
from resnetv2_cli.runfolder import RunFolder, read_metrics

NONE = ["", '{"test_error": 5', "[]", "{}", "null"]


@pytest.fixture
def planned(tmp_path):
    """An ablation with one run begun and the other done."""
    made = two_rows(tmp_path / "lab", 1, {"depth": 8})
    record.write(made)
    ended(made, (5.0,), (7.0,))
    first = made.lines[0].arms[0]
    RunFolder(first.folder).config.write_text(first.experiment.dump())
    RunFolder(first.folder).result.unlink()
    return made


def states(ablation, to) -> dict[str, int]:
    """The runs in each state, as a report counts them. The table must not fail either."""
    tables.table(ablation, 0.5)
    return page.write([ablation.root], to, 0.5)[0]


@pytest.mark.parametrize("text", [*NONE, '{"test_error": null}', '{"test_error": "low"}'])
def test_what_is_no_result_has_not_come(planned, tmp_path, text):
    arm = planned.lines[0].arms[0]
    RunFolder(arm.folder).result.write_text(text)
    assert states(planned, tmp_path / "r.html") == {"stopped": 1, "done": 1}
    assert arm.error is None and not arm.crashed


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_failure_is_tried_again(planned, tmp_path, text):
    arm = planned.lines[0].arms[0]
    RunFolder(arm.folder).failed.write_text(text)
    assert states(planned, tmp_path / "r.html") == {"stopped": 1, "done": 1}
    assert not arm.crashed and RunFolder(arm.folder).diverged is None


@pytest.mark.parametrize("diverged, state", [(True, "fail"), (False, "crashed")])
def test_a_failure_without_a_reason_is_one(planned, tmp_path, diverged, state):
    arm = planned.lines[0].arms[0]
    RunFolder(arm.folder).failed.write_text(json.dumps({"diverged": diverged}))
    assert states(planned, tmp_path / "r.html") == {state: 1, "done": 1}
    assert Run("", RunFolder(arm.folder)).failure["reason"] == arm.failure["reason"] == "unknown"


WHOLE = "step,epoch,train_loss\n5,1,2.5\n"


@pytest.mark.parametrize("line", ["10,1,2.x\n", "ten,1,2\n", "10,1,2,3\n", "10,1,2", "\xff\n"])
def test_a_line_that_is_not_whole_is_left_out(planned, tmp_path, line):
    run = RunFolder(planned.lines[0].arms[0].folder)
    run.metrics.write_text(WHOLE + line, encoding="latin-1")
    assert read_metrics(run.metrics)["train_loss"] == [(5, 2.5)]
    assert place(planned.lines[0].arms[0])[1] == "loss 2.500"
    [picture] = figures.every(look([planned.root]), tmp_path, "png", "paper")
    assert picture.exists()


@pytest.mark.parametrize("text", ["", "st", "step", "step,epoch,train_loss\n", "loss\n5\n"])
def test_a_file_without_a_whole_line_has_no_curve(planned, tmp_path, text):
    run = RunFolder(planned.lines[0].arms[0].folder)
    run.metrics.write_text(text)
    assert not read_metrics(run.metrics).get("train_loss")
    assert states(planned, tmp_path / "r.html") == {"stopped": 1, "done": 1}


def test_a_result_that_is_damaged_is_found_again(whole, tmp_path):
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    run.result.write_bytes(whole.result.read_bytes()[:40])
    assert same(trained_as(run.path, resume={}), whole)


def test_json_without_an_end_to_its_depth_is_no_json(tmp_path):
    """Python's parser raises another error for it, ``RecursionError``."""
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    assert jsonfile.mapping(tmp_path / "manifest.json") == {}
