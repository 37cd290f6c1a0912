"""The paper's equations, as statements about the code."""

import pytest
import torch
from torch import nn

from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS
from resnetv2_cli.units import Kind, residual_unit


def stack(n: int, unit: str = "full-preact", shortcut: str = "identity", **settings) -> nn.Module:
    """n units of 16 channels in float64, whose BN is not the identity."""
    kind = Kind(unit, "basic", shortcut, settings)
    net = nn.Sequential(*[residual_unit(kind, 16, 16) for _ in range(n)]).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias)
    return net.eval()


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 16, 8, 8), dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("unit", UNITS)
def test_eqns_1_and_2(unit):
    [layer] = stack(1, unit)
    x = image()
    before = x.detach().clone()
    expected = layer.after(x + layer.residual(before))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(x, before)  # nothing wrote into the tensor that the shortcut carries


def bn(x, m):
    scale = m.weight / (m.running_var + m.eps).sqrt()
    return (x - m.running_mean[:, None, None]) * scale[:, None, None] + m.bias[:, None, None]


def weight(x, m):
    return nn.functional.conv2d(x, m.weight, padding=1)


HAND = {  # Fig. 4, each unit written out by hand: x, conv1, conv2, its two BNs as they run
    "original": lambda x, w1, w2, b1, b2: (
        x + bn(weight(bn(weight(x, w1), b1).relu(), w2), b2)
    ).relu(),
    "bn-after-add": lambda x, w1, w2, b1, b2: bn(
        x + weight(bn(weight(x, w1), b1).relu(), w2), b2
    ).relu(),
    "relu-before-add": lambda x, w1, w2, b1, b2: (
        x + bn(weight(bn(weight(x, w1), b1).relu(), w2), b2).relu()
    ),
    "relu-only-preact": lambda x, w1, w2, b1, b2: (
        x + bn(weight(bn(weight(x.relu(), w1), b1).relu(), w2), b2)
    ),
    "full-preact": lambda x, w1, w2, b1, b2: (
        x + weight(bn(weight(bn(x, b1).relu(), w1), b2).relu(), w2)
    ),
}


@pytest.mark.parametrize("unit", HAND)
def test_fig_4_by_hand(unit):
    [layer] = stack(1, unit)
    norms = []
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, *_: norms.append(m))
    x = image()
    y = layer(x)
    by_hand = HAND[unit](x, layer.residual.conv1, layer.residual.conv2, *norms)
    torch.testing.assert_close(y, by_hand)


def test_every_unit_is_written_out_by_hand():
    assert set(HAND) == set(UNITS)


@pytest.mark.parametrize("unit", ["relu-before-add", "relu-only-preact", "full-preact"])
def test_eqn_4_a_deep_feature_is_a_shallow_one_plus_residuals(unit):
    x = x_l = image()
    residuals = []
    for layer in stack(6, unit):
        residuals.append(layer.residual(x))
        x = layer(x)
    torch.testing.assert_close(x, x_l + sum(residuals), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit", ["original", "bn-after-add"])
def test_eqn_4_breaks_where_f_is_no_identity(unit):
    x = x_l = image()
    residuals = []
    for layer in stack(6, unit):
        residuals.append(layer.residual(x))
        x = layer(x)
    assert (x - x_l - sum(residuals)).abs().max() > 0.1


def test_eqn_5_the_gradient_is_a_direct_term_and_one_through_the_weights():
    net, x_l = stack(5), image()
    residuals, x = [], x_l
    for layer in net:
        residuals.append(layer.residual(x))
        x = layer(x)
    g = torch.randn_like(x)
    through_weights = torch.autograd.grad(sum(residuals), x_l, g, retain_graph=True)[0]
    total = torch.autograd.grad(x, x_l, g)[0]
    torch.testing.assert_close(total, g + through_weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_eqn_8_scaled_shortcuts_scale_the_gradient_once_a_unit(factor):
    net = stack(6, shortcut="constant-scale", shortcut_scale=factor)
    for p in net.parameters():  # F = 0: only the shortcuts' product is left
        nn.init.zeros_(p)
    x = image()
    net(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, factor**6))


def test_relu_before_add_never_decreases_the_signal():
    """Sec. 4.1: "the forward propagated signal is monotonically increasing"."""
    x = image()
    for layer in stack(4, "relu-before-add"):
        y = layer(x)
        assert (y >= x).all()
        x = y


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("c_out, stride", [(16, 1), (32, 2), (32, 1)])
@pytest.mark.parametrize("block, option", [("basic", "A"), ("basic", "B")])
def test_every_shortcut_keeps_the_residuals_shape(shortcut, c_out, stride, block, option):
    kind = Kind("original", block, shortcut, option=option)
    unit = residual_unit(kind, 16, c_out, stride)
    assert unit(torch.randn(2, 16, 8, 8)).shape == (2, c_out, 8 // stride, 8 // stride)


@pytest.mark.parametrize("unit", ["original", "full-preact"])
@pytest.mark.parametrize("shortcut", ["identity", "dropout"])
def test_recomputing_activations_changes_no_gradient(unit, shortcut):
    """Activation checkpointing must draw the same dropout twice and update BN's statistics once."""
    gradients, buffers = [], []
    for segments in (0, 1, 4, 99):
        torch.manual_seed(0)
        net = ResNet(20, unit=unit, shortcut=shortcut).double()
        net.segments = segments
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        torch.manual_seed(1)
        net(x).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        buffers.append(dict(net.named_buffers()))
    for other in (1, 2, 3):
        torch.testing.assert_close(gradients[other], gradients[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(buffers[other], buffers[0], rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_keep_the_layout_of_what_they_are_gradients_of(layout):
    net = ResNet(14).to(memory_format=layout)
    seen = []
    for unit in net.units:
        unit.register_full_backward_hook(
            lambda m, inputs, outputs: seen.append(outputs[0].is_contiguous(memory_format=layout))
        )
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=layout)
    net(x).sum().backward()
    assert seen == [True] * 6


def test_he_initialization():
    """ "[23]": variance 2 / fan; the authors' Torch code uses fan-out."""
    for init, fan in [("fan_out", 9 * 64), ("fan_in", 9 * 32)]:
        net = ResNet(20, init=init)
        weights = net.body.stage3.unit1.residual.conv1.weight
        assert weights.shape[:2] == (64, 32)
        assert weights.var().item() == pytest.approx(2 / fan, rel=0.05)
    assert net.head.fc.bias.abs().max() == 0
    assert net.head.act.bn.weight.unique().tolist() == [1]
