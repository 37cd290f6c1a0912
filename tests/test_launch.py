"""How runs of an ablation are started and stopped where a queue has them as its jobs."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
from conftest import two_rows

from resnetv2_cli.ablation import launch
from resnetv2_cli.ablation.sweep import Sweep
from resnetv2_cli.runfolder import RunFolder

# Saves when it is asked to leave, and takes a moment for it; by itself it ends after some seconds.
TRAINING = """
trap 'sleep 0.3; echo saved; exit 143' TERM
echo begun
for i in $(seq 100); do sleep 0.1; done
"""


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

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as submitit has it in a job
    try:
        threading.Thread(target=stop).start()
        with ends:
            assert launch.logged(["bash", "-c", TRAINING], log) == 143
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.read_text() == "begun\nsaved\n"


def test_a_job_of_the_stand_in_is_asked_by_a_signal_and_has_no_ctrl_c(tmp_path, monkeypatch):
    """Its controller passes SIGTERM on, and on Ctrl-C has the job killed a second later."""
    blocked = []

    def submit(*_):
        blocked.extend(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return SimpleNamespace(done=lambda: False, job_id=str(controller.pid))

    executor = SimpleNamespace(submit=submit, update_parameters=lambda **_: None)
    stand_in = SimpleNamespace(AutoExecutor=lambda **_: executor)
    monkeypatch.setitem(sys.modules, "submitit", stand_in)
    [arm] = two_rows(tmp_path).lines[0].arms
    with subprocess.Popen(["sleep", "60"]) as controller:
        launch.Queue("local", tmp_path, 1).start(arm, 0, 0).stop()
        assert controller.wait(10) == -signal.SIGTERM
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_run_whose_ablation_has_gone_is_anothers_while_its_job_trains(tmp_path):
    [arm] = two_rows(tmp_path).lines[0].arms
    with RunFolder(arm.folder).claimed():
        assert arm.claim() is None
    os.close(arm.claim())


def test_a_run_that_was_refused_because_another_job_trains_it_has_not_crashed(tmp_path):
    """Both were in the queue, the other one since an ablation that has gone."""
    [arm] = two_rows(tmp_path).lines[0].arms
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
