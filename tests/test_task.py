"""What the LightningModule measures, saves and draws."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from iterations import batch, task
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from resnetv2_cli.data import images
from resnetv2_cli.data.module import Batch, EpochMaker, Parts, Sequence, Stream
from resnetv2_cli.data.order import Schedule
from resnetv2_cli.iteration import Iteration
from resnetv2_cli.nonfinite import began, prepare
from resnetv2_cli.optim import sgd
from resnetv2_cli.task import Scores


def test_scores_of_uneven_batches_count_every_image_once():
    """Three batches of 4, 4 and 1: a mean of batch means would say 33.33 % here."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((9, 7)))
    labels = logits.argmax(1).clone()
    labels[8] = (labels[8] + 1) % 7
    scores = Scores(7)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 9)):
        scores.update(logits[rows], labels[rows])
    found = scores.compute()
    assert found["error"] == pytest.approx(100 / 9)
    assert found["images"] == 9
    log_p = logits.float().log_softmax(1)
    assert found["loss"] == pytest.approx(-log_p[range(9), labels].mean().item(), rel=1e-6)
    assert found["confusion"][labels[8]][int(logits[8].argmax())] == 1
    assert sum(map(sum, found["confusion"])) == 9


def test_top5_error():
    logits = torch.arange(7.0).repeat(7, 1)  # best are 6, 5, 4, 3, 2
    scores = Scores(7)
    scores.update(logits, torch.arange(7))
    assert scores.compute()["top5_error"] == pytest.approx(100 * 2 / 7)
    assert scores.compute()["error"] == pytest.approx(100 * 6 / 7)


def test_logits_that_are_not_finite_guess_nothing():
    """With a NaN among them, the largest logit is NaN; of NaNs alone, argmax is the first class."""
    logits = torch.eye(7)
    logits[0], logits[1, 6], logits[2, 2] = torch.nan, torch.nan, torch.inf
    scores = Scores(7)
    scores.update(logits, torch.arange(7))
    found = scores.compute()
    assert found["error"] == pytest.approx(100 * 3 / 7) and found["images"] == 7
    assert found["top5_error"] >= found["error"] and found["not_finite"] == 3
    assert found["class_errors"] == [100, 100, 100, 0, 0, 0, 0]
    assert sum(map(sum, found["confusion"])) == 4


def test_training_error_and_loss_are_summed_over_images():
    t = task()
    t.training_step(batch(16), 0)
    t.training_step(batch(8), 1)
    loss, wrong, images = t.sums.tolist()
    assert images == 24 and 0 <= wrong <= 24
    assert loss / images == pytest.approx(2.3, abs=1.0)


def test_a_parts_weight_scales_its_loss():
    t = task()
    whole, half = t.training_step(batch(), 0), t.training_step(batch(weight=0.5), 0)
    assert half.item() == pytest.approx(0.5 * whole.item(), rel=1e-4)


def test_labels_are_smoothed():
    t, given = task(label_smoothing=0.2), batch()
    expected = F.cross_entropy(t(given.images), given.labels, label_smoothing=0.2)
    assert t.training_step(given, 0).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_step_draws_what_its_seed_gives():
    t = task(seed=3)
    t.draw(5, 1)
    drawn = torch.rand(4)
    torch.manual_seed(hash((3, 5, 1, 0)) % 2**63)
    assert torch.equal(drawn, torch.rand(4))


