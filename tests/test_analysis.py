"""``analyze`` against the paper's equations: by hand, by autograd in float64, and at 110 layers."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from resnetv2_cli import source
from resnetv2_cli.analysis import backward, forward, lesion, paths, shrink, study, subject
from resnetv2_cli.analysis.subject import Batch, Subject
from resnetv2_cli.analysis.topics import TOPICS
from resnetv2_cli.analysis.trace import Trace, trace
from resnetv2_cli.cli import main
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS
from resnetv2_cli.source import Source

EXACT = ["relu-before-add", "relu-only-preact", "full-preact"]  # f is the identity: 4(c), (d), (e)
BROKEN = ["original", "bn-after-add"]
assert {*EXACT, *BROKEN} == set(UNITS)


def batch(n: int = 2, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3, size, size, dtype=torch.float64), torch.arange(n)


def network(depth: int = 14, **of) -> ResNet:
    """In float64 and training mode, with BN that is not the identity's."""
    net = ResNet(depth, **of).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.train()


def traced(depth: int = 14, **of) -> Trace:
    return trace(network(depth, **of), *batch())


def looked_at(net: ResNet) -> Subject:
    x, labels = batch(4)
    return Subject(net, x, labels, x.float(), labels)


def measured(topic, net: ResNet) -> dict:
    one = looked_at(net)
    return topic.measure(one, trace(net, one.x, one.labels))


def worst(values: list) -> float:
    return max(v for v in values if v is not None)


# What is kept of a unit.


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
    """ReLU works in place behind BN: x_l, F and y_l are copied as they come, and compared later."""
    net, copies = network(unit=unit), []
    for u in net.units:
        u.register_forward_pre_hook(lambda m, args: copies.append(args[0].clone()))
        u.shortcut.register_forward_pre_hook(lambda m, args: copies.append(args[1].clone()))
        u.shortcut.register_forward_hook(lambda m, args, y: copies.append(y.clone()))
    kept = trace(net, *batch()).units
    # h is computed by itself once with F = 0, without the hooks of the shortcut.
    for u, (x, residual, y) in zip(kept, zip(*[iter(copies)] * 3, strict=True), strict=True):
        assert torch.equal(u.x, x) and torch.equal(u.residual, residual) and torch.equal(u.y, y)


def test_trap_relu_in_place_where_the_paths_split():
    net = network(unit="relu-only-preact")
    net.body.stage1.unit2.residual.act1.relu.inplace = True
    with pytest.raises(UserError, match="stage1.unit2 rewrites its x_l in place"):
        trace(net, *batch())


class AddsInPlace(nn.Module):
    carry = nn.Identity()

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


@pytest.mark.parametrize("shortcut", sorted(set(SHORTCUTS) - {"identity"}))
def test_eqn_4_breaks_where_h_is_none(shortcut):
    settings = {"gate_bias": 0.0} if "gate" in shortcut else {}
    net = network(20, shortcut=shortcut, settings=settings)
    assert worst(measured(forward, net)["off"]) > 0.1


def test_eqn_4_is_computed_from_f_and_not_from_the_sum():
    """F that is not what the sum has: the equation must be off by as much, at every l below."""
    made = traced(20)
    [first, *_] = made.spans
    wrong = torch.randn_like(first[1].residual)
    first[1].residual = first[1].residual + wrong
    off = forward.additive_residuals(first)
    expected = float(wrong.norm() / first[-1].out.detach().norm())
    assert off[:2] == pytest.approx([expected] * 2, rel=1e-9) and off[2] < 1e-14


def test_forward_by_hand():
    """Norms of an image, F and x alike, and signs, of one unit whose tensors are known."""
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


@pytest.mark.parametrize("unit", EXACT)
def test_eqn_5_one_vjp_of_the_sum_of_residuals(unit):
    """The term through the weights, from the stage alone and the sum as the paper writes it."""
    made = traced(20, unit=unit)
    span = made.spans[0]
    _, at_out = backward.gradients(made)
    at_end = at_out[span[-1]]
    (direct, weights), *_ = backward.split(span, at_end)
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
    made = traced(20, shortcut="constant-scale", settings={"shortcut_scale": a})
    span = made.spans[0]
    _, at_out = backward.gradients(made)
    at_end = at_out[span[-1]]
    (direct, weights), *_ = backward.split(span, at_end)
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
    """In training the gradient at one image has a part that comes through another's statistics:
    the terms are of the whole batch. With kept statistics it has none."""
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
    """2^-n is normal in float32 and bfloat16 up to n = 126, in float16 up to 14; beside a 1, 24, 8
    and 11 binary digits are left."""
    found = backward.limits([0.5**n for n in range(1, 334)])
    assert found == {
        "float32": {"underflow": 127, "overflow": None, "lost": 25},
        "bfloat16": {"underflow": 127, "overflow": None, "lost": 9},
        "float16": {"underflow": 15, "overflow": None, "lost": 12},
    }
    assert backward.limits([2.0**n for n in range(1, 334)])["float32"]["overflow"] == 128
    assert backward.limits([1.0] * 333)["bfloat16"] == dict.fromkeys(
        ("underflow", "overflow", "lost")
    )


