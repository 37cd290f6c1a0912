"""Every shortcut against its formula, written out again by hand."""

import itertools
import re

import pytest
import torch
from torch import nn

from resnetv2_cli import trust
from resnetv2_cli.errors import UserError
from resnetv2_cli.plans import BLOCKS, UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS, Shortcut, shortcut_class
from resnetv2_cli.units import Kind, residual_unit


def gate(h, x):
    weight = h.gate.weight[:, :, 0, 0]
    return torch.sigmoid(torch.einsum("oi,nihw->nohw", weight, x) + h.gate.bias[:, None, None])


FORMULAS = {  # h, x, F(x) -> y, in eval mode
    "identity": lambda h, x, r: x + r,
    "constant-scale": lambda h, x, r: 0.5 * x + r,
    "exclusive-gate": lambda h, x, r: (1 - gate(h, x)) * x + gate(h, x) * r,
    "shortcut-only-gate": lambda h, x, r: (1 - gate(h, x)) * x + r,
    "conv1x1": lambda h, x, r: h.carry(x) + r,
    "dropout": lambda h, x, r: x + r,
    "stochastic-depth": lambda h, x, r: x + 0.5 * r,
    "rezero": lambda h, x, r: x,
}


def test_every_shortcut_has_a_formula():
    assert set(FORMULAS) == set(SHORTCUTS)


def shortcut(name: str, unit: str = "original", **settings) -> nn.Module:
    return residual_unit(Kind(unit, "basic", name, settings), 16, 16).shortcut


@pytest.mark.parametrize("name", FORMULAS)
def test_shortcut_computes_its_formula(name):
    h = shortcut(name).eval()
    x, r = torch.randn(2, 2, 16, 8, 8)
    torch.testing.assert_close(h(x, r), FORMULAS[name](h, x, r))


@pytest.mark.parametrize("a, b", [(0, 1), (0.5, 1), (0.5, 0.5)])
def test_constant_scale(a, b):
    h = shortcut("constant-scale", shortcut_scale=a, residual_scale=b)
    x, r = torch.randn(2, 2, 16, 8, 8)
    torch.testing.assert_close(h(x, r), a * x + b * r)


