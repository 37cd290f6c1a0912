"""Ablations: which rows, which settings, what is rerun, and how results are summarized."""

import io
import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ended, names, two_rows
from rich.console import Console

from resnetv2_cli.ablation import launch, planning, studies, tables
from resnetv2_cli.ablation.progress import Progress
from resnetv2_cli.ablation.sweep import Sweep, reason
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.paper import FAIL, TABLE_1

TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 128, "--steps", 4, "--log-every", 2]


def test_the_rows_that_concern_it_and_the_baseline():
    assert names(shortcut="conv1x1") == ["identity", "conv1x1"]
    assert names(shortcut="mine:Own") == ["identity", "mine:Own"]
    assert names(tables=[1]) == [row.name for row in TABLE_1.rows]
    assert names(grid=["depth=8,14", "shortcut=identity"]) == [
        "depth=8 shortcut=identity",
        "depth=14 shortcut=identity",
    ]


def test_one_thing_is_ablated_at_a_time():
    with pytest.raises(UserError, match="ablate what"):
        studies.studies(tables=[1], shortcut="dropout")
    with pytest.raises(UserError, match="no Table 6"):
        studies.studies(tables=[6])


def test_seeds_are_the_same_in_all_rows_and_flags_win(tmp_path):
    [study] = studies.studies(tables=[1])
    made = planning.plan(study, 3, {"depth": 20, "seed": 5}, tmp_path)
    for line in made.lines:
        assert [arm.experiment.seed for arm in line.arms] == [5, 6, 7]
        assert all(arm.experiment.depth == 20 for arm in line.arms)
    assert len({arm.folder for line in made.lines for arm in line.arms}) == 33


def test_the_protocol_val_holds_out_5000(tmp_path):
    lines = two_rows(tmp_path, protocol="val").lines
    assert [line.arms[0].experiment.val for line in lines] == [5000, 5000]


def test_more_images_than_there_are_are_not_held_out(tmp_path):
    given = {"dataset": "digits", "depth": 8}
    with pytest.raises(UserError, match="cannot hold out 5000 of 1437") as refused:
        two_rows(tmp_path, 1, given, protocol="val")
    assert "--val" in refused.value.hint
    [line, _] = two_rows(tmp_path, 1, given | {"val": 300}, protocol="val").lines
    assert line.arms[0].experiment.val == 300


def test_the_laptop_scale_has_one_recipe_whatever_the_row_has(tmp_path):
    [study] = studies.studies(tables=[4])
    few = study.only(["ResNet-1001 full-preact, batch 64"])  # 200 epochs, with its own drops
    e = planning.plan(few, 1, {}, tmp_path, "laptop").lines[0].arms[0].experiment
    assert (e.depth, e.batch_size, e.steps, e.epochs) == (65, 64, 400, None)
    assert (e.lr, e.warmup, e.drops) == (0.05, 40, "0.5,0.75")


def test_an_ablation_runs_and_never_runs_a_row_again(resnetv2, tmp_path):
    command = ["ablate", "--shortcut", "conv1x1", *TINY, "--output", tmp_path / "a"]
    [made] = json.loads(resnetv2(*command, "--format", "json").stdout)
    assert [(row["name"], row["n"]) for row in made["rows"]] == [("identity", 1), ("conv1x1", 1)]
    results = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("result.json")}
    assert len(results) == 2
    again = resnetv2(*command)
    assert again.stderr.count("done before") == 2
    assert {p: p.stat().st_mtime_ns for p in results} == results


def test_the_time_of_an_ablation_ends_it_with_its_runs_saved(tmp_path):
    """The only slot has a run that would never end: asked to stop, it does not count as failed."""

    class Endless:
        asked = False

        def status(self):
            return 0 if self.asked else None

        def stop(self):
            self.asked = True

    launcher = SimpleNamespace(start=lambda *_: Endless())
    made = two_rows(tmp_path, 1, {"depth": 8})
    runs = [arm for line in made.lines for arm in line.arms]
    said = []
    sweep = Sweep(launcher, 1, lambda arm, state: said.append(state), lambda running: None, 0.5)
    with pytest.raises(Stopped, match="the time is over") as stopped:
        sweep.run(runs)
    assert stopped.value.status == 0
    assert said == ["running", "stopped; the same command continues"]
    assert all(arm.failure is None for arm in runs)


