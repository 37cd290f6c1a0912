"""A whole iteration as one recording: bit for bit what its calls are, or not used at all.

A GPU's recorder is not here. The one below keeps each operation with the very tensors it ran on; a
replay runs them again, without any Python of the iteration, as a CUDA graph does.
"""

import os
import signal

import pytest
import torch
from test_task import batch, task
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import At, same, trained_as

from resnetv2_cli import graphs, native
from resnetv2_cli.errors import Diverged, Stopped
from resnetv2_cli.iteration import Iteration, restore
from resnetv2_cli.nonfinite import prepare
from resnetv2_cli.optim import sgd
from resnetv2_cli.task import OWN

SMALL = {"batch_size": 200, "kernels": "eager"}  # the last batch of an epoch has 37 images
SAYS = "iterations are replayed, each as one CUDA graph"


class Tape(TorchDispatchMode):
    """Every operation, with its tensors and what it gave."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, given))
        return given

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, before in self.done:
            if operation.is_view:
                continue
            now = operation(*args, **kwargs)
            for place, value in zip(tensors(before), tensors(now), strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def tensors(given):
    if isinstance(given, torch.Tensor):
        return [given]
    return [t for each in given for t in tensors(each)] if isinstance(given, (list, tuple)) else []


def on_tape(step):
    step()
    with Tape() as tape:
        step()
    return tape.replay


class Tapes:
    """A network's forward and backward pass, each on a tape, on weights at one place and batches of
    one shape."""

    ran = 0  # times, of all of them

    def __init__(self, call, samples, pool):
        x, *weights = samples
        self.x = x.clone()
        with Tape() as self.ahead:
            self.y = call(self.x, *weights)
        self.dy = torch.zeros_like(self.y)
        with Tape() as self.back:
            self.gradients = torch.autograd.grad(self.y, weights, self.dy)

    def __call__(self, x, *weights):
        return Replayed.apply(self, x, *weights)


class Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tapes, x, *weights):
        ctx.tapes = tapes
        tapes.x.copy_(x)
        tapes.ahead.replay()
        Tapes.ran += 1
        return tapes.y.detach().clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.tapes.dy.copy_(dy)
        ctx.tapes.back.replay()
        return None, None, *(g.clone() for g in ctx.tapes.gradients)


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
    """Of the batch that it was recorded with."""
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
    assert ("capturing" if faulty == "raises" else "what a replay learns") in why
    assert "\n" not in why


@pytest.mark.skipif(native.library() is None, reason=f"no kernels: {native.why_not()}")
def test_kernels_that_cannot_be_replayed_leave_pytorchs_to_be(recorder, tmp_path):
    """The tape does not see what C does: a replay of it learns something else."""
    told: list[str] = []
    small = SMALL | {"kernels": "auto"}
    ours = trained_as(tmp_path / "replayed", told.append, **small, graphs=True)
    assert [line for line in told if line.startswith(OWN.format(""))] and SAYS in told
    assert same(ours, trained_as(tmp_path / "called", **SMALL))


def test_what_is_compared_is_the_gradient_whatever_the_momentum():
    """That of a run that continues is many gradients; a wrong one would be lost in it."""
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
