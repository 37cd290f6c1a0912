"""Where a network runs BN, ReLU and a convolution as one operation, and where as PyTorch's own."""

import copy

import pytest
import torch
from compiled import BOUND, BOUNDS, LAST, bf16, conv3x3, distance, needs_products, trained_step
from torch import nn
from torch.nn import functional as F

from resnetv2_cli import native
from resnetv2_cli.fused import forgetting, made_again
from resnetv2_cli.joined import bn_relu_conv, joins
from resnetv2_cli.layers import Branch, activation, conv
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS

pytestmark = needs_products


@pytest.fixture
def called(monkeypatch):
    """The names of the library functions that ran."""
    names, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (names.append(name), call(name, *rest)))
    return names


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("depth, block", [(14, "basic"), (20, "bottleneck")])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_and_shortcut_against_float64(unit, shortcut, depth, block, mixed, called):
    """In bf16 and in float32, no farther from float64 than the eager network, with a margin for
    chance; BN counts a batch once."""
    settings = {"dropout_ratio": 0.0} if shortcut == "dropout" else {}  # masks differ by dtype
    net = ResNet(depth, block, unit, shortcut, settings=settings)
    exact = trained_step(copy.deepcopy(net).double(), "eager")
    eager = trained_step(net, "eager", mixed)
    assert not called
    found = trained_step(net, "compiled", mixed)
    kind = "bf16" if mixed else "float"
    name = "pointwise" if block == "bottleneck" else conv3x3(kind)
    assert called.count(f"{name}_forward_{kind}") == called.count(f"{name}_backward_{kind}") >= 6
    # A float32 value near ReLU's corner may fall on either side, and its gradient with it.
    for i, room in enumerate((1e-3, 1e-3) if mixed else (1e-6, 0.05)):
        assert distance(found[i], exact[i]) < 1.3 * distance(eager[i], exact[i]) + room
    for name, value in exact[2].items():
        far = {"rtol": 0.1, "atol": 0.02} if mixed else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found[2][name].double(), value.double(), **far)
    assert all(int(v) == 1 for k, v in found[2].items() if k.endswith("tracked"))


@pytest.mark.parametrize("depth, block", [(14, "basic"), (20, "bottleneck")])
@pytest.mark.parametrize("shortcut", ["identity", "exclusive-gate"])
@pytest.mark.parametrize("unit", UNITS)
def test_an_evaluation_is_joined_too(unit, shortcut, depth, block, called):
    """With running statistics, which stay as they are; no farther from float64 than eager bf16."""
    torch.manual_seed(0)
    net = ResNet(depth, block, unit, shortcut).eval().to(memory_format=LAST)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
    x, found = torch.randn(8, 3, 32, 32).to(memory_format=LAST), {}
    state = copy.deepcopy(net.state_dict())
    exact = copy.deepcopy(net).double()(x.double()).detach()
    for compiled in (False, True):
        net.activate(compiled, False)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found[compiled] = distance(net(x).double(), exact)
        assert bool(called) == compiled
    assert found[True] < 1.3 * found[False] + 1e-3
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)  # with gradients enabled: somebody may want them
    assert not called


@pytest.mark.parametrize("each", [2, 8])
@pytest.mark.parametrize("shortcut", ["identity", "dropout"])
@pytest.mark.parametrize("segments, mode", [(0, "forget"), (2, "compiled"), (2, "forget")])
def test_what_is_computed_again_is_what_was(segments, mode, shortcut, each, called, monkeypatch):
    monkeypatch.setattr("resnetv2_cli.joined.EACH", each)
    net = ResNet(29, "bottleneck", shortcut=shortcut)
    kept = trained_step(net, "compiled", mixed=True)
    net.segments = segments
    again = trained_step(net, mode, mixed=True)
    assert "pointwise_backward_bf16" in called
    assert torch.equal(kept[0], again[0]) and torch.equal(kept[1], again[1])
    torch.testing.assert_close(kept[2], again[2])


@pytest.mark.parametrize("each, made", [(1, 0), (2, 3), (3, 6), (8, 6)])
def test_sums_are_made_again_once_each_from_those_that_are_kept(each, made, called, monkeypatch):
    """Of three stages of three units. The sum of a stage's last unit is kept, as what follows is
    not joined."""
    monkeypatch.setattr("resnetv2_cli.joined.EACH", each)
    trained_step(ResNet(29, "bottleneck"), "forget", mixed=True)
    assert called.count("pointwise_forward_bf16") - called.count("pointwise_backward_bf16") == made