@pytest.mark.parametrize("status, crashed", [(143, False), (138, False), (2, True), (-9, True)])
def test_a_run_that_a_signal_asked_to_leave_has_not_crashed(tmp_path, status, crashed):
    ended_so = SimpleNamespace(status=lambda: status, stop=lambda: None)
    [arm] = two_rows(tmp_path, 1, {"depth": 8}).lines[0].arms
    said = []
    launcher = SimpleNamespace(start=lambda *_: ended_so)
    Sweep(launcher, 1, lambda arm, state: said.append(state), lambda running: None).run([arm])
    assert arm.crashed is crashed
    assert (said[-1] == "stopped; the same command continues") is not crashed


def test_every_row_has_its_first_seed_before_any_has_its_second(tmp_path, monkeypatch):
    monkeypatch.setattr("resnetv2_cli.ablation.sweep.POLL", 0)
    begun = []

    def start(arm, slot, lock):
        begun.append((arm.row, arm.experiment.seed))
        return SimpleNamespace(status=lambda: 1, stop=lambda: None)

    runs = [arm for line in two_rows(tmp_path, 2, {"depth": 8}).lines for arm in line.arms]
    Sweep(SimpleNamespace(start=start), 1, lambda *_: None, lambda running: None).run(runs)
    assert begun == [(row, seed) for seed in (0, 1) for row in ("identity", "conv1x1")]


def test_what_takes_the_place_of_a_run_that_ended_has_its_gpu(tmp_path, monkeypatch):
    """The second run outlasts the others, which follow one another in the first slot."""
    monkeypatch.setattr("resnetv2_cli.ablation.sweep.POLL", 0)
    slots = []

    def start(arm, slot, lock):
        slots.append(slot)
        lasts = len(slots) == 2
        return SimpleNamespace(
            status=lambda: None if lasts and len(slots) < 4 else 1, stop=lambda: None
        )

    runs = [arm for line in two_rows(tmp_path, 2, {"depth": 8}).lines for arm in line.arms]
    Sweep(SimpleNamespace(start=start), 2, lambda *_: None, lambda running: None).run(runs)
    assert slots == [0, 1, 0, 0]


def test_a_second_ctrl_c_does_not_wait_for_runs_to_save():
    sweep = Sweep(None, 1, print, print)
    sweep.note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        sweep.note(signal.SIGINT, None)


def test_a_run_that_failed_twice_says_why_the_last_time(tmp_path):
    arm = two_rows(tmp_path).lines[0].arms[0]
    arm.log.parent.mkdir(parents=True)
    arm.log.write_text("error: the disk was full\nhint: x\nerror: no such images\nhint: y\n")
    assert reason(arm, 2) == "no such images"
    assert reason(arm, -signal.SIGKILL).startswith("killed by SIGKILL")


BUG = """of the second attempt
Traceback (most recent call last):
  File "mine.py", line 5, in forward
    return x.vieww(-1)
AttributeError: 'Tensor' object has no attribute 'vieww'
"""


@pytest.mark.parametrize(
    "said, why",
    [
        (BUG, "status 1: AttributeError: 'Tensor' object has no attribute 'vieww'"),
        (BUG + "a farewell of some library\n", "status 1: AttributeError: 'Tensor' object"),
        ("error: a warning\n" + BUG, "status 1: AttributeError: 'Tensor' object"),
        ("error: no such images\nhint: y\n", "no such images"),
        ("a word\n", "status 1: a word"),
        ("", "status 1: it said nothing"),
    ],
)
def test_why_a_run_crashed_is_read_from_what_this_attempt_said(tmp_path, said, why):
    arm = two_rows(tmp_path).lines[0].arms[0]
    arm.log.parent.mkdir(parents=True)
    arm.log.write_text("error: the disk was full\nhint: x\n")
    arm.fail("the disk was full")

    def start(arm, slot, lock):
        assert not arm.crashed
        with arm.log.open("a") as log:
            log.write(said)
        return SimpleNamespace(status=lambda: 1, stop=lambda: None)

    Sweep(SimpleNamespace(start=start), 1, lambda *_: None, lambda running: None).run([arm])
    assert arm.failure["reason"].startswith(why)


def test_a_plan_says_the_seeds_for_the_difference_that_is_asked_for(tmp_path, here):
    command = ["--shortcut", "conv1x1", "--depth", 8, "--detect", 0.1, "--output", tmp_path]
    done = here("ablate", *command, "--dry-run", "--no-probe", "--format", "json")
    [planned] = json.loads(done.stdout)
    assert [row["seeds_for"]["difference"] for row in planned["rows"]] == [0.1, 0.1]
    assert all(row["parameters"] > 0 for row in planned["rows"])


