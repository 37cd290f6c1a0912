"""How runs of an ablation are started and stopped: as processes, or as the jobs of a queue."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import two_rows

from resnetv2_cli.ablation import launch
from resnetv2_cli.ablation.sweep import Sweep
from resnetv2_cli.errors import UserError
from resnetv2_cli.manifest import origins
from resnetv2_cli.runfolder import RunFolder

# On SIGTERM it saves, which takes a moment, and exits; otherwise it ends after some seconds.
TRAINING = """
trap 'sleep 0.3; echo saved; exit 143' TERM
echo begun
for i in $(seq 100); do sleep 0.1; done
"""


@pytest.fixture
def arm(tmp_path):
    [arm] = two_rows(tmp_path).lines[0].arms
    return arm


def submitted(monkeypatch, job) -> dict:
    """Make submitit return ``job`` for each submission; return the settings that it is given, and
    the signals that are ``blocked`` while it submits."""
    told = {}

    def submit(*_):
        told["blocked"] = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return job

    executor = SimpleNamespace(submit=submit, update_parameters=told.update)
    stand_in = SimpleNamespace(AutoExecutor=lambda **_: executor)
    monkeypatch.setitem(sys.modules, "submitit", stand_in)
    return told


def test_the_config_of_a_run_knows_what_asked_for_its_settings(tmp_path):
    [arm] = two_rows(tmp_path, 1, {"lr": 0.05}).lines[1].arms
    launch.requested(arm)
    study = "shortcut-conv1x1"
    asked = dict.fromkeys(["dataset", "depth", "block", "unit"], f"recipe of {study}, scale paper")
    asked |= {"shortcut": f"row 'conv1x1' of {study}"}
    asked |= {"lr": "flag of ablate", "seed": "ablate --runs"}
    assert origins(arm.config, {}) == asked


def test_of_the_current_folder_a_run_imports_its_own_code_alone(arm):
    """With -P, no file there can shadow a package."""
    own = replace(arm, experiment=replace(arm.experiment, shortcut="mine:Own"))
    tool = [sys.executable, "-P", "-m", "resnetv2_cli", "train"]
    assert launch.requested(own)[:7] == [*tool, "--allow-code", "mine:Own"]


def test_a_process_goes_on_in_its_log_and_has_no_ctrl_c(arm, monkeypatch):
    monkeypatch.setattr(launch, "requested", lambda arm: ["bash", "-c", TRAINING])
    arm.log.parent.mkdir(parents=True)
    arm.log.write_text("of the first attempt\n")
    run = launch.Process(arm, dict(os.environ), lock := arm.claim())
    os.close(lock)
    assert os.getpgid(run.process.pid) == run.process.pid
    while "begun" not in arm.log.read_text():
        time.sleep(0.02)
    run.stop()
    assert run.process.wait(10) == 143
    assert arm.log.read_text() == "of the first attempt\nbegun\nsaved\n"


@pytest.mark.parametrize(
    "number, ends",
    [(signal.SIGTERM, nullcontext()), (signal.SIGINT, pytest.raises(KeyboardInterrupt))],
)
def test_what_ends_a_job_lets_its_run_save(tmp_path, number, ends):
    log = tmp_path / "s0.log"

    def stop() -> None:
        while not (log.exists() and log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as submitit does in a job
    try:
        threading.Thread(target=stop).start()
        with ends:
            assert launch.logged(["bash", "-c", TRAINING], log) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.read_text() == "begun\nsaved\n"


def test_what_ends_a_job_that_is_only_starting_ends_it_too(tmp_path, monkeypatch):
    """The signal comes before the job knows which process to pass it on to."""
    start = subprocess.Popen

    def slowly(*given, **more):
        run = start(*given, **more)
        while not (tmp_path / "s0.log").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        return run

    monkeypatch.setattr(subprocess, "Popen", slowly)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert launch.logged(["bash", "-c", TRAINING], tmp_path / "s0.log") == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_job_of_the_stand_in_is_asked_by_a_signal_and_has_no_ctrl_c(tmp_path, monkeypatch, arm):
    """submitit's controller passes SIGTERM on; on Ctrl-C it kills the job a second later."""
    with subprocess.Popen(["sleep", "60"]) as controller:
        job = SimpleNamespace(done=lambda: False, job_id=str(controller.pid))
        told = submitted(monkeypatch, job)
        launch.Queue("local", tmp_path, 1).start(arm, 0, 0).stop()
        assert controller.wait(10) == -signal.SIGTERM
    assert signal.SIGINT in told["blocked"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_job_of_a_cluster_has_its_hours_and_is_cancelled(tmp_path, monkeypatch, arm):
    """It is not a process on this machine."""
    cancelled = []
    told = submitted(monkeypatch, SimpleNamespace(cancel=lambda: cancelled.append(True)))
    launch.Queue("slurm", tmp_path, 1.5).start(arm, 0, 0).stop()
    assert told["timeout_min"] == 90 and cancelled


def test_a_run_whose_ablation_has_gone_is_anothers_while_its_job_trains(arm):
    with RunFolder(arm.folder).claimed():
        assert arm.claim() is None
    os.close(arm.claim())


def test_a_run_that_was_refused_because_another_job_trains_it_has_not_crashed(arm):
    """Both were in the queue; the other one was submitted by an ablation that is gone."""
    folder, said = RunFolder(arm.folder), []

    def start(*_):
        other.enter_context(folder.claimed())
        return SimpleNamespace(status=lambda: 2, stop=lambda: None)

    def announce(arm, state):
        said.append(state)

    with ExitStack() as other:
        Sweep(SimpleNamespace(start=start), 1, announce, lambda running: None).run([arm])
    assert said == ["running", "another process trains it; the same command continues"]
    assert not arm.crashed


def test_a_cluster_that_takes_no_job_is_one_line_and_the_run_is_free(tmp_path, monkeypatch, arm):
    def refuses(*_):
        raise RuntimeError("sbatch failed\nsbatch: error: invalid partition")

    submitted(monkeypatch, None)
    queue = launch.Queue("slurm", tmp_path, 1)
    monkeypatch.setattr(queue.executor, "submit", refuses)
    with pytest.raises(UserError, match="no job: sbatch: error: invalid partition"):
        Sweep(queue, 1, lambda *_: None, lambda running: None).run([arm])
    os.close(arm.claim())  # nobody holds it
