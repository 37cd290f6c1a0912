"""Signals and gradients against the paper's equations: by hand, by autograd, and at 110 layers."""

from itertools import pairwise

import pytest
import torch
from networks import BROKEN, EXACT, batch, cells, looked_at, measured, network, traced, worst
from torch import nn

from resnetv2_cli.analysis import backward, forward, paths, shrink
from resnetv2_cli.analysis.subject import Subject
from resnetv2_cli.analysis.trace import Trace, size, trace
from resnetv2_cli.errors import UserError
from resnetv2_cli.jsonfile import finite
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS

# What a trace keeps of a unit.


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_what_is_kept_of_a_unit_is_what_eqns_1_and_2_say(unit, shortcut):
    for u in traced(unit=unit, shortcut=shortcut).units:
        torch.testing.assert_close(u.y, u.h + u.added, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(u.out, u.module.after(u.y), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(u.split, u.module.shared(u.x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(u.residual, u.module.residual(u.split), rtol=1e-12, atol=1e-12)


def test_units_follow_one_another():
    units = traced(20).units
    assert [u.name for u in units][:4] == [
        "stage1.unit1", "stage1.unit2", "stage1.unit3", "stage2.unit1"
    ]  # fmt: skip
    assert all(b.x is a.out for a, b in pairwise(units))


def test_spans_leave_out_units_that_change_the_shape():
    """Footnote 1: two of them in CIFAR networks of the basic block, three of bottlenecks."""
    assert [len(span) for span in traced(20).spans] == [3, 2, 2]
    assert [len(span) for span in traced(29, block="bottleneck").spans] == [2, 2, 2]


def test_tracing_leaves_the_network_as_it_was():
    net = network(shortcut="conv1x1", unit="original")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, labels = batch()
    drawn = torch.get_rng_state()
    trace(net, x, labels)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), drawn)  # nothing random in this network


# Trap: layers in place.


@pytest.mark.parametrize("unit", UNITS)
def test_no_layer_rewrites_what_is_kept(unit):
    """ReLU works in place after BN: x_l, F and y_l are copied when computed, and compared later."""
    net, copies = network(unit=unit), []
    for u in net.units:
        u.register_forward_pre_hook(lambda m, args: copies.append(args[0].clone()))
        u.shortcut.register_forward_pre_hook(lambda m, args: copies.append(args[1].clone()))
        u.shortcut.register_forward_hook(lambda m, args, y: copies.append(y.clone()))
    kept = trace(net, *batch()).units
    # h is computed separately, with F = 0, without the shortcut's hooks.
    for u, (x, residual, y) in zip(kept, zip(*[iter(copies)] * 3, strict=True), strict=True):
        assert torch.equal(u.x, x) and torch.equal(u.residual, residual) and torch.equal(u.y, y)


def test_trap_relu_in_place_where_the_paths_split():
    net = network(unit="relu-only-preact")
    net.body.stage1.unit2.residual.act1.relu.inplace = True
    with pytest.raises(UserError, match="stage1.unit2 rewrites its x_l in place"):
        trace(net, *batch())


class AddsInPlace(nn.Module):
    carry = nn.Identity()

    def join(self, x, branch, after):
        return after(self(x, branch(x)))

    def forward(self, x, residual):
        return residual.add_(x)


def test_trap_an_addition_in_place():
    net = network()
    net.body.stage1.unit1.shortcut = AddsInPlace()
    with pytest.raises(UserError, match=r"stage1.unit1 rewrites its F\(x_l\) in place"):
        trace(net, *batch())


# Eq. 4.


@pytest.mark.parametrize("block", ["single", "basic", "bottleneck"])
@pytest.mark.parametrize("unit", EXACT)
def test_eqn_4_holds_where_f_and_h_are_identities(unit, block):
    depth = {"single": 11, "basic": 20, "bottleneck": 29}[block]
    assert worst(measured(forward, network(depth, unit=unit, block=block))["off"]) < 1e-14


@pytest.mark.parametrize("unit", BROKEN)
def test_eqn_4_breaks_where_f_is_none(unit):
    assert worst(measured(forward, network(20, unit=unit))["off"]) > 0.1


CLEAN = ["identity", "rezero", "stochastic-depth"]  # h is the identity, F has a factor or none


@pytest.mark.parametrize("shortcut", CLEAN)
def test_eqn_4_holds_where_f_is_multiplied_and_h_is_the_identity(shortcut):
    net = network(20, shortcut=shortcut)
    for unit in net.units:
        if shortcut == "rezero":
            nn.init.constant_(unit.shortcut.a, 0.3)
    assert worst(measured(forward, net)["off"]) < 1e-14


@pytest.mark.parametrize("shortcut", sorted(set(SHORTCUTS) - set(CLEAN)))
def test_eqn_4_breaks_where_h_is_none(shortcut):
    settings = {"gate_bias": 0.0} if "gate" in shortcut else {}
    net = network(20, shortcut=shortcut, settings=settings)
    assert worst(measured(forward, net)["off"]) > 0.1


def test_eqn_4_is_computed_from_f_and_not_from_the_sum():
    """With a wrong F in one unit, the equation is off by its error at every l from there down."""
    made = traced(20)
    [first, *_] = made.spans
    wrong = torch.randn_like(first[1].added)
    first[1].added = first[1].added + wrong
    off = forward.additive_residuals(first)
    expected = float(wrong.norm() / first[-1].out.detach().norm())
    assert off[:2] == pytest.approx([expected] * 2, rel=1e-9) and off[2] < 1e-14


def test_forward_by_hand():
    """Norms of x and of F, averaged over images, and signs, for a unit with known tensors."""
    made = traced()
    unit = made.units[0]
    unit.x, unit.residual = torch.tensor([[3.0, 4.0], [0, 1]]), torch.tensor([[2.0, 0], [0, 0]])
    unit.y = torch.tensor([-1.0, 0, 2, 3])
    found = forward.measure(looked_at(network()), Trace([unit, *made.units[1:]], made.loss))
    assert found["x"][0] == 3 and found["residual"][0] == 1 and found["negative"][0] == 0.25


# Eqs. 5 and 8.


@pytest.mark.parametrize("unit", EXACT)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_eqns_5_and_8_the_terms_add_up_where_f_is_the_identity(unit, shortcut):
    settings = {"gate_bias": 0.0} if "gate" in shortcut else {}
    net = network(20, unit=unit, shortcut=shortcut, settings=settings)
    assert worst(measured(backward, net)["off"]) < 1e-13


@pytest.mark.parametrize("unit", BROKEN)
def test_eqn_5_is_off_where_f_is_none(unit):
    assert worst(measured(backward, network(20, unit=unit))["off"]) > 0.1


def first_stage(*depth, **settings):
    """Its units, the gradient at its end, and both terms of the gradient at its start."""
    made = traced(*depth, **settings)
    span = made.spans[0]
    at_end = backward.gradients(made)[1][span[-1]]
    (direct, weights), *_ = backward.split(span, at_end)
    return span, at_end, direct, weights


@pytest.mark.parametrize("unit", EXACT)
def test_eqn_5_one_vjp_of_the_sum_of_residuals(unit):
    """The term through the weights, from the stage alone, with the sum as the paper writes it."""
    span, at_end, direct, weights = first_stage(20, unit=unit)
    x = start = span[0].x.detach().requires_grad_()
    residuals = []
    for u in span:
        residuals.append(u.module.residual(u.module.shared(x)))
        x = u.module(x)
    [expected] = torch.autograd.grad(sum(residuals), start, at_end, retain_graph=True)
    torch.testing.assert_close(weights, expected, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(direct, at_end, rtol=0, atol=0)  # the 1 of Eq. 5
    [total] = torch.autograd.grad(x, start, at_end)
    torch.testing.assert_close(direct + weights, total, rtol=1e-11, atol=1e-15)


def test_eqn_8_one_vjp_of_the_sum_of_scaled_residuals():
    a = 0.7
    span, at_end, direct, weights = first_stage(
        20, shortcut="constant-scale", settings={"shortcut_scale": a}
    )
    x = start = span[0].x.detach().requires_grad_()
    scaled = []
    for i, u in enumerate(span):
        scaled.append(a ** (len(span) - 1 - i) * u.module.residual(x))  # F-hat of Eq. 7
        x = u.module(x)
    torch.testing.assert_close(x, a**3 * start + sum(scaled), rtol=1e-12, atol=1e-12)  # Eq. 7
    [expected] = torch.autograd.grad(sum(scaled), start, at_end)
    torch.testing.assert_close(weights, expected, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(direct, a**3 * at_end, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("a", [1.1, 0.5, 0.0])
def test_eqn_8_the_direct_term_is_the_product_of_scales(a):
    net = network(20, shortcut="constant-scale", settings={"shortcut_scale": a})
    found = measured(backward, net)
    assert found["scale"] == pytest.approx([a] + [a or 0.0] * 8, rel=1e-12)
    assert found["product"] == pytest.approx([a**n for n in range(9, 0, -1)], rel=1e-12)


def test_the_product_in_the_line_of_a_stage_is_that_down_to_its_first_unit():
    net = network(shortcut="constant-scale", settings={"shortcut_scale": 0.5})
    said = [float(row["scales"]) for row in cells(backward, measured(backward, net))]
    assert said == pytest.approx([0.5**6, 0.5**4, 0.5**2], rel=0.01)  # two units in each stage


def test_the_line_of_a_stage_has_its_first_unit_and_its_last():
    """Terms are those of its first unit that keeps the shape. Numbers differ, to show mix-ups."""
    ahead = {"x": [2.0, 3.0, 4.0], "residual": [1.0, 9.0, 8.0], "negative": [0.1, 0.2, 0.3]}
    [said] = cells(forward, ahead | {"stage": [1] * 3, "off": [None, 0.01, 0.5]})
    ends = {"|x_l|": "2 - 4", "|F_l|/|x_l|": "0.5 - 2", "y_l < 0": "0.1 - 0.3"}
    assert said == {"stage": "1", "Eq. 4 off by": "0.5"} | ends
    back = {"gradient": [8.0, 7.0, 6.0], "product": [0.125, 0.25, 0.5], "off": [None, 0.01, 0.02]}
    back |= {"direct": [None, 3.0, 2.0], "weights": [None, 5.0, 4.0]}
    gates = [[0.2, 0.1, 0.3], [0.5, 0.4, 0.6], [0.8, 0.7, 0.9]]
    [said] = cells(backward, back | {"stage": [1] * 3, "gate": gates, "limits": {}})
    terms = {"direct": "3", "weights": "5", "off by": "0.02", "scales": "0.125"}
    assert said == {"stage": "1", "|dL/dx_l|": "8 - 6", "g": "0.2 - 0.8"} | terms


def test_where_products_leave_a_format_is_said_of_each():
    limits = backward.limits([0.5**n for n in range(1, 128)])
    assert backward.notes({"net": {"limits": limits}}) == [
        "net: the product of shortcut scales " + said
        for said in (
            "is below the normal numbers of float32 after 127 units, bfloat16 after 127, "
            "float16 after 15",
            "no longer changes a float32 gradient of size 1 after 24 units, bfloat16 after 8, "
            "float16 after 11",
        )
    ]


def test_trap_the_derivative_of_a_gated_shortcut():
    """h' = diag(1-g) - diag(x) dg/dx, not diag(1-g) alone; written out by hand."""
    made = traced(shortcut="exclusive-gate", settings={"gate_bias": 0.0})
    u = made.units[0]
    cotangent = torch.randn_like(u.out)
    [_, direct] = backward.direct_terms([u], cotangent)
    g, weight = u.gate, u.module.shortcut.gate.weight[:, :, 0, 0]
    own = torch.einsum("nohw,oi->nihw", cotangent * u.x * g * (1 - g), weight)
    torch.testing.assert_close(direct, (1 - g) * cotangent - own, rtol=1e-11, atol=1e-12)
    assert float((direct - (1 - g) * cotangent).norm() / direct.norm()) > 0.01


def test_trap_dropout_draws_one_mask_for_y_and_for_h():
    for u in traced(shortcut="dropout").units:
        kept = u.h != 0
        assert torch.equal(u.h[kept], 2 * u.module.shortcut.carry(u.x)[kept])
        torch.testing.assert_close(u.y - u.residual, u.h, rtol=1e-12, atol=1e-12)
        assert 0.2 < kept.double().mean() < 0.8


def test_trap_bn_couples_the_images_of_a_batch():
    """In training, a part of an image's gradient comes through the statistics of the batch, so the
    terms are of the whole batch. With running statistics there is no such part."""
    for training in (True, False):
        net = network(20).train(training)
        x, labels = batch(4)
        whole = trace(net, x, labels)
        at_x, _ = backward.gradients(whole)
        by_itself = trace(net, x[:1], labels[:1])
        alone, _ = backward.gradients(by_itself)
        in_batch = at_x[whole.units[0]][:1]
        own = alone[by_itself.units[0]] / 4  # the loss is the mean over 4 images
        assert torch.allclose(in_batch, own, rtol=1e-9, atol=1e-14) != training
        found = backward.measure(Subject(net, x, labels, x, labels), whole)
        assert worst(found["off"]) < 1e-13  # exact either way


def test_gates_are_measured_where_they_are():
    net = network(shortcut="shortcut-only-gate", settings={"gate_bias": -6.0}, unit="original")
    for unit in net.units:
        nn.init.zeros_(unit.shortcut.gate.weight)
    found = measured(backward, net)
    closed = 1 / (1 + 2.718281828459045**6)  # sigmoid(-6) = 0.00247
    assert found["gate"][3] == pytest.approx([closed] * 3)
    assert found["scale"] == pytest.approx([1 - closed] * 6)
    assert measured(backward, network())["gate"] == [None] * 6


def test_where_products_of_scales_leave_a_format():
    """2^-n is normal in float32 and bfloat16 up to n = 126, in float16 up to 14; they have 24, 8
    and 11 significant bits, and 1 + 2^-24 is rounded to even, which is 1."""
    found = backward.limits([0.5**n for n in range(1, 334)])
    assert found == {
        "float32": {"underflow": 127, "overflow": None, "lost": 24},
        "bfloat16": {"underflow": 127, "overflow": None, "lost": 8},
        "float16": {"underflow": 15, "overflow": None, "lost": 11},
    }
    assert backward.limits([2.0**n for n in range(1, 334)])["float32"]["overflow"] == 128
    assert backward.limits([1.0] * 333)["bfloat16"] == dict.fromkeys(
        ("underflow", "overflow", "lost")
    )
    for name, dtype in backward.TYPES.items():
        one, lost = torch.ones((), dtype=dtype), found[name]["lost"]
        assert one + 0.5**lost == one != one + 0.5 ** (lost - 1)


# Numbers that leave their format, and values that cannot be known.


@pytest.mark.parametrize("dtype, number", [(torch.float32, 1e-30), (torch.float64, 1e200)])
def test_norms_are_numbers_where_squares_are_none(dtype, number):
    x = torch.full((2, 4), number, dtype=dtype)
    assert size(x) == pytest.approx(8**0.5 * number)
    assert forward.each_image(x) == pytest.approx(2 * number)
    assert size(0 * x) == 0 and size(x / 0) == float("inf")


@pytest.mark.parametrize("topic", [forward, backward, shrink, paths])
def test_what_has_left_its_format_is_a_dash_and_a_gap(topic, tmp_path):
    net = network(shortcut="constant-scale", settings={"shortcut_scale": 1e80})  # x_l reaches 1e480
    found = measured(topic, net)
    for values in (found, finite(found)):  # as measured, and as read from analysis.json
        topic.draw({"net": values}, tmp_path / "picture.png")
    said = cells(topic, finite(found))
    assert any("—" in cell for cell in said[-1].values())
    assert not any(word in cell for row in said for cell in row.values() for word in ("nan", "inf"))
    if topic is forward:
        assert [said[-1][column][-1] for column in ("|x_l|", "|F_l|/|x_l|", "y_l < 0")] == ["—"] * 3


def test_of_a_gradient_that_is_0_no_scale_or_share_is_known(tmp_path):
    """With one class the loss is 0, whatever the network's output."""
    net, labels = network(classes=1), torch.zeros(4, dtype=torch.int64)
    x, _ = batch(4)
    one, made = Subject(net, x, labels, x, labels), trace(net, x, labels)
    back, by_length = (finite(topic.measure(one, made)) for topic in (backward, paths))
    assert set(back["gradient"]) == {0.0} and set(back["scale"] + back["product"]) == {None}
    assert backward.notes({"net": back}) == []
    assert set(by_length["share"]) == {None} and by_length["rest"] is None
    assert [row["scales"] for row in cells(backward, back)] == ["—"] * 3
    backward.draw({"net": back}, tmp_path / "picture.png")


# At 110 layers, as the issue asks.


def at_110(**of) -> tuple[dict, dict]:
    net = ResNet(110, **of).double().train()
    return measured(forward, net), measured(backward, net)


@pytest.mark.parametrize("unit", UNITS)
def test_110_layers(unit):
    ahead, back = at_110(unit=unit)
    for off in (worst(ahead["off"]), worst(back["off"])):
        assert off < 1e-9 if unit in EXACT else off > 0.1


def test_110_layers_of_constant_scaling():
    _, back = at_110(shortcut="constant-scale", settings={"shortcut_scale": 0.5})
    assert worst(back["off"]) < 1e-9
    assert back["product"] == pytest.approx([0.5**n for n in range(54, 0, -1)], rel=1e-9)
    ends = dict(zip(range(54), back["direct"], strict=True))
    assert ends[0] / ends[17] == pytest.approx(0.5**17, rel=1e-9)  # 18 units of the first stage