MISSING = ["--dataset", "folder", "--data-dir", "nowhere", "--depth", 18]


def test_a_run_that_crashed_is_the_exit_status(tmp_path, here):
    command = ["--shortcut", "conv1x1", "--row", "identity", *MISSING, "--output", tmp_path]
    done = here("ablate", *command, "--format", "csv", status=2)
    assert "crashed: there is no folder nowhere/train" in done.stdout
    assert done.stderr.count("error: ") == 1 and "error: 1 of 1 runs crashed" in done.stderr
    [log] = tmp_path.glob("*/s0.log")
    assert "hint: " in done.stderr and str(log) in done.stderr


def test_a_run_that_somebody_stopped_is_the_exit_status(tmp_path, here, monkeypatch):
    stopped = SimpleNamespace(status=lambda: 143, stop=lambda: None)
    launcher = SimpleNamespace(start=lambda *_: stopped)
    monkeypatch.setitem(launch.LAUNCHERS, "process", lambda *_: launcher)
    done = here("ablate", "--shortcut", "conv1x1", "--depth", 8, "--output", tmp_path, status=2)
    assert "error: 2 of 2 runs were stopped" in done.stderr


def test_runs_that_diverged_are_results(tmp_path, here):
    for line in two_rows(tmp_path, 1, {"depth": 8}).lines:
        for arm in line.arms:
            arm.folder.mkdir(parents=True)
            (arm.folder / "failed.json").write_text('{"reason": "x", "diverged": true}')
    done = here("ablate", "--shortcut", "conv1x1", "--depth", 8, "--output", tmp_path)
    assert done.stdout.count("fail (diverged)") == 2


def test_each_crash_is_counted(tmp_path):
    planned = two_rows(tmp_path, 4)
    ended(planned, (6.0, 7.0))
    for arm in planned.lines[0].arms[2:]:
        arm.fail("of one and the same reason")
    assert "2 crashed" in tables.measured(planned.lines[0])


def test_a_job_of_a_queue_says_in_the_log_what_it_has_to_say(tmp_path):
    log = tmp_path / "s0.log"
    command = [sys.executable, "-c", "import sys; print('error: none', file=sys.stderr); exit(7)"]
    job = SimpleNamespace(done=lambda: True, exception=lambda: None)
    job.result = lambda: launch.logged(command, log)
    assert launch.Job(job, log).status() == 7 and log.read_text() == "error: none\n"
    job.exception = lambda: RuntimeError("no output (state: OUT_OF_MEMORY)")
    assert launch.Job(job, log).status() == 1
    assert log.read_text() == "error: none\nno output (state: OUT_OF_MEMORY)\n"
    job.done = lambda: False
    assert launch.Job(job, log).status() is None


def test_a_queue_tells_why_its_runs_crashed(tmp_path, here):
    pytest.importorskip("submitit")
    command = ["--shortcut", "conv1x1", *MISSING, "--launcher", "local", "--jobs", 2]
    done = here("ablate", *command, "--output", tmp_path, "--format", "csv", status=2)
    assert done.stdout.count("crashed: there is no folder nowhere/train") == 2