def test_the_addition_is_its_last_layers(called):
    """A full pre-activation unit is one operation for each weight layer."""
    unit = ResNet(20, "bottleneck").units[1].train().to(memory_format=LAST)
    for module in unit.modules():
        module.compiled = True
    x = bf16(2, 64, 8, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
    middle = f"{conv3x3('bf16')}_forward_bf16"
    assert called == ["pointwise_forward_bf16", middle, "pointwise_forward_bf16"]
    assert y.grad_fn.name() == "_JoinedBackward"
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert not any("Add" in name for name in seen)


@pytest.mark.parametrize("unit", ["original", "relu-before-add", "relu-only-preact"])
def test_bn_behind_the_weights_adds_as_it_writes(unit, called):
    """In float32 networks too; a ReLU after the addition is part of the operation."""
    made = ResNet(20, unit=unit).units[1].train().to(memory_format=LAST)
    for module in made.modules():
        module.compiled = True
    y = made(torch.randn(2, 16, 8, 8).relu().to(memory_format=LAST).requires_grad_())
    assert called == ["winograd_forward_float", "winograd_forward_float", "forward_float"]
    assert y.grad_fn.name() == "_CompiledBackward"


@pytest.mark.parametrize("part", ["residual", "shortcut", "after", "after.relu", "residual.last"])
def test_who_watches_what_is_behind_the_weights_sees_it(part):
    unit = ResNet(14, unit="original").units[1].train().to(memory_format=LAST)
    for module in unit.modules():
        module.compiled = True
    x, seen = torch.randn(2, 16, 8, 8).to(memory_format=LAST), []
    whole = unit(x)
    unit.get_submodule(part).register_forward_hook(lambda _, given, y: seen.append(y.clone()))
    torch.testing.assert_close(unit(x), whole)
    if part.startswith("after"):
        torch.testing.assert_close(seen[0], whole)
    elif part == "shortcut":
        torch.testing.assert_close(F.relu(seen[0]), whole)
    else:
        torch.testing.assert_close(F.relu(seen[0] + x), whole)


def test_who_watches_an_empty_layer_sees_it():
    unit, seen = ResNet(8, option="B").units[1], []
    unit.get_submodule("shortcut.carry.act").register_forward_hook(lambda *_: seen.append(1))
    unit(torch.randn(2, 16, 8, 8).to(memory_format=LAST))
    assert seen == [1]


@pytest.mark.parametrize("part", ["residual", "shortcut"])
@pytest.mark.parametrize("training", [False, True])
def test_who_watches_a_side_of_the_addition_sees_it(part, training):
    unit = ResNet(14).units[1].train(training)
    x, seen = torch.randn(2, 16, 8, 8), {}
    whole = unit(x)
    unit.get_submodule(part).register_forward_hook(lambda _, given, y: seen.update({part: y}))
    assert torch.equal(unit(x), whole)
    torch.testing.assert_close(seen[part], whole - x if part == "residual" else whole)


def unfit(name, dtype=torch.bfloat16):
    """x, a BN and a layer that do not fit the operation, for the one reason that ``name`` gives."""
    norm, layer, x = nn.BatchNorm2d(32), conv(32, 16, 1), bf16(2, 32, 4, 4, dtype=dtype)
    if name == "another type":
        x = x.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    elif name == "channels first":
        x = x.contiguous()
    elif name == "no image":
        x = x[:0]
    elif name == "no batch":
        x = x[0]
    elif name == "strides that differ":
        layer.stride = (1, 2)
    elif name == "sides that differ":
        layer = nn.Conv2d(32, 16, (3, 5), padding=(1, 2), bias=False)
    elif name == "4x4":
        layer = conv(32, 16, 4, 2)
    elif name == "5x5":
        layer = conv(32, 16, 5)
    elif name == "other inputs":
        layer = conv(16, 16, 1)
    elif name == "BN of another tensor":
        norm = nn.BatchNorm2d(16)
    elif name == "dilated":
        layer = nn.Conv2d(32, 16, 3, padding=1, dilation=2, bias=False)
    elif name == "without BN, and pixels that no output sees":
        norm, layer = None, conv(32, 16, 1, 2)
    elif name == "without a border":
        layer, x = nn.Conv2d(32, 16, 3, bias=False), bf16(2, 32, 8, 8, dtype=dtype)
    elif name == "a 3x3 of too many weights":
        layer = conv(32, 2**15, 3)
    elif name == "with a bias":
        layer = nn.Conv2d(32, 16, 1)
    elif name == "odd outputs":
        layer = conv(32, 24, 1)
    elif name == "grouped":
        layer = nn.Conv2d(32, 32, 1, groups=2, bias=False)
    elif name == "weights of bf16":
        layer = layer.bfloat16()
    elif name == "too many weights":
        layer = conv(32, 8208, 1)
    return x, norm, layer.to(memory_format=LAST)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", [
    "another type", "channels first", "no image", "no batch", "strides that differ",
    "sides that differ", "4x4", "5x5", "other inputs", "BN of another tensor", "dilated",
    "without BN, and pixels that no output sees", "with a bias", "without a border",
    "odd outputs", "grouped", "weights of bf16", "too many weights", "a 3x3 of too many weights",
])  # fmt: skip
def test_what_does_not_fit(name, dtype):
    mixed = dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert joins(*unfit("nothing", dtype))
        assert not joins(*unfit(name, dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=not mixed):
        # PyTorch's convolution would refuse a bf16 x, and compute a float32 one in bf16.
        assert not joins(*unfit("nothing", dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_threads_take_whole_images_of_a_3x3(stride, threads, dtype):
    """PyTorch evaluates fewer images than threads; what training keeps does not depend on them."""
    norm, layer, x = nn.BatchNorm2d(32), conv(32, 16, 3, stride), bf16(2, 32, 8, 8, dtype=dtype)
    layer, before = layer.to(memory_format=LAST), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert joins(x, norm, layer)
            with torch.no_grad():
                assert joins(x, norm, layer) == (threads == 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stride, outputs", [(1, 16), (2, 16), (2, 256)])
def test_an_image_that_takes_much_memory_is_pytorchs(stride, outputs):
    norm, layer = nn.BatchNorm2d(32), conv(32, outputs, 3, stride).to(memory_format=LAST)
    x = torch.empty(1, 32, 720, 720).to(memory_format=LAST)
    assert joins(x, norm, layer) and not joins(x.repeat(1, 1, 1, 2), norm, layer)
    larger = conv(32, 16, 7, 2).to(memory_format=LAST)  # with a wider border
    assert joins(x[:, :, 4:, 4:].clone(memory_format=LAST), norm, larger)
    assert not joins(x, norm, larger)


def test_a_strided_sum_is_recomputed_as_it_was():
    norm, layer = nn.BatchNorm2d(32), conv(32, 16, 3, 2).to(memory_format=LAST)
    x, plus = bf16(2, 32, 8, 8).requires_grad_(), bf16(2, 16, 4, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), forgetting():
        y, _ = bn_relu_conv(x, plus, norm, True, layer)
    again = made_again(y)
    assert again is not None and torch.equal(again(), y)


def test_on_a_gpu_other_strides_and_sizes_are_pytorchs():
    triton_joined = pytest.importorskip("resnetv2_cli.triton_joined")
    x = bf16(2, 32, 8, 8)
    for kernel, stride in ((1, 1), (3, 1), (3, 2), (1, 2), (5, 1)):
        fits = triton_joined.joins(x, None, conv(32, 32, kernel, stride))
        assert fits == (kernel < 5 and stride == 1)


def branch():
    made = Branch(activation("bn relu", 32), conv(32, 16, 1)).to(memory_format=LAST).train()
    made.compiled = True
    return made


@pytest.mark.parametrize("change", [
    lambda b: b.eval(), lambda b: setattr(b, "compiled", False),
    lambda b: b[1].register_forward_hook(lambda *_: None),
    lambda b: b[1].register_full_backward_hook(lambda *_: None),
    lambda b: b[1].register_full_backward_pre_hook(lambda *_: None),
])  # fmt: skip
def test_who_watches_a_convolution_has_pytorchs(change, called):
    x = bf16(2, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        branch()(x)
        assert called == ["pointwise_forward_bf16"]
        plain = branch()
        change(plain)
        plain(x)
    assert called.count("pointwise_forward_bf16") == 1


@pytest.mark.parametrize("change", [
    lambda b: b[0].bn.eval(), lambda b: setattr(b[0].bn, "momentum", None),
    lambda b: b[0].register_forward_hook(lambda *_: None),
    lambda b: b[0].relu.register_forward_pre_hook(lambda *_: None),
])  # fmt: skip
def test_who_watches_or_freezes_bn_has_pytorchs_before_the_convolution(change, called):
    plain, x = branch(), bf16(2, 32, 4, 4)
    change(plain)
    want = plain[1](plain[0](x.float())).detach()
    plain[0].bn.reset_running_stats()
    with torch.autocast("cpu", torch.bfloat16):
        y = plain(x)
    assert called == ["pointwise_forward_bf16"]
    assert distance(y.detach().double(), want.double()) < 2 * BOUND


def test_a_unit_without_bn_before_its_weights_is_operations_too(called):
    unit = ResNet(14, unit="original").units[1].train().to(memory_format=LAST)
    for module in unit.modules():
        module.compiled = True
    x = bf16(2, 16, 8, 8).relu().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        unit(x).sum().backward()
    forward, backward = ([f"{conv3x3('bf16')}_{way}_bf16"] * 2 for way in ("forward", "backward"))
    assert called == [*forward, "forward_bf16", "backward_bf16", *backward]


def test_what_was_looked_at_without_gradients_can_be_trained():
    layer, x = conv(48, 16, 1), bf16(2, 48, 4, 4)
    with torch.inference_mode():
        bn_relu_conv(x, None, None, True, layer)
    bn_relu_conv(x, None, None, True, layer)[0].sum().backward()
    assert layer.weight.grad is not None
