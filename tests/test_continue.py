"""results/continue.sh: the plan of the paper's tables, in pieces from what the last one kept."""

import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import REPOSITORY, THREADS, names

from resnetv2_cli.ablation import planning, studies


def called(tmp_path, tool: str = "") -> int:
    """Its exit status, for a plan of two lines; the tool here is a script that says what it was
    called with, and does as the test has it."""
    script = tmp_path / "resnetv2"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{tool}\n')
    script.chmod(0o755)
    (tmp_path / "plan.txt").write_text("# two tables\n--table 1\n--table 2\n")
    place = {"LAB": "lab", "KEPT": "kept", "PLAN": "plan.txt"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [REPOSITORY / "results" / "continue.sh", "60"],
        env=os.environ | {name: str(tmp_path / file) for name, file in place.items()} | path,
        capture_output=True,
    )
    return done.returncode


RECORD = "sleep 0.1; echo > $LAB/ablation-table-1.json"  # an ablation leaves it as it begins


@pytest.mark.parametrize(
    "tool, status, lines",
    [
        (RECORD, 0, 2),
        (f"{RECORD}; exit 2", 0, 2),  # a run crashed
        ("exit 2", 2, 1),  # a mistake
        (f"{RECORD}; exit 3", 3, 1),
        (f"{RECORD}; exit 143", 143, 1),
    ],
)
def test_a_plan_goes_on_behind_a_run_that_crashed_and_behind_nothing_else(
    tmp_path, tool, status, lines
):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "ablation-table-1.json").write_text("of another day")
    assert called(tmp_path, tool) == status
    assert (tmp_path / "calls").read_text().count("ablate --table") == lines


def test_a_lab_that_went_on_is_kept_and_not_put_back(tmp_path):
    """Its machine was stopped before that could be kept."""
    lab, kept = (tmp_path / name / "row" / "s0" for name in ("lab", "kept"))
    for place, name, text in ((lab, "last.ckpt", "new"), (kept, "last.ckpt.part-aa", "old")):
        (place / "checkpoints").mkdir(parents=True)
        (place / "checkpoints" / name).write_text(text)
        (place / "metrics.csv").write_text(text)
    (tmp_path / "plan.txt").write_text("# nothing\n")
    place = {"LAB": "lab", "KEPT": "kept", "PLAN": "plan.txt"}
    subprocess.run(
        [REPOSITORY / "results" / "continue.sh", "60"],
        env=os.environ | {name: str(tmp_path / file) for name, file in place.items()},
        check=True,
    )
    assert (lab / "checkpoints" / "last.ckpt").read_text() == "new"
    assert [p.name for p in (lab / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (kept / "checkpoints" / "last.ckpt.part-aa").read_text() == "new"
    assert (kept / "metrics.csv").read_text() == "new"


def test_a_checkpoint_that_is_put_together_is_there_whole_or_not_at_all(tmp_path):
    """The disk is full in the midst of it, or the machine is stopped."""
    lab, kept = (tmp_path / name / "row" / "s0" / "checkpoints" for name in ("lab", "kept"))
    kept.mkdir(parents=True)
    (kept / "last.ckpt.part-aa").write_text("the one half, ")
    (kept / "last.ckpt.part-ab").symlink_to("nothing")  # cannot be read, as if that were it
    assert called(tmp_path) != 0 and not (lab / "last.ckpt").exists()
    (kept / "last.ckpt.part-ab").unlink()
    (kept / "last.ckpt.part-ab").write_text("the other")
    assert called(tmp_path) == 0
    assert (lab / "last.ckpt").read_text() == "the one half, the other"


def test_a_crash_that_is_over_is_not_kept(tmp_path):
    for place in ("over", "not-over"):
        (tmp_path / "kept" / place / "s0").mkdir(parents=True)
        (tmp_path / "kept" / place / "s0" / "failed.json").write_text("{}")
    assert called(tmp_path, "rm -f $LAB/over/s0/failed.json") == 0
    assert [p.parent.parent.name for p in tmp_path.glob("kept/*/s0/failed.json")] == ["not-over"]


def test_the_plan_of_the_paper_names_rows_that_exist():
    lines = (REPOSITORY / "results" / "plan.txt").read_text().splitlines()
    calls = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len(calls) > 5
    for words in calls:
        tables = [int(w) for name, w in pairwise(words) if name == "--table"]
        known = names(tables=tables) if tables else []
        assert tables or words[0] == "--grid"
        assert all(w in known for name, w in pairwise(words) if name == "--row")


def test_a_reproduction_goes_on_from_the_small_files_of_the_last(resnetv2, tmp_path):
    """What was kept of a run under way, its checkpoint in parts, is all that the next one has."""
    [study] = studies.studies(tables=[1])
    given = {"dataset": "digits", "depth": 8, "batch_size": 64, "steps": 60, "log_every": 10}
    made = planning.plan(study.only(["identity"]), 1, given, tmp_path / "first")
    [arm] = made.lines[0].arms
    arm.config.parent.mkdir(parents=True)
    arm.config.write_text(arm.experiment.dump())
    stop = ["--time", "1s", "--steps", 60]
    resnetv2("train", "--config", arm.config, *stop, "--output", arm.folder)
    assert not (arm.folder / "result.json").exists()

    def go_on(lab, plan):
        (tmp_path / "plan.txt").write_text(plan)
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        place = {
            "LAB": str(lab),
            "KEPT": str(tmp_path / "kept"),
            "PLAN": str(tmp_path / "plan.txt"),
        }
        tool = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            [REPOSITORY / "results" / "continue.sh", "300", *flags],
            env={**os.environ, **THREADS, **place, "PATH": tool},
            check=True, capture_output=True, text=True,
        )  # fmt: skip

    go_on(tmp_path / "first", "# nothing\n")
    inside = tmp_path / "kept" / arm.folder.relative_to(tmp_path / "first")
    assert (inside / "checkpoints" / "last.ckpt.part-aa").exists()
    begun = (inside / "metrics.csv").read_text()
    said = go_on(tmp_path / "second", "--table 1 --row identity\n")
    assert "continuing" in said.stderr
    assert (inside / "metrics.csv").read_text().startswith(begun)
    assert json.loads((inside / "result.json").read_text())["steps"] == 60
    assert not list(inside.rglob("*.part-*"))