def test_the_conv1x1_shortcut_is_a_convolution_and_bn_in_every_unit():
    """Caption of Fig. 2: BN layers "are right after the weight layers for all units here"."""
    h = shortcut("conv1x1").eval()
    h.carry.act.bn.running_mean.normal_()
    x, r = torch.randn(2, 2, 16, 8, 8)
    carried = torch.einsum("oi,nihw->nohw", h.carry.conv.weight[:, :, 0, 0], x)
    bn = (carried - h.carry.act.bn.running_mean[:, None, None]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(h(x, r), bn + r)
    assert all(
        isinstance(unit.shortcut.carry.conv, nn.Conv2d)
        for unit in ResNet(20, unit="original", shortcut="conv1x1").units
    )


@pytest.mark.parametrize("name", ["exclusive-gate", "shortcut-only-gate"])
@pytest.mark.parametrize("b_g", [0.0, -6.0, -7.0])
def test_gates_start_at_b_g_in_the_finished_network(name, b_g):
    """The network's initialization comes last, and must not reset the gates."""
    net = ResNet(8, unit="original", shortcut=name, settings={"gate_bias": b_g})
    for unit in net.units:
        assert unit.shortcut.gate.bias.unique().tolist() == [b_g]


class Zeroed(Shortcut):
    """(1 - g(x)) x + W x + F(x), where W starts at 0 and g, of the channels' means, at b_g = -6."""

    def __init__(self, c_in, c_out, stride, carry):
        super().__init__(c_in, c_out, stride, carry)
        self.w, self.gate = nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.Linear(c_in, c_out)
        nn.init.zeros_(self.w.weight)
        nn.init.constant_(self.gate.bias, -6.0)

    def forward(self, x, residual):
        g = torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return (1 - g) * self.carry(x) + self.w(x) + residual


def test_a_shortcut_of_ones_own_starts_as_it_is_made(monkeypatch):
    monkeypatch.setitem(SHORTCUTS, "zeroed", Zeroed)
    *_, unit = ResNet(8, shortcut="zeroed", option="B").units
    assert not unit.shortcut.w.weight.any()
    assert unit.shortcut.gate.bias.unique().tolist() == [-6.0]
    carried = unit.shortcut.carry.conv.weight  # initialized like every other weight
    assert carried.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


@pytest.mark.parametrize("inverted, kept", [(True, 2.0), (False, 1.0)])
def test_dropout_in_training(inverted, kept):
    """Kept values are doubled, as in Caffe and PyTorch, or left as they are."""
    h = shortcut("dropout", dropout_ratio=0.5, dropout_inverted=inverted)
    y = h(torch.ones(8, 16, 8, 8), torch.zeros(8, 16, 8, 8))
    assert y.unique().tolist() == [0, kept]
    assert (y == 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_dropout_keeps_its_expectation_at_test_time():
    for inverted in (True, False):
        h = shortcut("dropout", dropout_inverted=inverted)
        x, r = torch.ones(64, 16, 8, 8), torch.zeros(64, 16, 8, 8)
        training = h.train()(x, r).mean().item()
        assert h.eval()(x, r).mean().item() == pytest.approx(training, abs=0.02)


def test_stochastic_depth_falls_linearly_and_draws_each_batch():
    """Huang et al. 2016, Eqn. 4: p_l = 1 - (1 - p_L) l / L."""
    units = ResNet(20, shortcut="stochastic-depth", settings={"survival": 0.1}).units
    assert [u.shortcut.p for u in units] == pytest.approx([1 - 0.1 * k for k in range(1, 10)])
    h, x, r = units[-1].shortcut, torch.zeros(2, 64, 1, 1), torch.ones(2, 64, 1, 1)
    drawn = torch.stack([h(x, r) for _ in range(1000)])
    assert all(len(y.unique()) == 1 for y in drawn)  # one draw for the whole batch
    assert drawn.mean() == pytest.approx(0.1, abs=0.03)
    torch.testing.assert_close(h.eval()(x, r), 0.1 * r)


def test_rezero_is_the_identity_at_first_and_learns_its_way_out():
    net = ResNet(8, shortcut="rezero")
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for unit in net.units:
        assert unit.shortcut.a == 0 and unit.shortcut.a.grad != 0


@pytest.mark.parametrize("unit, block, shortcut", [*itertools.product(UNITS, BLOCKS, SHORTCUTS)])
def test_every_combination_trains(unit, block, shortcut):
    net = ResNet(3 * len(BLOCKS[block].kernels) + 2, block, unit, shortcut)
    logits = net(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


MINE = '''
from resnetv2_cli.shortcuts import Shortcut
class Halved(Shortcut):
    """x / 2 + F(x)"""
    def forward(self, x, residual):
        return self.carry(x) / 2 + residual
class Other: pass
'''


def test_a_shortcut_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    (tmp_path / "wave.py").write_text(MINE)  # also the name of a module of Python's
    for folder in ("math", "sys", "loose"):  # the last is the user's own even without __init__.py
        (tmp_path / folder).mkdir()
    (tmp_path / "loose" / "own.py").write_text("import nothing_such")
    names = "nowhere:Halved,mine:Other,ends:X,wave:Halved,math.mine:Halved,sys.mine:Halved"
    names += ",loose.own:Halved"
    trust.admit(["--shortcut", "mine:Halved", "--grid", f"shortcut={names}"])
    h = shortcut("mine:Halved")
    x, r = torch.randn(2, 2, 16, 8, 8)
    torch.testing.assert_close(h(x, r), x / 2 + r)
    for name, message in [
        ("mine:Missing", "cannot import shortcut 'mine:Missing'"),
        ("nowhere:Halved", "cannot import shortcut 'nowhere:Halved'"),
        ("mine:Other", "'mine:Other' is not a Shortcut"),
        ("ends:X", "cannot import shortcut 'ends:X': it ends the program"),
        ("wave:Halved", "wave.py is not what is imported: /.*/wave.py has the same name"),
        ("math.mine:Halved", "math is not what is imported"),
        ("sys.mine:Halved", "sys is not what is imported: Python itself has the same name"),
        ("loose.own:Halved", "cannot import shortcut 'loose.own:Halved': No module named 'nothing"),
        ("identty", "unknown shortcut 'identty'"),
    ]:
        with pytest.raises(UserError, match=message):
            shortcut_class(name)


def test_what_fails_in_a_network_alone_is_one_line_too(monkeypatch, tmp_path, here):
    """The trial uses 64 channels, but networks for CIFAR begin with 16."""
    (tmp_path / "grouped.py").write_text(
        "from torch import nn\n"
        "from resnetv2_cli.shortcuts import Shortcut\n"
        "class Grouped(Shortcut):\n"
        "    def __init__(self, c_in, c_out, stride, carry):\n"
        "        super().__init__(c_in, c_out, stride, carry)\n"
        "        self.norm = nn.GroupNorm(32, c_out)\n"
        "    def forward(self, x, residual):\n"
        "        return self.norm(self.carry(x)) + residual\n"
    )
    monkeypatch.chdir(tmp_path)
    done = here("describe", "--depth", 8, "--shortcut", "grouped:Grouped", status=2)
    assert "code of your own fails: ValueError: num_channels (16) must be" in done.stderr
    assert "grouped.py, line 6" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "body, message",
    [
        ("return self.carry(x) + self.b * residual", "fails: AttributeError: .* no attribute 'b'"),
        ("return x + residual", r"fails: RuntimeError: The size of tensor"),
        ("return torch.cat([residual, residual], 1)", r"gives \(2, 128, 8, 8\) where F\(x\) is"),
        ("self.last = residual", "gives NoneType where"),
        ("x = self.carry(x); x += residual; return x", "rewrites x in place"),
    ],
)
def test_a_shortcut_of_ones_own_that_fails_is_one_line(refused, request, body, message):
    name = f"failing{request.node.callspec.indices['body']}"
    text = (
        "import torch\nfrom resnetv2_cli.shortcuts import Shortcut\n\nclass Own(Shortcut):\n"
        f"    def forward(self, x, residual):\n        {body}\n"
    )
    error, hint = refused("shortcut", name, text)
    assert re.search(f"shortcut '{name}:Own' {message}", error)
    assert (
        f"{name}.py, line 6: {body}" in hint
        or "see self.carry" in hint
        or "not x += ..." in hint
        or (body.startswith("self.last") and "its forward returns" in hint)
    )


def test_a_shortcut_made_otherwise_is_told_how_it_is_made(refused):
    text = (
        "from resnetv2_cli.shortcuts import Shortcut\n\nclass Own(Shortcut):\n"
        "    def __init__(self):\n        super().__init__()\n"
    )
    error, hint = refused("shortcut", "otherwise", text)
    assert "'otherwise:Own' fails: TypeError: Own.__init__()" in error
    assert "(c_in, c_out, stride, carry)" in hint


def test_a_setting_that_would_be_ignored_is_refused():
    with pytest.raises(UserError, match="shortcut conv1x1 has no setting 'gate_bias'"):
        ResNet(8, shortcut="conv1x1", settings={"gate_bias": -6.0})