def test_a_queue_that_is_not_there_leaves_nothing(tmp_path, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    lab = tmp_path / "lab"
    done = here("ablate", "--shortcut", "conv1x1", "--launcher", "local", "--output", lab, status=2)
    assert "needs submitit" in done.stderr and not lab.exists()


def test_who_was_stopped_and_continues_has_not_ended(tmp_path):
    planned, out = two_rows(tmp_path), io.StringIO()
    progress = Progress(Console(file=out, width=200), 2)
    first, second = (line.arms[0] for line in planned.lines)
    for state in ("running", "stopped", "continuing"):
        progress.announce(first, state)
    ended(planned, (9.0,))
    second.fail("the disk is full")
    for arm in (first, second):
        progress.announce(arm, "of what became of it")
    counts = [line.split()[0] for line in out.getvalue().splitlines()]
    assert counts == ["[0/2]", "[0/2]", "[0/2]", "[1/2]", "[2/2]"]


def test_what_waits_is_not_looked_at_while_all_places_are_taken():
    """These arms are plain objects: checking one would fail."""
    sweep = Sweep(None, 1, print, print, running=["one"])
    waiting = [object(), object()]
    assert sweep.fill(waiting) == waiting


@pytest.mark.parametrize(
    "how, error, fail, said",
    [
        ({}, 60.0, True, "fail: 60.00"),
        ({}, 6.6, False, "6.60"),
        ({"protocol": "val"}, 60.0, True, "fail: 60.00"),
        ({"given": {"lr": 0.05}}, 60.0, True, "fail: 60.00"),
        ({"given": {"epochs": 1.0}}, 60.0, False, "60.00"),
        ({"scale": "laptop"}, 60.0, False, "60.00"),
        ({"scale": "laptop"}, FAIL, True, "fail (diverged)"),
    ],
)
def test_an_error_above_20_is_a_failure_of_the_papers_length_alone(
    tmp_path, how, error, fail, said
):
    planned = two_rows(tmp_path, **how)
    ended(planned, (error,))
    columns, rows = tables.table(planned, 0.5)
    assert rows[0][columns.index("here, %")] == said
    assert tables.as_json(planned, 0.5)["rows"][0]["fail"] is fail


@pytest.mark.parametrize(
    "n, errors, said",
    [
        (2, (9.0,), "fail (1 of 2 diverged, else 9.00)"),
        (4, (9.0, 8.5), "fail (2 of 4 diverged, else 9.00, 8.50)"),
        (4, (9.0, 8.5, 7.0), "8.75 (1 of 4 diverged)"),
        (2, (), "fail (diverged)"),
    ],
)
def test_seeds_that_came_to_an_end_are_told_beside_those_that_diverged(tmp_path, n, errors, said):
    planned = two_rows(tmp_path, n)
    ended(planned, errors)
    for arm in planned.lines[0].arms[len(errors) :]:
        arm.folder.mkdir(parents=True)
        (arm.folder / "failed.json").write_text('{"reason": "x", "diverged": true}')
    assert tables.measured(planned.lines[0]) == said


def test_worse_is_plus_beside_the_paper_and_the_baseline(tmp_path):
    planned = two_rows(tmp_path, 3)
    ended(planned, (6.0, 7.0, 9.0), (12.0, 13.5, 18.0))
    columns, [_, conv1x1] = tables.table(planned, 0.5)
    said = dict(zip(columns, conv1x1, strict=True))
    assert said["here, %"] == "13.50 (14.50±3.12)"  # the median before the mean
    assert said["to paper"] == "+1.28" and said["to baseline"] == "+7.17"
    assert said["in the paper"] == "+5.61"
    assert said["mean, 95% interval"] == "6.74 to 22.26"  # 14.5 -+ 4.3027 * 3.1225 / 3 ** 0.5
    assert said["p"] == "0.016"


@pytest.mark.parametrize(
    "errors, said", [((12.0, 13.5, 16.6), "0.005"), ((12.0, 13.2, 15.1), "<0.001")]
)
def test_a_p_that_is_not_0_is_not_said_to_be(tmp_path, errors, said):
    planned = two_rows(tmp_path, 3)
    ended(planned, (6.0, 7.0, 9.0), errors)
    assert tables.p(planned, planned.lines[1]) == said


@pytest.mark.parametrize(
    "given, comparable",
    [({}, True), ({"workers": 1, "seed": 3}, True), ({"lr": 0.05}, False), ({"steps": 9}, False)],
)
def test_only_what_is_free_leaves_an_error_beside_the_papers(tmp_path, given, comparable):
    assert two_rows(tmp_path, 1, given).comparable is comparable


def test_a_shortcut_that_is_given_twice_is_not_forgotten(here):
    done = here("ablate", "--shortcut", "dropout", "--shortcut", "conv1x1", status=2)
    assert "--shortcut is given 2 times" in done.stderr
    assert "--grid shortcut=dropout,conv1x1" in done.stderr


@pytest.mark.parametrize(
    "devices, given, seen",
    [
        ("1", "", ["0", "1", "0"]),
        ("1", "4,7", ["4", "7", "4"]),
        ("2", "4,7", ["4,7"] * 3),
    ],
)
def test_runs_at_once_have_a_gpu_each_of_those_that_may_be_used(
    devices, given, seen, monkeypatch, tmp_path
):
    """A queue or a container names the usable GPUs in the same variable, which must be respected;
    each run also gets its share of the processors."""
    monkeypatch.setattr(os, "cpu_count", lambda: 13)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch, "Process", lambda arm, environment, lock: environment)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    [study] = studies.studies(tables=[1])
    flags = {"depth": 8, "devices": devices}
    [arm] = planning.plan(study.only(["identity"]), 1, flags, tmp_path).lines[0].arms
    processes = launch.Processes(3)
    found = [processes.start(arm, slot, 0) for slot in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == seen
    assert {environment["OMP_NUM_THREADS"] for environment in found} == {"4"}
