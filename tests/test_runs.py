"""``runs``: found, named, told apart, compared, and removed only if no process works in them."""

import errno
import fcntl
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from resnetv2_cli import inventory
from resnetv2_cli.ablation.arms import Arm
from resnetv2_cli.compare import agreement, notes
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.manifest import ORIGINS, environment, environment_in
from resnetv2_cli.report import facts
from resnetv2_cli.runfolder import RunFolder, read_metrics


def test_every_state_is_told_apart(lab):
    found = inventory.look([lab])
    states = {r.name.split("/")[-1] if "/" in r.name else r.name: r.state for r in found.runs}
    assert states == {"alone": "fail"}
    assert [r.state for r in found.every] == ["done", "waiting", "stopped", "waiting", "fail"]
    killed = found.ablations[0].lines[1].arms[0]
    lock = os.open(killed.folder.with_suffix(".lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert [r.state for r in inventory.look([lab]).every][2] == "running"
    os.close(lock)


def test_an_ablation_s_lock_is_found_whatever_the_folder_is_called(tmp_path):
    arm = Arm("identity", Experiment(), tmp_path / "run.2")
    lock = arm.claim()
    assert inventory.alive(arm.run)
    os.close(lock)


def test_a_run_by_itself_is_running_as_long_as_its_process_holds_it(lab, tmp_path, monkeypatch):
    folder = RunFolder(shutil.copytree(lab / "alone", tmp_path / "run.2"))
    folder.failed.unlink()
    assert inventory.Run("run", folder).state == "stopped"
    with folder.claimed():
        assert inventory.Run("run", folder).state == "running"
        with pytest.raises(UserError, match="is in use by process"), folder.claimed():
            pass
    assert inventory.Run("run", folder).state == "stopped"
    folder.lock.write_text("of one that was killed")
    assert inventory.Run("run", folder).state == "stopped"
    monkeypatch.setattr(inventory, "taken", lambda lock: None)  # a filesystem without locks
    assert inventory.Run("run", folder).state == "running"
    for file in folder.path.rglob("*"):
        os.utime(file, (0, 0))
    assert inventory.Run("run", folder).state == "stopped"
    os.utime(folder.metrics)
    assert inventory.Run("run", folder).state == "running"


def test_runs_are_named_by_any_beginning_that_only_one_has(lab):
    runs = inventory.runs_in(lab)
    names = [r.name for r in runs]
    assert inventory.choose("al", runs).name == "alone"
    assert inventory.choose("digits-resnet8-basic-original-conv", runs).name in names
    assert inventory.choose("last", runs).name in names
    assert inventory.choose(str(lab / "alone"), []).folder.path == lab / "alone"


def test_last_is_the_run_that_was_begun_last(lab, tmp_path):
    found = inventory.runs_in(shutil.copytree(lab, tmp_path / "runs"))
    for begun in (found, found[::-1]):
        for time, run in enumerate(begun):
            os.utime(run.folder.config, (time, time))
        assert inventory.choose("last", found).name == begun[-1].name


def test_show_counts_the_readings_that_came_after_the_result(here, lab, tmp_path):
    shutil.copytree(lab / "lab", tmp_path / "lab")
    [run] = [run for run in inventory.runs_in(tmp_path) if run.state == "done"]
    before = run.result["test_set_readings"]
    run.folder.manifest.count_reading()
    done = here("runs", "show", run.folder.path, "--format", "json")
    assert json.loads(done.stdout)["result"]["test_set_readings"] == before + 1


@pytest.mark.parametrize(
    "word, error, hint",
    [
        ("alnoe", "unknown run 'alnoe'", "did you mean 'alone'?"),
        ("zzz", "unknown run 'zzz'", "resnetv2 runs ls"),
        ("digits", "2 runs begin with 'digits'", "one of lab/digits"),
    ],
)
def test_names_that_mean_no_run(here, lab, word, error, hint):
    done = here("runs", "show", word, "--root", lab, status=2)
    assert error in done.stderr and hint in done.stderr


def test_ls_lists_what_became_of_each(here, lab):
    done = here("runs", "ls", "--root", lab, "--format", "json")
    made = {r["name"].split("/")[-2:][0]: r for r in json.loads(done.stdout)}
    assert {r["state"] for r in made.values()} == {"done", "stopped", "fail"}
    assert made["alone"]["test_error"] is None and made["alone"]["step"] == 6
    done = here("runs", "ls", "--root", lab, "--format", "csv", "--state", "fail")
    assert [line.split(",")[:2] for line in done.stdout.splitlines()[1:]] == [["alone", "fail"]]
    done = here("runs", "ls", "--root", lab, "--state", "dead", status=2)
    assert "'dead' is not one of 'done', 'fail', 'crashed', 'running', 'stopped'" in done.stderr


def test_a_name_of_a_run_is_one_wherever_a_checkpoint_is(here, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    os.utime("runs/first/config.yaml", (0, 0))
    for word, run in (("last", "second"), ("fir", "first"), ("runs/first", "first")):
        for command in (["eval"], ["describe"], ["export", "--format", "safetensors"]):
            done = here(*command, word, "--json")
            assert json.loads(done.stdout) and (f"{word}: runs/{run}" in done.stderr) == (
                not word.startswith("runs")
            )
    made = json.loads(here("diff", "last", "depth=14", "--json").stdout)
    assert made["settings"]["depth"] == [8, 14]
    assert "there is no checkpoint third" in here("eval", "third", status=2).stderr
    shutil.copytree(trained, tmp_path / "runs" / "fir")
    shutil.copytree(trained, tmp_path / "runs" / "firm")
    assert "2 runs begin with 'fi" not in here("eval", "fir", "--json").stderr  # exactly that one
    assert "3 runs begin with 'fi'" in here("eval", "fi", status=2).stderr


def test_an_open_run_is_listed_with_its_iteration_and_the_last_error_it_saw(here, tmp_path):
    run = RunFolder(tmp_path / "a")
    run.path.mkdir()
    run.config.write_text("steps: 40\n")
    run.metrics.write_text("step,test_error\n5,80\n10,40\n")
    [line] = here("runs", "ls", "--root", tmp_path, "--format", "csv").stdout.splitlines()[1:]
    assert line.split(",")[2:4] == ["10/40", "(40.00 % test)"]


def test_compare_says_what_differs_and_by_how_much(here, lab):
    names = ("digits-resnet8-basic-original-conv1x1", "alone", "--root", lab)
    done = here("runs", "compare", *names, "--format", "json")
    made = json.loads(done.stdout)
    assert made["settings"] == {"shortcut": ["conv1x1", "identity"]}
    a, b = (
        read_metrics(inventory.choose(n, inventory.runs_in(lab)).folder.metrics) for n in names[:2]
    )
    ours, theirs = dict(a["train_loss"]), dict(b["train_loss"])
    apart = {step: theirs[step] - ours[step] for step in ours}
    largest = max(apart.values(), key=abs)
    assert made["curves"]["train_loss"]["largest"] == pytest.approx(largest)
    assert made["curves"]["train_loss"]["first"] == min(s for s, d in apart.items() if d)
    done = here("runs", "compare", "alone", "alone", "--root", lab)
    assert "train_loss: the same at all 3 iterations" in done.stdout


def test_compare_takes_the_first_from_the_second(here, lab, tmp_path):
    for name, error, torch in (("a", 8.0, "2.11"), ("b", 6.5, "2.12")):
        run = RunFolder(shutil.copytree(lab / "alone", tmp_path / name))
        where = {"hardware": "NVIDIA H100", "versions": {"torch": torch}}
        run.result.write_text(json.dumps({"test_error": error, "environment": where}))
    done = here("runs", "compare", "a", "b", "--root", tmp_path, "--format", "json")
    made = json.loads(done.stdout)
    assert made["results"]["test_error"] == [8.0, 6.5, -1.5]
    assert made["environment"] == {"versions.torch": ["2.11", "2.12"]}


NAN = float("nan")


@pytest.mark.parametrize(
    "theirs, said",
    [
        ([3.0, NAN, NAN], "the same at all 3 iterations that both have"),
        ([3.0, NAN, 1.0], "the same at the first 2 of 3 iterations, different from 30 on"),
        ([5.0, NAN, 1.0], "different from 10 on; largest difference +2, at 10"),
    ],
)
def test_what_is_not_a_number_in_both_runs_agrees(theirs, said):
    ours = [(10, 3.0), (20, NAN), (30, NAN)]
    curve = agreement(ours, list(zip((10, 20, 30), theirs, strict=True)))
    assert notes({"curves": {"train_loss": curve}}) == [f"train_loss: {said}"]


@pytest.mark.parametrize("classes, told", [(5, False), (6, True)])
def test_a_top_5_error_is_told_where_a_guess_can_miss(here, lab, tmp_path, classes, told):
    shutil.copytree(lab, tmp_path / "lab")
    for file in (tmp_path / "lab").rglob("result.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"classes": classes, "test_top5_error": 0.5}))
    root = ["--root", tmp_path / "lab"]
    [run] = [r for r in inventory.runs_in(tmp_path / "lab") if r.result]
    for command in (["show", run.name], ["compare", run.name, run.name]):
        said = here("runs", *command, *root).stdout
        assert "test_error, %" in said and ("test_top5_error" in said) is told
    results = dict(facts.described(run, {})["results"])
    assert "test_error, %" in results and ("test_top5_error, %" in results) is told


def test_rm_asks_first_and_leaves_nothing_behind(here, lab, tmp_path, monkeypatch):
    root = shutil.copytree(lab, tmp_path / "runs")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    here("runs", "rm", "alone", "--root", root, status=2)
    assert (root / "alone").exists()
    [folder] = (root / "lab").glob("digits*conv1x1*")
    RunFolder(folder / "s0").beside(ORIGINS).write_text("{}")  # as if an ablation had started it
    here("runs", "rm", "alone", f"{folder.name}/s0", "--yes", "--root", root)
    assert not (root / "alone").exists() and not list(folder.iterdir())
    assert len(inventory.runs_in(root)) == 1


def test_nobody_to_ask_removes_nothing(here, lab, tmp_path, monkeypatch):
    root = shutil.copytree(lab, tmp_path / "runs")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    done = here("runs", "rm", "alone", "--root", root, status=2)
    assert "--yes removes without asking" in done.stderr and (root / "alone").exists()


def test_what_is_shown_of_a_run_that_has_not_ended_is_no_more_than_of_one_that_has(
    here, lab, tmp_path
):
    folder = RunFolder(shutil.copytree(lab / "alone", tmp_path / "runs" / "open"))
    folder.failed.unlink()
    begun = json.loads(folder.manifest.path.read_text())
    folder.manifest.path.write_text(json.dumps(begun | {"code": {"diff": "a long one"}}))
    done = here("runs", "show", "open", "--root", tmp_path / "runs", "--format", "json")
    assert json.loads(done.stdout)["environment"] == environment_in(begun)
    assert set(environment_in(begun)) == set(environment())
    done = here("runs", "show", "open", "--root", tmp_path / "runs")
    assert "a long one" not in done.stdout and "torchvision" in done.stdout


def test_a_run_that_trains_is_not_removed(here, lab, tmp_path):
    root = shutil.copytree(lab, tmp_path / "runs")
    (root / "alone" / "failed.json").unlink()
    with RunFolder(root / "alone").claimed():
        done = here("runs", "rm", "alone", "--yes", "--root", root, status=2)
    assert "alone is running" in done.stderr and (root / "alone").exists()


def test_what_is_trained_longer_is_not_removed(here, lab, tmp_path):
    """It still has its result while its images are read, which may take minutes."""
    root = shutil.copytree(lab, tmp_path / "runs")
    [run] = (run for run in inventory.runs_in(root) if run.state == "done")
    with RunFolder(run.place).claimed():
        done = here("runs", "rm", run.name, "--yes", "--root", root, status=2)
    assert "is running" in done.stderr and run.place.exists()


def test_a_run_that_is_begun_while_it_asks_is_not_removed(here, lab, tmp_path, monkeypatch):
    root = shutil.copytree(lab, tmp_path / "runs")
    begun = RunFolder(root / "alone").claimed()
    monkeypatch.setattr("resnetv2_cli.commands.runs.confirmed", lambda _: begun.__enter__() or True)
    done = here("runs", "rm", "alone", "--root", root, status=2)
    begun.__exit__(None, None, None)
    assert "alone is running" in done.stderr and (root / "alone").exists()


def test_a_run_that_cannot_be_removed_is_named(here, lab, tmp_path, monkeypatch):
    """Not just a file in it, as in Python's ``speed.csv: Read-only file system``."""
    root = shutil.copytree(lab, tmp_path / "runs")

    def refuse(path, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    with monkeypatch.context() as readonly:
        readonly.setattr("os.unlink", refuse)
        said = here("runs", "rm", "alone", "--yes", "--root", root, status=2).stderr
    assert f"error: cannot remove {root / 'alone'}: " in said
    assert "Read-only file system" in said and "is it writable, and yours?" in said
    assert "removed 1" not in said and (root / "alone" / "config.yaml").exists()


def test_runs_behind_links_are_seen_once_and_removed_with_them(here, lab, tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copytree(lab / "alone", root / "here")
    elsewhere = shutil.copytree(lab / "alone", tmp_path / "disk" / "alone")
    (root / "again").symlink_to("here")
    (root / "linked").symlink_to(elsewhere)
    (root / "round").symlink_to(tmp_path)
    assert [run.name for run in inventory.runs_in(root)] == ["here", "linked"]
    assert len(inventory.look([root]).runs) == 2
    here("runs", "rm", "here", "linked", "--yes", "--root", root)
    assert not (root / "linked").is_symlink() and not elsewhere.exists()


def test_nothing_names_no_run(here, lab, tmp_path):
    """As from an unset shell variable: every name begins with it."""
    root = shutil.copytree(lab / "alone", tmp_path / "runs" / "alone").parent
    for cwd in (tmp_path, root / "alone"):
        said = here("runs", "rm", "", "--yes", "--root", root, status=2, cwd=cwd).stderr
        assert "the name of the run is empty" in said
    assert (root / "alone" / "config.yaml").exists()


def test_a_run_is_looked_at_from_inside_its_own_folder(here, lab, tmp_path, monkeypatch):
    inside = shutil.copytree(lab / "alone", tmp_path / "run.2")
    (inside / "failed.json").unlink()
    (inside / "checkpoints").mkdir(exist_ok=True)
    shown = here("runs", "show", ".", "--format", "json", cwd=inside).stdout
    assert json.loads(shown)["state"] == "stopped"
    assert "1 stopped" in here("report", ".", "--output", tmp_path / "r.html", cwd=inside).stderr
    (inside / "below").mkdir()
    monkeypatch.chdir(inside / "below")
    assert RunFolder(Path("..")).beside(".lock") == tmp_path / "run.2.lock"
