"""A whole iteration as one CUDA graph: bit for bit as call by call, or not used at all."""

import os
import signal

import pytest
import torch
from iterations import Tape, batch, on_tape, task
from trainings import At, same, trained_as

from resnetv2_cli import graphs, native
from resnetv2_cli.errors import Diverged, Stopped
from resnetv2_cli.iteration import Iteration, restore
from resnetv2_cli.nonfinite import prepare
from resnetv2_cli.optim import sgd
from resnetv2_cli.task import OWN

SMALL = {"batch_size": 200, "kernels": "eager"}  # the last batch of an epoch has 37 images
SAYS = "iterations are replayed, each as one CUDA graph"


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(graphs, "why_not", lambda device, **parts: "")
    monkeypatch.setattr(graphs, "recorded", on_tape)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"shortcut": "dropout", "unit": "original", "schedule": "cosine"},
        {"shortcut": "stochastic-depth", "non_finite": "skip", "label_smoothing": 0.1},
        {"momentum": 0.0, "decay": "weights", "augment": False},
        {"nesterov": True, "shortcut": "exclusive-gate", "precision": "bf16-mixed"},
    ],
)
def test_a_replayed_training_is_bit_for_bit_the_other(recorder, tmp_path, given):
    told: list[str] = []
    ours = trained_as(tmp_path / "replayed", told.append, **SMALL, **given, graphs=True)
    assert SAYS in told
    assert same(ours, trained_as(tmp_path / "called", **SMALL, **given))


def test_a_stopped_one_continues_with_its_momentum(recorder, tmp_path):
    leave, told = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM)), []
    with pytest.raises(Stopped):
        trained_as(tmp_path / "replayed", display=[leave], **SMALL, graphs=True)
    ours = trained_as(tmp_path / "replayed", told.append, resume={})
    assert SAYS in told
    assert same(ours, trained_as(tmp_path / "called", **SMALL))


def test_a_diverging_one_names_the_iteration_and_the_unit(recorder, tmp_path):
    said = []
    for name in ("replayed", "called"):
        with pytest.raises(Diverged) as caught:
            trained_as(tmp_path / name, **SMALL, lr=1e20, warmup=0, graphs=name == "replayed")
        said.append((str(caught.value), caught.value.iteration, caught.value.where))
    assert said[0] == said[1] and said[0][1] > 1


def test_frozen_parts_stay_as_they_came(recorder, tmp_path):
    start = trained_as(tmp_path / "start", **SMALL).last
    given = {"weights": str(start), "freeze": "stem,stage1"}
    ours = trained_as(tmp_path / "replayed", **SMALL, **given, graphs=True)
    assert same(ours, trained_as(tmp_path / "called", **SMALL, **given))


def stale(step):
    """A replay that computes on the batch it was captured with."""
    step()
    with Tape() as tape:
        step()
    first = next(row for row in tape.done if row[0].name().startswith("aten::_to_copy"))
    tape.done.remove(first)
    return tape.replay


def raises(step):
    step()
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


KINDS = {"nothing": lambda step: lambda: None, "stale": stale, "raises": raises}


@pytest.mark.parametrize("faulty", KINDS)
def test_a_recording_of_something_else_is_not_used(monkeypatch, recorder, tmp_path, faulty):
    monkeypatch.setattr(graphs, "recorded", KINDS[faulty])
    told: list[str] = []
    ours = trained_as(tmp_path / "not", told.append, **SMALL, graphs=True)
    assert len([line for line in told if line.startswith("no CUDA graphs: ")]) == 1
    assert same(ours, trained_as(tmp_path / "called", **SMALL))


@pytest.mark.parametrize("faulty", ["stale", "raises"])
def test_why_not_the_whole_iteration_is_said(monkeypatch, recorder, tmp_path, faulty):
    monkeypatch.setattr(graphs, "recorded", KINDS[faulty])
    monkeypatch.setattr(graphs, "record", lambda net, x, precision: (net, ""))
    told: list[str] = []
    trained_as(tmp_path / "not", told.append, **SMALL, graphs=True)
    [why] = [line for line in told if line.startswith("the network is replayed as CUDA graphs")]
    assert ("capturing" if faulty == "raises" else "the update of a replay") in why
    assert "\n" not in why


@pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.why_not()}")
def test_kernels_that_cannot_be_replayed_leave_pytorchs_to_be(recorder, tmp_path):
    """The tape does not see what the C kernels do, so its replay computes another update."""
    told: list[str] = []
    small = SMALL | {"kernels": "auto"}
    ours = trained_as(tmp_path / "replayed", told.append, **small, graphs=True)
    assert [line for line in told if line.startswith(OWN.format(""))] and SAYS in told
    assert same(ours, trained_as(tmp_path / "called", **SMALL))


def test_what_is_compared_is_the_gradient_whatever_the_momentum():
    """A continued run's momentum sums many gradients; a wrong one would be lost in it."""
    t = task().train()
    iteration = Iteration(t, sgd(t.net, t.experiment), batch())
    prepare(iteration.optimizer)
    learned = []
    for size in (0.0, 100.0):
        for state in iteration.optimizer.state.values():
            state["momentum_buffer"].fill_(size)
        kept = [(tensor, tensor.clone()) for tensor in iteration.state()]
        learned.append(iteration.update(iteration.step, kept))
        restore(kept)
    torch.testing.assert_close(*learned, rtol=0, atol=0)
    assert learned[0].norm() > 0.1
