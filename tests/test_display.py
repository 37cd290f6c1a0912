"""What training displays and records as it runs: lines, rates and sums."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from resnetv2_cli import callbacks, console, display, run
from resnetv2_cli.analysis.draw import short
from resnetv2_cli.config import Experiment
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.task import Classification


def test_words_are_no_numbers_and_a_fail_is_one():
    for cells, numbers in [
        (("6.61", "—", "fail: 12.3", "+0.1", ""), True),
        (("full-preact", "original"), False),
        (("1", "float32"), False),
    ]:
        assert console.Column(("head", *cells), False).numbers is numbers


@pytest.mark.parametrize(
    "value, said", [(99.6, "100"), (99.4, "99"), (155.2, "155"), (1e7, "1e+07")]
)
def test_two_digits_are_no_power_of_ten_before_a_million(value, said):
    assert short(value, 2) == said


def test_an_evaluation_is_no_time_of_training(monkeypatch):
    """Its duration is left out of the seconds since ``mark``, by which images are divided."""
    clock = SimpleNamespace(perf_counter=iter([107.0, 109.0]).__next__)
    monkeypatch.setattr(callbacks, "time", clock)
    monkeypatch.setattr(callbacks, "refuse_infinite", lambda *_: None)
    recorder = callbacks.Recorder(None, None, 10, "test")
    monkeypatch.setattr(recorder, "evaluated", lambda *_: None)
    recorder.mark = 100.0
    recorder.on_validation_start(None, None)
    recorder.on_validation_end(None, None)
    assert recorder.mark == 102.0


def test_sums_of_another_number_of_processes_are_taken_together():
    recorder = callbacks.Recorder(None, None, 10, "test")
    recorder.load_state_dict({"sums": torch.tensor([[1.0, 2, 3], [4, 5, 6]])})
    task = SimpleNamespace(sums=torch.zeros(3))
    recorder.on_train_start(SimpleNamespace(world_size=1, global_rank=0), task)
    assert task.sums.tolist() == [5, 7, 9] and recorder.before == 9


def test_an_evaluation_is_shown_with_its_own_iteration(tmp_path, monkeypatch):
    monkeypatch.setattr(display, "LINES", 0.0)
    said = io.StringIO()
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=26, log_every=1)
    shown = display.Display(Console(file=said, width=200))
    run.train(e, RunFolder(tmp_path / "run"), display=[shown])
    lines = {line.split("/")[0]: line for line in said.getvalue().splitlines()}
    assert " at " not in lines["step 22"] and " % at 23  lr " in lines["step 25"]


def test_what_comes_before_the_first_iteration_is_in_no_rate(tmp_path, monkeypatch):
    """Here capturing graphs takes ten minutes before training, and an iteration one second."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(callbacks, "time", clock)
    monkeypatch.setattr(display, "time", clock)
    monkeypatch.setattr(display, "LINES", 0.0)
    start, step = Classification.on_train_start, Classification.training_step

    def later(seconds, then):
        def call(*given):
            now[0] += seconds
            return then(*given)

        return call

    monkeypatch.setattr(Classification, "on_train_start", later(600.0, start))
    monkeypatch.setattr(Classification, "training_step", later(1.0, step))
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=6, log_every=3)
    folder, said = RunFolder(tmp_path / "run"), io.StringIO()
    shown = display.Display(Console(file=said, width=200))
    run.train(e, folder, display=[shown])
    assert dict(read_metrics(folder.speed)["images_per_second"]) == {3: 64.0, 6: 64.0}
    lines = said.getvalue().splitlines()
    assert "1.00 it/s" in lines[-1] and "step 4/6" in lines[1] and "0:02 left" in lines[1]
    assert [display.clock(s) for s in (9, 123, 3723)] == ["0:09", "2:03", "1:02:03"]


def test_a_pause_is_forgotten_after_ten_minutes():
    pace, now = display.Pace(), 0.0
    assert pace.at(now, 100) == 0
    for step in range(101, 1301):
        now += 2
        assert pace.at(now, step) == pytest.approx(0.5)
    now += 36_000  # the machine slept
    assert pace.at(now, 1300) < 0.01
    for step in range(1301, 1702):
        now += 2
        rate = pace.at(now, step)
    assert rate == pytest.approx(0.5) and len(pace.marks) < 25
    assert pace.at(now + 60, 1701) == pytest.approx(0.45, abs=0.01)  # an evaluation counts in it


@pytest.mark.parametrize(
    "batch, images, lines",
    [
        (128, 45_000, ["128 images an iteration: 32 on each of 2 devices, 2 times"]),
        (
            130,
            40_000,
            [
                "note: only a part of cifar10: 40,000 of its 50,000 training images",
                "130 images an iteration: about 32 on each of 2 devices, 2 times",
            ],
        ),
    ],
)
def test_how_a_batch_is_split_and_what_is_left_out_is_said(batch, images, lines):
    """Images that are held out for validation do not count as left out."""
    said, e = io.StringIO(), Experiment(batch_size=batch, accumulate=2, val=5000)
    whole = SimpleNamespace(train=50_000)
    data = SimpleNamespace(experiment=e, train_images=images, dataset=whole)
    trainer = SimpleNamespace(is_global_zero=True, world_size=2, datamodule=data)
    display.Display(Console(file=said, width=200)).on_train_start(trainer, None)
    assert said.getvalue().splitlines() == lines