# "the gradient of a layer does not vanish even when the weights are arbitrarily small"


def test_the_gradient_survives_weights_that_are_arbitrarily_small():
    changes = measured(shrink, network(38))["change"]
    first = [stage[0] for stage in changes]
    assert first[0] > 1 and first[3] < 1e-2
    assert first[2] / first[3] == pytest.approx(100, rel=0.2)  # in proportion to F


@pytest.mark.parametrize("unit", UNITS)
def test_trap_bn_behind_a_convolution_takes_its_scale_away(unit):
    """Every F is scaled exactly, whatever ends it; its convolution alone would not do."""
    net = network(unit=unit)
    unit_of = lambda n: n.body.stage1.unit2  # noqa: E731
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    before = unit_of(net).residual(x)
    after = unit_of(shrink.shrunk(net, 1e-4)).residual(x)
    torch.testing.assert_close(after, 1e-4 * before, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(unit_of(net).residual(x), before)  # of a copy


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


# Lesions.


def test_a_deleted_unit_has_no_f():
    for unit, shortcut in [("original", "identity"), ("full-preact", "exclusive-gate")]:
        net = network(unit=unit, shortcut=shortcut).eval()
        for u in trace(net, *batch()).units:
            torch.testing.assert_close(lesion.Deleted(u.module)(u.x), u.module.after(u.h))


def test_lesions_are_what_a_network_without_these_units_says():
    """Error of the lesioned network, computed from the image on and not from what was kept."""
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


def test_110_layers_of_small_weights():
    """PAPER: 4.8e-4 at 1e-4 over 18 units; where zeros were padded, BN takes small scales away."""
    net = shrink.shrunk(ResNet(110).double().train(), 1e-4)
    assert shrink.change(trace(net, *batch(4)))[0] < 1e-2


# The command.


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_measures_tells_and_draws(topic):
    module = study.module(topic)
    assert all(callable(getattr(module, name)) for name in ("measure", "table", "draw"))


def test_networks_are_called_by_what_tells_them_apart(tmp_path):
    main = Source(Experiment(dataset="digits", depth=20))
    others = [
        source.beside(main, "depth=14,unit=original"),
        source.beside(main, "shortcut=exclusive-gate, gate-bias=-5"),
    ]
    assert others[0].experiment == Experiment(dataset="digits", depth=14, unit="original")
    assert others[1].experiment.gate_bias == -5.0
    assert [s.label for s in source.labelled([main, *others])] == [
        "depth=20, full-preact, identity",
        "depth=14, original, identity",
        "depth=20, full-preact, exclusive-gate, gate_bias=-5.0",
    ]
    narrow = Source(replace(main.experiment, block="basic"))
    assert source.beside(narrow, "depth=164").experiment.block_ == "bottleneck"
    assert source.beside(narrow, "depth=164,block=basic").experiment.block_ == "basic"
    name = main.experiment.name
    trained = main._replace(checkpoint=tmp_path, step=64000)
    labels = [s.label for s in source.labelled([main, main, trained, trained])]
    assert labels == [name, f"{name} (2)", f"{name} @64000", f"{name} @64000 (2)"]
    for text, message in [
        ("layout=tim", "unknown layout 'tim'"),
        ("dept=20", "dept=20: unknown setting 'dept'"),
        ("depth=111", "no network has 111 layers"),
        ("depth=", "depth must be"),
        ("unit=[", "unknown unit '\\['"),
        (str(tmp_path / "none.ckpt"), "there is no checkpoint"),
    ]:
        with pytest.raises(UserError, match=message):
            source.beside(main, text)


def test_images_come_from_all_classes():
    one = subject.subject(Source(Experiment(dataset="digits", depth=8)), Batch(10, 20, "float32"))
    assert one.labels.tolist() == list(range(10))
    assert one.x.shape == (10, 3, 32, 32) and one.x.dtype == torch.float32
    assert len(one.test_labels) == 20 and set(one.test_labels.tolist()) == set(range(10))
    assert one.net.training


@pytest.fixture
def called(capsys):
    """The command in this process: ``called(...)`` -> exit status, stdout, stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["analyze", *map(str, arguments)])
        return left.value.code, *capsys.readouterr()

    return call


FAST = ["--dataset", "digits", "--depth", 8, "--images", 2]


def test_analyze_at_initialization(called, tmp_path):
    arguments = [*FAST, "--compare", "unit=original", "--compare", "depth=14"]
    status, out, _ = called(*arguments, "--json", "--output", tmp_path)
    made = json.loads(out)
    assert status == 0
    assert made == json.loads((tmp_path / "analysis.json").read_text())
    topics = {"forward", "backward", "shrink", "paths"}  # the others need a trained network
    assert set(made["topics"]) == topics and made["batch"]["precision"] == "float64"
    labels = ["depth=8, full-preact", "depth=8, original", "depth=14, full-preact"]
    assert [n["label"] for n in made["networks"]] == labels
    for topic in topics:
        assert list(made["topics"][topic]) == labels
        picture = tmp_path / made["pictures"][topic]
        assert picture.read_bytes().startswith(b"\x89PNG")
    off = {name: worst(m["off"]) for name, m in made["topics"]["backward"].items()}
    assert off["depth=14, full-preact"] < 1e-12 and off["depth=8, full-preact"] < 1e-12


def test_analyze_of_a_run(called, trained):
    many = ("--images", 2, "--test-images", 360, "--pairs", 2)
    status, out, err = called(trained, *many)
    assert status == 0
    for word in ("(Eq. 4)", "(Eqs. 5, 8)", "(Eq. 5, its text)", "(Veit et al. 2016)", "360 images"):
        assert word in out, word
    assert "2 of 3 pairs, drawn at random" in out
    folder = trained / "analysis"
    assert f"pictures and numbers: {folder}" in err
    made = json.loads((folder / "analysis.json").read_text())
    assert set(made["topics"]) == set(TOPICS)
    [found] = made["topics"]["lesion"].values()
    result = json.loads((trained / "result.json").read_text())
    assert found["whole"] == pytest.approx(result["test_error"], abs=1)  # of another arithmetic
    assert len(found["single"]) == 3 and max(found["single"]) > found["whole"]
    called(trained, *many, "--topic", "forward")  # of the same network: the others stay
    again = json.loads((folder / "analysis.json").read_text())
    assert again["topics"] == made["topics"]
    called(trained, "--images", 3, "--topic", "forward", "--bn", "kept")  # seen otherwise
    other = json.loads((folder / "analysis.json").read_text())
    assert set(other["topics"]) == {"forward"}


def test_where_an_analysis_goes(tmp_path):
    e = Experiment(dataset="digits")
    inside = tmp_path / "run" / "checkpoints"
    for of, to in [
        (Source(e), f"runs/analyze-{e.name}"),
        (Source(e, inside / "last.ckpt"), tmp_path / "run" / "analysis"),
        (Source(e, inside / "best.ckpt"), tmp_path / "run" / "analysis-best"),
        (Source(e, tmp_path / "mine.ckpt"), tmp_path / "analysis-mine"),
    ]:
        assert str(study.folder_of(of)) == str(to)


@pytest.mark.parametrize(
    "arguments, error, hint",
    [
        (["--topic", "forwards"], "unknown topic 'forwards'", "did you mean 'forward'?"),
        (["--topic", "lesion"], "--topic lesion needs a trained network", "a run's folder"),
        (["--compare", "unit=preact"], "unknown unit 'preact'", "did you mean 'full-preact'?"),
        (["nothing.ckpt"], "there is no checkpoint nothing.ckpt", "a run folder"),
        (["nothing.ckpt", "--config", "smoke"], "a checkpoint takes no --config", "by itself"),
    ],
)
def test_mistakes(called, arguments, error, hint):
    status, _, said = called(*([] if "ckpt" in arguments[0] else FAST), *arguments)
    said = " ".join(said.split())
    assert status == 2 and f"error: {error}" in said and hint in said


def test_the_flags_that_mean_nothing_here_are_not_offered(resnetv2):
    text = resnetv2("analyze", "--help").stdout
    assert "--shortcut-scale" in text and "--data-dir" in text
    assert "--devices" not in text and "--log-every" not in text
    assert all(name in text for name in TOPICS)
