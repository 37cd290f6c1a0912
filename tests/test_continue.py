"""results/continue.sh: each session continues the paper's tables from what the last one kept."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import REPOSITORY, THREADS, names

from resnetv2_cli.ablation import planning, studies


def called(tmp_path, tool: str = "", seconds: str = "60", **places) -> int:
    """Run the script on a plan of two lines; return its exit status. The tool is replaced by a stub
    that logs its arguments and runs ``tool``."""
    script = tmp_path / "resnetv2"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{tool}\n')
    script.chmod(0o755)
    (tmp_path / "plan.txt").write_text("# two tables\n--table 1\n--table 2\n")
    place = {"LAB": "lab", "KEPT": "kept", "PLAN": "plan.txt"} | places
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env = {name: str(tmp_path / file) if file else "" for name, file in place.items()}
    done = subprocess.run(
        [REPOSITORY / "results" / "continue.sh", seconds],
        env=os.environ | env | path,
        capture_output=True,
    )
    return done.returncode


def keep(checkpoints: Path, *parts: str) -> None:
    """Write a checkpoint as it is kept: its parts and their digest."""
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "last.ckpt.sha256").write_text(f"{digest}\n")
    for name, part in zip("ab", parts, strict=False):
        (checkpoints / f"last.ckpt.part-{digest}-a{name}").write_text(part)


def held(checkpoints: Path) -> str:
    """The checkpoint that is kept; asserts that no part of another is left beside it."""
    digest = (checkpoints / "last.ckpt.sha256").read_text().strip()
    parts = sorted(checkpoints.glob("*.part-*"))
    assert all(f".part-{digest}-" in part.name for part in parts)
    return "".join(part.read_text() for part in parts)


RECORD = "sleep 0.1; echo > $LAB/ablation-table-1.json"  # an ablation writes it as it begins


@pytest.mark.parametrize(
    "tool, status, lines",
    [
        (RECORD, 0, 2),
        (f"{RECORD}; exit 2", 0, 2),  # a run crashed
        ("exit 2", 2, 1),  # a mistake: no record
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
    """The machine was stopped before the progress could be kept."""
    lab, kept = (tmp_path / name / "row" / "s0" for name in ("lab", "kept"))
    keep(kept / "checkpoints", "old")
    (lab / "checkpoints").mkdir(parents=True)
    (lab / "checkpoints" / "last.ckpt").write_text("new")
    for place, text in ((lab, "new"), (kept, "old")):
        (place / "metrics.csv").write_text(text)
    assert called(tmp_path) == 0
    assert (lab / "checkpoints" / "last.ckpt").read_text() == "new"
    assert [p.name for p in (lab / "checkpoints").iterdir()] == ["last.ckpt"]
    assert held(kept / "checkpoints") == "new"
    assert (kept / "metrics.csv").read_text() == "new"


def test_a_checkpoint_that_is_put_together_is_there_whole_or_not_at_all(tmp_path):
    """The disk fills up or the machine stops midway, or a part was not copied."""
    lab, kept = (tmp_path / name / "row" / "s0" / "checkpoints" for name in ("lab", "kept"))
    keep(kept, "the one half, ", "the other")
    [second] = kept.glob("*-ab")
    second.unlink()
    assert called(tmp_path) == 2 and not (lab / "last.ckpt").exists()
    second.symlink_to("nothing")  # unreadable, so assembly fails midway
    assert called(tmp_path) != 0 and not (lab / "last.ckpt").exists()
    second.unlink()
    second.write_text("the other")
    assert called(tmp_path) == 0
    assert (lab / "last.ckpt").read_text() == "the one half, the other"


TRAINS = "mkdir -p $LAB/row/s0/checkpoints; cd $LAB/row/s0; echo {} > config.yaml; "


@pytest.mark.parametrize(
    "name, breaks",
    [
        ("split", 'for last; do :; done; head -c 2 "$2" > "${last}aa"; exit 1'),  # no room
        ("split", 'kill -KILL $PPID; head -c 9 "$3" > "${4}aa"'),  # the machine is taken away
        ("mv", 'case "$1" in *.ckpt.tmp) exec /bin/mv "$@";; esac; kill -KILL $PPID'),
    ],
)
def test_a_store_that_could_not_be_written_has_what_it_had_and_goes_on(tmp_path, name, breaks):
    kept = tmp_path / "kept" / "row" / "s0"
    keep(kept / "checkpoints", "old")
    (kept / "config.yaml").write_text("{}\n")
    trains = TRAINS + "echo new > checkpoints/last.ckpt"
    script = tmp_path / name
    script.write_text(f"#!/bin/sh\n{breaks}\n")
    script.chmod(0o755)
    assert called(tmp_path, trains) != 0
    assert (kept / "config.yaml").read_text() == "{}\n"
    assert held(kept / "checkpoints") == "old"
    script.unlink()
    assert called(tmp_path, trains, LAB="another") == 0
    assert held(kept / "checkpoints") == "new\n"
    assert not (tmp_path / "kept" / ".new").exists()


def test_a_new_run_that_could_not_be_kept_leaves_nothing_in_its_way(tmp_path):
    """Parts without a config.yaml left a folder where no later call could begin or continue."""
    script = tmp_path / "split"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    assert called(tmp_path, TRAINS + "echo new > checkpoints/last.ckpt") == 1
    assert not any((tmp_path / "kept").iterdir())


def test_a_temporary_lab_is_removed_once_all_of_it_is_kept(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    tool = 'for lab; do case "$last" in --output) break;; esac; last=$lab; done; cd "$lab"; '
    tool += "mkdir -p row/s0/checkpoints; echo {} > row/s0/config.yaml; "
    tool += "echo new > row/s0/checkpoints/last.ckpt; exit 3"
    script = tmp_path / "split"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    assert called(tmp_path, tool, LAB="") == 1
    [lab] = (tmp_path / "tmp").iterdir()
    assert (lab / "row" / "s0" / "checkpoints" / "last.ckpt").exists()
    script.unlink()
    shutil.rmtree(lab)
    assert called(tmp_path, tool, LAB="") == 3
    assert not any((tmp_path / "tmp").iterdir())
    assert held(tmp_path / "kept" / "row" / "s0" / "checkpoints") == "new\n"


@pytest.mark.parametrize("seconds", ["abc", "-1", "1.5"])
def test_what_is_no_number_of_seconds_is_refused(tmp_path, seconds):
    assert called(tmp_path, seconds=seconds) == 2
    assert not (tmp_path / "calls").exists()


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
    """The next session has only what was kept of an unfinished run, its checkpoint in parts."""
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
    assert len(list(inside.rglob("last.ckpt.part-*-aa"))) == 1
    begun = (inside / "metrics.csv").read_text()
    said = go_on(tmp_path / "second", "--table 1 --row identity\n")
    assert "continuing" in said.stderr
    assert (inside / "metrics.csv").read_text().startswith(begun)
    assert json.loads((inside / "result.json").read_text())["steps"] == 60
    assert not list(inside.rglob("last.ckpt.*"))
