"""A loss or a gradient that is not finite: where it began, and what becomes of the iteration."""

import json
import math
import os
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from trainings import At, same, trained_as

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.callbacks import refuse_diverged
from resnetv2_cli.errors import Diverged, Stopped, UserError
from resnetv2_cli.manifest import READINGS
from resnetv2_cli.nonfinite import Guard, finite, poisoned
from resnetv2_cli.resume import continued
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.shortcuts import Shortcut
from resnetv2_cli.verify import difference


class Late(torch.autograd.Function):
    """x, with a gradient of inf if ``bad``."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * float("inf") if ctx.bad else gradient), None


class BadBackward(Shortcut):
    """x + F(x), in the second unit at times with a gradient that is not finite."""

    def place(self, number, units):
        self.number = number

    def bad(self):
        return self.training and self.number == 2 and bool(torch.rand(()) < 0.2)

    def forward(self, x, residual):
        return Late.apply(self.carry(x) + residual, self.bad())


class BadForward(BadBackward):
    """x + F(x), at times inf in the second unit."""

    def forward(self, x, residual):
        y = self.carry(x) + residual
        return y * float("inf") if self.bad() else y


class AlwaysBad(BadForward):
    """x + F(x), always inf in the second unit."""

    def bad(self):
        return self.training and self.number == 2


@pytest.mark.parametrize("kind, what, way", [
    ("BadForward", "loss", "forward"), ("BadBackward", "gradient", "back"),
])  # fmt: skip
def test_the_unit_where_it_began_is_named(tmp_path, kind, what, way):
    with pytest.raises(Diverged) as caught:
        trained_as(tmp_path / "run", shortcut=f"test_nonfinite:{kind}", accumulate=2)
    error = caught.value
    assert error.where == f"stage2.unit1, on the way {way}"
    assert f"the {what} is not finite at iteration {error.iteration}: it began in" in str(error)
    said = json.loads((tmp_path / "run" / "failed.json").read_text())
    assert said["iteration"] == error.iteration and said["where"] == error.where
    with pytest.raises(UserError, match="diverged: the "):
        continued(RunFolder(tmp_path / "run"), {})


@pytest.mark.parametrize("val", [0, 100])
def test_it_is_traced_too_where_it_would_be_evaluated_and_saved(tmp_path, val):
    """The unit is traced from within an evaluation, which keeps no graph. The evaluation leaves
    neither an error nor a best checkpoint."""
    folder, of = RunFolder(tmp_path / "run"), {"log_every": 1000, "save_every": 0, "val": val}
    with pytest.raises(Diverged) as caught:
        trained_as(folder.path, shortcut="test_nonfinite:AlwaysBad", **of)
    assert caught.value.where == "stage2.unit1, on the way forward"
    assert not list(folder.checkpoints.iterdir()) and not read_metrics(folder.metrics)
    assert not folder.manifest.read().get(READINGS)


@pytest.mark.parametrize("kind", ["BadForward", "BadBackward"])
def test_skipped_iterations_leave_no_trace_and_are_exact_under_resuming(tmp_path, kind):
    settings = {"shortcut": f"test_nonfinite:{kind}", "non_finite": "skip", "save_every": 0}
    whole = trained_as(tmp_path / "whole", **settings)
    skipped = json.loads(whole.result.read_text())["skipped_iterations"]
    assert 0 < skipped < 12
    losses = [loss for _, loss in read_metrics(whole.metrics)["train_loss"]]
    assert len(losses) == 4 and all(map(math.isfinite, losses))  # of those not skipped
    state = checkpoints.read(whole.last)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    leave = At(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trained_as(tmp_path / "run", display=[leave], **settings)
    assert same(trained_as(tmp_path / "run", resume={}), whole)
    whole.result.unlink()  # as if it had been stopped after its last checkpoint
    trained_as(whole.path, resume={})
    assert json.loads(whole.result.read_text())["skipped_iterations"] == skipped


@pytest.mark.parametrize("number, good", [
    (0.0, True), (3.4e38, True), (float("nan"), False), (float("inf"), False),
    (-float("inf"), False),
])  # fmt: skip
def test_one_number_in_many_is_seen_and_none_is_changed(number, good):
    """3.4e38 is finite, although its square and its double are not."""
    tensors = [torch.randn(3, 4), torch.full((2, 5, 3, 3), 3.4e38), torch.randn(70_001)]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    tensors[2][70_000] = number
    before = [t.clone() for t in tensors]
    assert bool(finite(tensors)) == good
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


def test_where_nothing_is_finite_skipping_ends(tmp_path):
    with pytest.raises(Diverged, match="12 iterations in a row were not finite") as caught:
        shortcut = "test_nonfinite:AlwaysBad"
        trained_as(tmp_path / "run", shortcut=shortcut, non_finite="skip", save_every=0)
    assert caught.value.iteration == 1  # the first that was skipped


def test_the_guard_leaves_out_a_first_step_as_if_it_had_not_been():
    """Weights, momentum and BN's averages stay; the next step is that of a new optimizer."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard, x = Guard(net, stop=False, scaled=False), torch.randn(8, 3)

    def step(number: int, loss_is: float) -> None:
        guard.begin()
        sgd.zero_grad()
        loss = net(x).square().sum() * loss_is
        poisoned(loss, loss.detach().isfinite()).backward()
        guard.look(number, sgd, torch.tensor(True))
        sgd.step()

    step(0, float("nan"))
    assert not difference(net.state_dict(), start) and guard.read() == (1, 0, 1)
    step(1, 1.0)
    skipped = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(start)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    step(2, 1.0)
    assert not difference(net.state_dict(), skipped) and guard.read() == (1, 0, 0)


def test_a_guard_that_stops_keeps_the_weights_before_the_first_that_was_not_finite():
    """Later iterations are skipped too, although they are finite, until the guard is read."""
    net = nn.Linear(3, 4)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard, before = Guard(net, stop=True, scaled=False), net.weight.detach().clone()
    for number, loss_is in enumerate((math.nan, 1.0)):
        guard.begin()
        sgd.zero_grad()
        (net(torch.ones(2, 3)).sum() * loss_is).backward()
        guard.look(number, sgd, torch.tensor(True))
        sgd.step()
    assert torch.equal(net.weight, before) and guard.read() == (1, 0, 0)


@pytest.mark.parametrize("stop", [False, True])
def test_a_scaled_step_that_overflows_leaves_no_momentum_from_nowhere(stop):
    """float16's scaler has the fused step return at once, which would leave the momentum
    uninitialized. If the run is to stop, a gradient is made infinite, so that the scaler skips."""
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard = Guard(net, stop=stop, scaled=True)
    net(torch.ones(2, 4)).sum().backward()
    guard.begin()
    guard.look(0, optimizer, torch.zeros((), dtype=torch.bool))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    assert len(optimizer.state) == 2
    assert bool(net.weight.grad.isinf().all()) == stop and net.bias.grad.isfinite().all()


@pytest.mark.parametrize("scale, ends", [(2.0**16, False), (2.0**-20, False), (2.0**-25, True)])
def test_a_scale_of_nothing_ends_a_training(scale, ends):
    """float16's scaler skips overflows without a word, and would do so forever."""
    plugin = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=scale))
    trainer = SimpleNamespace(
        world_size=1, max_steps=1000, global_step=300, precision_plugin=plugin
    )
    task = SimpleNamespace(guard=Guard(nn.Linear(1, 1), stop=True, scaled=True))
    with pytest.raises(Diverged, match="at every loss scale") if ends else nullcontext():
        refuse_diverged(trainer, task)
