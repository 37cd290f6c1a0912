"""Modified networks: smaller weights, paths of one length, units deleted."""

import pytest
import torch
from networks import batch, cells, measured, network, traced
from torch import nn

from resnetv2_cli.analysis import backward, draw, lesion, paths, shrink
from resnetv2_cli.analysis.trace import trace
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet

# "the gradient of a layer does not vanish even when the weights are arbitrarily small"


def test_the_gradient_survives_weights_that_are_arbitrarily_small():
    changes = measured(shrink, network(38))["change"]
    first = [stage[0] for stage in changes]
    assert first[0] > 1 and first[3] < 1e-2
    assert first[2] / first[3] == pytest.approx(100, rel=0.2)  # in proportion to F


def test_trap_every_factor_has_the_same_masks(monkeypatch):
    """Otherwise luck would decide the table of factors."""
    monkeypatch.setattr(shrink, "FACTORS", (0.1, 0.1))
    first, second = measured(shrink, network(shortcut="dropout"))["change"]
    assert first == second


@pytest.mark.parametrize("unit", UNITS)
def test_trap_bn_behind_a_convolution_takes_its_scale_away(unit):
    """Every F is scaled exactly, whatever it ends in; scaling just its convolution would not do."""
    net = network(unit=unit)
    unit_of = lambda n: n.body.stage1.unit2  # noqa: E731
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    before = unit_of(net).residual(x)
    after = unit_of(shrink.shrunk(net, 1e-4)).residual(x)
    torch.testing.assert_close(after, 1e-4 * before, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(unit_of(net).residual(x), before)  # a copy was shrunk


def test_trap_shrinking_the_convolution_alone_changes_nothing_before_bn():
    unit = network(unit="original").body.stage1.unit2
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    before = unit.residual(x)
    with torch.no_grad():
        unit.residual.conv2.weight.mul_(0.1)
    with torch.no_grad():
        assert (unit.residual(x) - before).norm() < 1e-2 * before.norm()


# Paths.


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shortcut", ["identity", "exclusive-gate", "conv1x1", "dropout"])
def test_the_paths_of_all_lengths_are_the_whole_gradient(unit, shortcut):
    found = measured(paths, network(unit=unit, shortcut=shortcut))
    assert len(found["share"]) == found["units"] + 1 == 7
    assert sum(found["share"]) == pytest.approx(1, abs=1e-12)
    assert abs(found["rest"]) < 1e-12 and found["rest_norm"] < 1e-12


def test_paths_by_hand():
    """Scaling F by t scales the paths through k of them by t^k: a polynomial in t."""
    net = network(shortcut="constant-scale", settings={"shortcut_scale": 0.9}).eval()
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
    made = trace(net, *batch(1))
    units = made.units[:2]  # of one stage
    at_end = torch.randn_like(units[-1].out)
    terms = paths.by_length(units, at_end, 2)
    jacobian = lambda u: torch.autograd.functional.jacobian(u.module.residual, u.x.detach())  # noqa: E731
    n = x.numel()
    first, second = (jacobian(u).reshape(n, n) for u in units)
    g = at_end.reshape(n)
    expected = [0.81 * g, 0.9 * (g @ second) + 0.9 * (g @ first), g @ second @ first]
    for term, by_hand in zip(terms, expected, strict=True):
        torch.testing.assert_close(term.reshape(n), by_hand, rtol=1e-10, atol=1e-12)


def test_longer_paths_are_one_remainder():
    made = traced(20)
    _, at_out = backward.gradients(made)
    every = paths.by_length(made.units, at_out[made.units[-1]], 9)
    some = paths.by_length(made.units, at_out[made.units[-1]], 3)
    assert len(every) == 10 and len(some) == 4
    torch.testing.assert_close(some, every[:4], rtol=0, atol=0)


def test_the_line_of_paths_adds_up_what_each_length_has():
    [said] = cells(paths, {"units": 54, "share": [0.03] * 25, "rest": 0.25})
    lengths = {"0": "3.0", "1-3": "9.0", "4-6": "9.0", "7-12": "18.0", "13-24": "36.0"}
    assert said.items() >= (lengths | {"more": "25.0", "half within": "16"}).items()


# Lesions.


def test_a_deleted_unit_has_no_f():
    for unit, shortcut in [("original", "identity"), ("full-preact", "exclusive-gate")]:
        net = network(unit=unit, shortcut=shortcut).eval()
        for u in trace(net, *batch()).units:
            torch.testing.assert_close(lesion.Deleted(u.module)(u.x), u.module.after(u.h))


def test_lesions_are_what_a_network_without_these_units_says():
    """The error of each changed network, computed from the images, not from stored unit inputs."""
    net = network(20).eval().float()
    x, labels = torch.randn(60, 3, 8, 8), torch.arange(60) % 10
    units = net.units
    lesions = [
        lesion.Lesion(0, units),
        lesion.deleted(units, 4),
        lesion.deleted(units, 2, 7),
        lesion.swapped(units, 1, 2),
    ]
    found = lesion.errors(net, x, labels, lesions)
    without = [lesion.Deleted(u) for u in units]
    orders = [
        units,
        [*units[:4], without[4], *units[5:]],
        [*units[:2], without[2], *units[3:7], without[7], units[8]],
        [units[0], units[2], units[1], *units[3:]],
    ]
    for error, order in zip(found, orders, strict=True):
        with torch.no_grad():
            wrong = net.head(nn.Sequential(*order)(net.stem(x))).argmax(1) != labels
        assert error == pytest.approx(100 * wrong.double().mean().item())
    assert len(set(found)) > 1


def test_pairs_are_all_or_a_sample():
    assert len(lesion.some_pairs(9, 100)) == 36
    some = lesion.some_pairs(54, 100)
    assert len(set(some)) == 100 and all(0 <= i < j < 54 for i, j in some)
    assert some == lesion.some_pairs(54, 100)


def test_each_error_stands_with_the_units_that_it_is_without(monkeypatch):
    """The digits of a fake error say which units were changed; its sign says how."""

    def errors(net, x, labels, lesions):
        assert not net.training
        return [told(list(net.units), *of) for of in lesions]

    def told(units, start, changed):
        pairs = zip(units[start:], changed, strict=True)
        places = [i for i, (a, b) in enumerate(pairs, start + 1) if a is not b]
        gone = any(isinstance(unit, lesion.Deleted) for unit in changed)
        return int("".join(map(str, places)) or "0") * (1 if gone else -1)

    monkeypatch.setattr(lesion, "errors", errors)
    found = measured(lesion, network(20))
    assert found["whole"] == 0 and found["single"] == list(range(1, 10))
    assert found["pairs"] == [[i, j, 10 * i + j] for i in range(1, 10) for j in range(i + 1, 10)]
    assert found["swaps"] == [[i, i + 1, -(11 * i + 1)] for i in (1, 2, 5, 8)]


def test_the_line_of_a_stage_is_of_lesions_that_begin_in_it():
    made = measured(lesion, network()) | {
        "single": [20.0, 40.0, 30.0, 35.0, 25.0, 45.0],
        "pairs": [[1, 2, 50.0], [1, 3, 70.0], [2, 5, 63.0], [4, 5, 80.0]],
        "swaps": [[1, 2, 22.0]],
    }  # two units in each stage
    columns = ("without one", "without two", "two swapped")
    said = [[row[column] for column in columns] for row in cells(lesion, made)]
    assert said == [  # median, maximum (units)
        ["30.0, 40.0 (2)", "63.0, 70.0 (1-3)", "22.0, 22.0 (1-2)"],
        ["32.5, 35.0 (4)", "80.0, 80.0 (4-5)", "—"],
        ["35.0, 45.0 (6)", "—", "—"],
    ]


def test_what_no_network_has_is_not_drawn(monkeypatch, tmp_path):
    """No panel for swaps if no neighbors keep their shape; and no ticks between two units."""
    drawn = []
    monkeypatch.setattr(draw, "save", lambda figure, to: drawn.append(figure.axes))
    for depth in (8, 14):
        lesion.draw({"net": measured(lesion, network(depth))}, tmp_path)
    assert [len(axes) for axes in drawn] == [2, 3]
    assert all(tick % 1 == 0 for axes in drawn for tick in axes[-1].get_xticks())
    draw.plt.close("all")


def test_110_layers_of_small_weights():
    """A factor of 1e-4 changed the gradient by 4.8e-4 in a network of the first stage's 18 units
    alone. In later stages BN takes small scales away where zeros were padded."""
    net = shrink.shrunk(ResNet(110).double().train(), 1e-4)
    assert shrink.change(trace(net, *batch(4)))[0] < 1e-2
