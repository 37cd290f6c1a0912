"""The paper's drawings, as the order in which layers run and what each of them sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import describe
from resnetv2_cli.layers import ZeroPad
from resnetv2_cli.plans import BLOCKS, LAYOUTS, UNITS, places
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.units import Kind, residual_unit

KINDS = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "bn",
    nn.ReLU: "relu",
    nn.MaxPool2d: "maxpool",
    nn.AdaptiveAvgPool2d: "pool",
    nn.Linear: "fc",
}


def order(net: nn.Module, size: int = 32) -> str:
    """The layers of a network, in the order they run."""
    names = []
    for module in net.modules():
        if type(module) in KINDS:
            module.register_forward_hook(lambda m, *_: names.append(KINDS[type(m)]))
    net(torch.randn(2, 3, size, size))
    return " ".join(names)


def test_fig_4():
    assert {unit: " / ".join(places(unit)) for unit in UNITS} == {
        # end of F / after the addition / start of F
        "original": "bn / relu / ",
        "bn-after-add": " / bn relu / ",
        "relu-before-add": "bn relu /  / ",
        "relu-only-preact": "bn /  / relu",
        "full-preact": " /  / bn relu",
    }


@pytest.mark.parametrize("unit", UNITS)
def test_fig_4_same_components_only_the_places_differ(unit):
    assert " ".join(places(unit)).split() == ["bn", "relu"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("depth, block", [(8, "basic"), (14, "basic"), (8, "single")])
def test_without_additions_every_network_is_one_plain_chain(unit, depth, block):
    """Sec. 4.1: "a plain network that has N layers [has] N-1 activations", post- or pre- alike."""
    net = ResNet(depth, block, unit)
    assert order(net) == "conv bn relu " * (depth - 1) + "pool fc"


PROJECTED = {  # the unit of a bottleneck network of 11 layers: F, then the projection
    "original": "conv bn relu conv bn relu conv bn conv bn relu",
    "bn-after-add": "conv bn relu conv bn relu conv conv bn relu",
    "relu-before-add": "conv bn relu conv bn relu conv bn relu conv bn",
    "relu-only-preact": "relu conv bn relu conv bn relu conv bn conv bn",
    "full-preact": "bn relu conv bn relu conv bn relu conv conv",
}
HEADS = {"relu-only-preact": "relu pool fc", "full-preact": "bn relu pool fc"}


@pytest.mark.parametrize("unit", PROJECTED)
def test_projections_in_every_unit_type(unit):  # full-preact: as KaimingHe/resnet-1k-layers
    stage = PROJECTED[unit]
    head = HEADS.get(unit, "pool fc")
    first = stage  # the stem has activated x already, so the first unit does not again
    for activation in ("bn relu ", "relu ") if unit in HEADS else ():
        first = first.removeprefix(activation)
    assert order(ResNet(11, "bottleneck", unit)) == (f"conv bn relu {first} {stage} {stage} {head}")


def test_every_unit_type_has_its_projection_written_down():
    assert set(PROJECTED) == set(UNITS)


def test_the_imagenet_stem_pools_after_its_activation():  # as fb.resnet.torch
    ran = order(ResNet(18, stem="imagenet", classes=3), size=64)
    assert ran.startswith("conv bn relu maxpool conv bn relu conv bn relu conv")


@pytest.mark.parametrize("stride_on, strides", [("first", [2, 1, 1]), ("3x3", [1, 2, 1])])
def test_which_weight_layer_of_a_bottleneck_takes_the_stride(stride_on, strides):
    unit = residual_unit(Kind("full-preact", "bottleneck", stride_on=stride_on), 16, 8, stride=2)
    assert [m.stride[0] for m in unit.residual.modules() if isinstance(m, nn.Conv2d)] == strides


def test_stages_begin_with_the_unit_that_halves():
    net = ResNet(20)
    strides = [unit.residual.conv1.stride[0] for unit in net.units]
    assert strides == [1, 1, 1, 2, 1, 1, 2, 1, 1]


@pytest.mark.parametrize("unit", UNITS)
def test_a_projection_sees_what_f_sees(unit):
    """ "these projection shortcuts are also with pre-activation" (appendix)."""
    layer = residual_unit(Kind(unit, "bottleneck", option="B"), 16, 8, stride=2)
    seen = {}
    for name, conv in {"F": layer.residual.conv1, "h": layer.shortcut.carry.conv}.items():
        conv.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    layer(torch.randn(2, 16, 8, 8))
    torch.testing.assert_close(seen["h"], seen["F"])


@pytest.mark.parametrize("c_in, c_out, stride", [(2, 5, 2), (3, 3, 2), (5, 2, 3), (2, 1, 1)])
def test_the_gradient_of_option_a(c_in, c_out, stride):
    x = torch.randn(2, c_in, 5, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    pad = ZeroPad(c_in, c_out, stride)
    want = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, c_out - c_in))
    dy = torch.randn_like(want)
    (dx,) = torch.autograd.grad(pad(x), x, dy)
    assert torch.equal(dx, *torch.autograd.grad(want, x, dy))
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradgradcheck(lambda x: pad(x) ** 2, x)


@pytest.mark.parametrize("pad, activated", [("raw", False), ("activated", True)])
def test_what_option_a_pads(pad, activated):
    layer = residual_unit(Kind("full-preact", "basic", pad=pad), 16, 32, stride=2).eval()
    x = torch.randn(2, 16, 8, 8)
    carried = torch.relu(layer.shared.bn(x)) if activated else x
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, :16] = carried[:, :, ::2, ::2]
    branch = layer.residual(layer.shared(x))
    torch.testing.assert_close(layer(x) - branch, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_the_first_unit_splits_after_the_stems_activation(unit):
    """ "we adopt the first activation right after conv1 and before splitting" (appendix)."""
    net = ResNet(8, unit=unit).eval()
    x = torch.randn(2, 3, 32, 32)
    seen = {}
    net.units[0].shortcut.register_forward_pre_hook(lambda m, args: seen.update(h=args[0]))
    net.units[0].residual.conv1.register_forward_pre_hook(lambda m, args: seen.update(F=args[0]))
    net(x)
    expected = torch.relu(net.stem.act.bn(net.stem.conv(x)))
    torch.testing.assert_close(seen["h"], expected)
    torch.testing.assert_close(seen["F"], expected)


def test_blocks_are_those_of_the_paper():
    assert {name: (b.kernels, b.expansion) for name, b in BLOCKS.items()} == {
        "single": ((3,), 1),
        "basic": ((3, 3), 1),
        "bottleneck": ((1, 3, 1), 4),
    }


@pytest.mark.parametrize("unit", UNITS)
def test_where_the_first_activation_stands_changes_no_chain(unit):
    """The stem leaves to the first unit only the layers that this type of unit begins with."""
    net = ResNet(8, unit=unit, first_act="unit")
    assert order(net) == "conv bn relu " * 7 + "pool fc"
    last, after, before = places(unit)
    assert order(net.stem) == " ".join(["conv", *last.split(), *after.split()])
    assert "conv1" in dict(net.units[0].residual.named_children())
    assert f"{last} {after} {before}".split() == ["bn", "relu"]


LAID_OUT = {  # layout: stem and first unit of ResNet-50; strides in a unit that halves
    "authors": ("conv bn relu maxpool conv bn relu conv bn relu conv conv", [2, 1, 1]),
    "fb": ("conv bn relu maxpool conv bn relu conv bn relu conv conv", [1, 2, 1]),
    "torchvision": ("conv bn relu maxpool conv bn relu conv bn relu conv conv", [1, 2, 1]),
    "timm": ("conv maxpool bn relu conv bn relu conv bn relu conv conv", [1, 2, 1]),
}


def test_every_layout_is_written_down():
    assert set(LAID_OUT) == set(LAYOUTS)


@pytest.mark.parametrize("name", LAID_OUT)
def test_layouts_on_imagenet(name):
    began, strides = LAID_OUT[name]
    e = Experiment.load(layout=name, depth=50, stem="imagenet")
    net = ResNet(**e.architecture, classes=3)
    assert order(net, size=64).startswith(began + " bn")
    halves = net.body.stage2.unit1.residual
    assert [m.stride[0] for m in halves.modules() if isinstance(m, nn.Conv2d)] == strides


@pytest.mark.parametrize(
    "name, carried, padded",
    [("authors", "zeros", "raw"), ("fb", "zeros", "activated"), ("timm", "conv", None)],
)
def test_layouts_where_a_cifar_network_changes_shape(name, carried, padded):
    e = Experiment.load(layout=name, depth=8)
    unit = ResNet(**e.architecture).body.stage2.unit1
    assert isinstance(unit.shortcut.carry, ZeroPad) == (carried == "zeros")
    assert (len(unit.shared) > 0) == (padded != "raw")


def test_the_default_is_the_authors_layout():
    assert Experiment.load(layout="authors") == Experiment()


@pytest.mark.parametrize("unit", UNITS)
def test_option_c_is_the_conv1x1_shortcut(unit):
    """ "option C of [1]" (Fig. 2e): a projection in every unit."""
    names = [list(ResNet(8, unit=unit, **how).state_dict()) for how in OPTION_C]
    assert names[0] == names[1]
    assert all(isinstance(u.shortcut.carry.conv, nn.Conv2d) for u in ResNet(8, option="C").units)


OPTION_C = [{"option": "C"}, {"shortcut": "conv1x1"}]


@pytest.mark.parametrize(
    "settings", [{"depth": 8}, {"depth": 11}, {"depth": 11, "stride_on": "3x3"}]
)
def test_receptive_fields_are_what_a_gradient_reaches(settings):
    """Weights and images that are positive everywhere, so that nothing cancels."""
    e = Experiment(unit="original", option="A", **settings)
    net = ResNet(**e.architecture).double().eval()
    for p in net.parameters():
        nn.init.constant_(p, 0.1)
    x = torch.ones(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    at, seen = net.stem(x), []
    for unit in (nn.Identity(), *net.units):
        at = unit(at)
        middle = at[0, :, at.shape[2] // 2, at.shape[3] // 2].sum()
        [grad] = torch.autograd.grad(middle, x, retain_graph=True)
        rows = grad.abs().sum((0, 1, 3)).nonzero().flatten()
        seen.append(int(rows[-1] - rows[0]) + 1)
    assert [p["receptive_field"] for p in describe(e)["parts"]] == [*seen, None]
