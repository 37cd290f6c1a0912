"""The training recipe of the paper's appendix, and other schedules."""

import csv

import pytest
import torch
from conftest import SMALL

from resnetv2_cli.config import Experiment
from resnetv2_cli.optim import lr_factor, sgd
from resnetv2_cli.paper import TABLE_5
from resnetv2_cli.resnet import ResNet


@pytest.mark.parametrize(
    "step, lr",
    [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01),
     (48_000, 0.001), (63_999, 0.001)],
)  # fmt: skip
def test_the_schedule_of_the_appendix(step, lr):
    experiment = Experiment()
    assert experiment.lr * lr_factor(experiment, step) == pytest.approx(lr)


def test_the_defaults_are_the_appendixs():
    e = Experiment()
    assert (e.batch_size, e.lr, e.momentum, e.weight_decay, e.steps) == (
        128,
        0.1,
        0.9,
        1e-4,
        64_000,
    )
    assert (e.nesterov, e.warmup_, e.val, e.normalize) == (False, 400, 0, "pixel-mean")


def test_a_shorter_run_scales_the_schedule_with_it():
    e = Experiment(steps=640)
    applied = [round(e.lr * lr_factor(e, step), 9) for step in range(640)]
    assert applied == [0.01] * 4 + [0.1] * 316 + [0.01] * 160 + [0.001] * 160
    assert Experiment(steps=640, warmup=7).warmup_ == 7


def test_drops_where_the_paper_has_them_on_imagenet():
    """After epochs 30 and 60 of 90, each of 5,005 iterations of 256 images."""
    e = Experiment(steps=90 * 5005, warmup=0, drops=TABLE_5.base["drops"])
    first, second = 30 * 5005, 60 * 5005
    steps = (0, first - 1, first, second - 1, second, 90 * 5005 - 1)
    applied = [round(e.lr * lr_factor(e, step), 9) for step in steps]
    assert applied == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]


@pytest.mark.parametrize("name, first", [("cosine", 1 / 100), ("one-cycle", 1 / 25 + 0.96 / 100)])
def test_other_schedules_rise_to_the_peak_and_end_near_zero(name, first):
    e = Experiment(schedule=name, steps=1000, warmup=100)
    factors = [lr_factor(e, step) for step in range(1000)]
    assert factors[0] == pytest.approx(first)
    assert max(factors) == pytest.approx(1) and factors.index(max(factors)) in (99, 100)
    assert factors[:100] == sorted(factors[:100])
    assert factors[100:] == sorted(factors[100:], reverse=True)
    assert 0 <= factors[-1] < 1e-3


def test_one_cycle_rises_for_30_percent_unless_it_is_given():
    assert Experiment(schedule="one-cycle", steps=1000).warmup_ == 300
    assert Experiment(schedule="one-cycle", steps=1000, warmup=7).warmup_ == 7


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_update_is_pytorchs_form_of_momentum_with_decay(nesterov):
    """v <- 0.9 v + (g + 1e-4 w), w <- w - lr v, on every parameter; Nesterov's looks ahead."""
    net = ResNet(8)
    optimizer = sgd(net, Experiment(nesterov=nesterov))
    w = [p.detach().clone() for p in net.parameters()]
    v = [torch.zeros_like(p) for p in w]
    for _ in range(3):
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn_like(p)
            g = p.grad + 1e-4 * w[i]
            v[i] = 0.9 * v[i] + g
            w[i] = w[i] - 0.1 * (g + 0.9 * v[i] if nesterov else v[i])
        optimizer.step()
    torch.testing.assert_close(list(net.parameters()), w, rtol=1e-5, atol=1e-6)


def test_decay_of_weights_alone_spares_bn_and_biases():
    net = ResNet(8)
    optimizer = sgd(net, Experiment(decay="weights"))
    by_decay = {g["weight_decay"]: g["params"] for g in optimizer.param_groups}
    assert all(p.ndim > 1 for p in by_decay[1e-4]) and all(p.ndim == 1 for p in by_decay[0.0])
    assert sum(map(len, by_decay.values())) == len(list(net.parameters()))


@pytest.fixture(scope="module")
def applied(resnetv2, tmp_path_factory) -> list[tuple[int, float]]:
    """The lr that a run reports at each of its steps."""
    folder = tmp_path_factory.mktemp("lr") / "run"
    flags = [*SMALL, "--log-every", 1, "--steps", 40, "--warmup", 3, "--eval-every", 9]
    resnetv2("train", *flags, "--output", folder)
    with (folder / "metrics.csv").open() as file:
        return [(int(r["step"]), float(r["lr"])) for r in csv.DictReader(file) if r["lr"]]


def test_the_lr_that_a_run_applied_at_each_step(applied):
    expected = [0.01] * 3 + [0.1] * 17 + [0.01] * 10 + [0.001] * 10
    assert applied == [(step + 1, lr) for step, lr in enumerate(expected)]


def test_the_lr_is_the_one_the_optimizer_used():
    """With a gradient of 1 and no momentum, a weight moves by the lr of that step."""
    from resnetv2_cli.optim import schedule

    experiment = Experiment(steps=40, warmup=3, momentum=0, weight_decay=0)
    net = ResNet(8)
    optimizer = sgd(net, experiment)
    scheduler = schedule(optimizer, experiment)
    moved = []
    for _ in range(40):
        before = net.head.fc.bias.detach().clone()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        moved.append(round((before - net.head.fc.bias).mean().item(), 5))
    assert moved == [0.01] * 3 + [0.1] * 17 + [0.01] * 10 + [0.001] * 10
