"""How long an ablation would take, from a step measured here and the training that remains."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ended, two_rows

from resnetv2_cli import graphs
from resnetv2_cli.ablation import planning, probe, studies
from resnetv2_cli.commands.ablate import plan
from resnetv2_cli.config import Experiment
from resnetv2_cli.iteration import Iteration


def test_a_forecast_is_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "step_seconds", lambda e: 0.5)
    planned = two_rows(tmp_path, 2, {"depth": 8, "steps": 100})
    ended(planned, (6.0,))
    assert [line["seconds"] for line in probe.forecast(planned, True)] == [50.0, 100.0]


@pytest.mark.parametrize(
    "errors, probes, says",
    [
        ((6.0,), True, "about 50 s of"),
        ((6.0,), False, ""),
        ((6.0, 7.0), False, "all of it is done"),
    ],
)
def test_a_plan_says_how_long_what_is_left_takes(
    tmp_path, monkeypatch, capsys, errors, probes, says
):
    monkeypatch.setattr(probe, "step_seconds", lambda e: 0.5)
    planned = two_rows(tmp_path, 1, {"depth": 8, "steps": 100})
    ended(planned, errors[:1], errors[1:])
    plan([planned], 1, probes, 0.5, "csv")
    said = capsys.readouterr().err
    assert said.startswith(says) and bool(said) == bool(says)


def test_a_plan_of_two_tables_counts_a_run_that_both_have_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probe, "step_seconds", lambda e: 0.5)
    made = [
        planning.plan(study.only([name]), 1, {"steps": 100}, tmp_path)
        for study, name in zip(
            studies.studies(tables=[1, 2]), ("identity", "ResNet-110 original"), strict=True
        )
    ]
    plan(made, 1, True, 0.5, "csv")
    assert capsys.readouterr().err.count("about 50 s of") == 1
    assert probe.total([(one, probe.forecast(one, True)) for one in made], 1) == 50.0


@pytest.mark.parametrize("gpus, seconds", [(0, 100.0), (2, 50.0)])
def test_jobs_on_one_device_share_it(tmp_path, monkeypatch, gpus, seconds):
    monkeypatch.setattr(probe, "step_seconds", lambda e: 0.5)
    planned = two_rows(tmp_path, 1, {"depth": 8, "steps": 100})
    counts = probe.forecast(planned, True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert probe.total([(planned, counts)], 4) == seconds


@pytest.mark.parametrize("accumulate", [1, 2, 8])
@pytest.mark.parametrize("each", [1.0, 0.001])
def test_a_part_of_a_batch_that_takes_long_stands_for_all_of_it(monkeypatch, accumulate, each):
    """By a clock on which each image takes a second, or so little that the whole batch is timed."""
    seen = []

    class Timed(Iteration):
        def __call__(self, batch, number):
            seen.append(len(batch.images))
            return super().__call__(batch, number)

    monkeypatch.setattr(probe, "Iteration", Timed)
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: each * sum(seen)))
    e = Experiment(depth=8, batch_size=128, accumulate=accumulate, accelerator="cpu")
    assert probe.step_seconds(e) == pytest.approx(each * 128)
    assert max(seen) == min(128 / accumulate, 32 if each == 1 else 128)


def test_a_network_that_was_measured_is_gone_when_its_memory_is_given_back(monkeypatch):
    made, alive = [], []

    class Kept(Iteration):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(weakref.ref(self))

    def tidy(device):
        gc.collect()
        alive.extend(one() for one in made)

    monkeypatch.setattr(probe, "Iteration", Kept)
    monkeypatch.setattr(graphs, "tidy", tidy)
    probe.step_seconds(Experiment(depth=8, batch_size=4, accelerator="cpu"))
    assert alive == [None]


def test_a_network_is_measured_on_the_gpu_that_it_would_train_on(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(probe, "measured", lambda e, device, most: used.append(device) or 0.5)
    assert probe.step_seconds(Experiment(devices="3,")) == 0.5
    assert used == 2 * [torch.device("cuda", 3)]