def test_it_learns_one_batch():
    t, b = task(lr=0.05, unit="full-preact"), batch()
    optimizer = sgd(t.net, t.experiment)
    losses = []
    for _ in range(25):
        loss = t.training_step(b, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_weights_follow_from_the_seed():
    a, b, c = task(seed=1), task(seed=1), task(seed=2)
    torch.testing.assert_close(a.net.state_dict(), b.net.state_dict(), rtol=0, atol=0)
    assert not torch.equal(a.net.stem.conv.weight, c.net.stem.conv.weight)


def test_the_network_is_laid_out_channels_last():
    weight = task().net.body.stage2.unit1.residual.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpoint_keys_are_sentences():
    keys = task().state_dict()
    assert "net.body.stage2.unit1.residual.conv1.weight" in keys
    assert "normalize.mean" in keys


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_no_part_of_a_training_step_waits_for_the_device(non_finite):
    """A meta tensor has no values to wait for: reading one raises."""
    t = task(shortcut="stochastic-depth", non_finite=non_finite).to("meta").train()
    t.sums, t.finite = t.sums.to("meta"), t.finite.to("meta")
    t.guard.to(torch.device("meta"))
    optimizer, pixels = sgd(t.net, t.experiment), batch()
    for step in range(2):
        t.guard.begin()
        t.finite.fill_(True)
        on_device = Batch(*(each.to("meta") for each in pixels[:3]), 0.5)
        t.training_step(on_device, step).backward()
        t.guard.look(step, optimizer, t.finite)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError):
        t.guard.read()


def test_who_looks_for_what_is_not_finite_has_the_modules_run():
    """A replay of CUDA graphs runs no modules, so hooks would see nothing."""
    t, given = task(), batch()
    t.replays[torch.Size((16, 3, 32, 32))] = lambda x: pytest.fail("it was replayed")
    first, places = began(t, 0, [given], nullcontext)
    assert first is None and len(places) == 2 * (1 + 3 + 1)


GPU = torch.device("cuda", 0)  # of fake tensors: with a device and a shape, without values


def brought(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put a module on a GPU that does not exist, which ``Module.to`` cannot do."""
    for part in module.modules():
        for name, tensor in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(mode.from_tensor(tensor.detach()).to(GPU))
        for name, tensor in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(tensor).to(GPU)


@pytest.mark.parametrize(
    "given",
    [
        {"non_finite": "skip"},
        {"recompute_bn": True},
        {"recompute": 2},
        {"shortcut": "exclusive-gate"},
        {"shortcut": "dropout", "unit": "original"},
        {"shortcut": "stochastic-depth", "label_smoothing": 0.1},
    ],
)
def test_on_a_gpu_all_that_meets_lies_there(given):
    """Batches, forward pass, the check of gradients, and evaluation: mixing devices raises, and so
    does reading a value. Backward would need a real GPU."""
    t, drawn = task(**given).train(), EpochMaker(70, seed=0, flip=True, augment=True)
    split = images.Split(np.zeros((70, 32, 32, 3), np.uint8), np.zeros(70, np.int64))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        brought(t, mode)
        t.sums, t.finite = t.sums.to(GPU), t.finite.to(GPU)
        t.guard.to(GPU)
        optimizer = sgd(t.net, t.experiment)
        for step, batch in enumerate(Stream(split, Parts(Schedule(70, 16), 0, 6), drawn, GPU)):
            t.draw(step, 0)
            t.guard.begin()
            assert t.training_step(batch, step).device == GPU
            for p in t.net.parameters():
                p.grad = torch.empty_like(p)
            t.guard.look(step, optimizer, t.finite)
        assert optimizer.found_inf.device == t.sums.device == t.guard.found.device == GPU
        iteration = Iteration(t, optimizer, batch)
        iteration.replay = lambda: None
        assert iteration.fits(batch) and iteration(batch, step).device == GPU
        prepare(optimizer)
        assert {tensor.device for tensor in iteration.state()} == {GPU}
        whole = images.Split(np.zeros((2010, 32, 32, 3), np.uint8), np.zeros(2010, np.int64))
        tested = list(Sequence(whole, range(2010), GPU))
        assert [len(each.labels) for each in tested] == [1000, 1000, 10]
        assert t.eval().look(tested[-1].images).device == GPU
        with pytest.raises(RuntimeError, match="device"):
            t.training_step(Batch(*(each.cpu() for each in batch[:3])), step)
