"""Code of your own: what it may consist of, and what happens when it changes."""

import copy
import json
import re
import sys
from collections import OrderedDict

import pytest
import torch
from compiled import MODES, distance, needs_gcc, trained_step
from conftest import SMALL
from torch import nn

from resnetv2_cli import trust
from resnetv2_cli.ablation import studies
from resnetv2_cli.analysis import shrink
from resnetv2_cli.analysis.trace import trace
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import Uncounted, describe
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import fold
from resnetv2_cli.layers import Activation, Branch, conv
from resnetv2_cli.machine import memory_line
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import Shortcut
from resnetv2_cli.syncbn import OverProcesses, SyncBN

UNITS = '''
import torch
from torch import nn
from resnetv2_cli.layers import activation, conv
from resnetv2_cli.units import ResidualUnit


class Gelu(nn.Sequential):
    def __init__(self, c_in, c_out, stride):
        super().__init__(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.GELU())


class Own(ResidualUnit):
    @classmethod
    def weights(cls, kind, c_in, width, c_out, stride):
        yield from cls.layers(c_in, width, c_out, stride)


class Silu(Own):
    """In place on what BN made."""
    def layers(c_in, width, c_out, stride):
        yield "conv1", conv(c_in, width, 3, stride)
        yield "norm", activation("bn", width)
        yield "silu", nn.SiLU(inplace=True)
        yield "conv2", conv(width, c_out, 3)


class Named(Own):
    def layers(c_in, width, c_out, stride):
        yield "conv1", conv(c_in, width, 3, stride)
        yield "act1", nn.GELU()
        yield "conv2", conv(width, c_out, 3)


class Last(Own):
    def layers(c_in, width, c_out, stride):
        yield "last", conv(c_in, c_out, 3, stride)


class Deep(Own):
    """Depthwise, dilated, and a linear layer at every pixel."""
    def layers(c_in, width, c_out, stride):
        yield "conv1", nn.Conv2d(c_in, c_in, 3, stride, 2, dilation=2, groups=c_in, bias=False)
        yield "mix", Mixed(c_in, c_out)


class Mixed(nn.Linear):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Decides(ResidualUnit):
    def forward(self, x):
        return super().forward(x if float(x.detach().mean()) > -9 else -x)


class Groups(Own):
    """As many groups as the usual networks of ImageNet have."""
    def layers(c_in, width, c_out, stride):
        yield "conv1", conv(c_in, width, 3, stride)
        yield "norm", nn.GroupNorm(32, width)
        yield "conv2", conv(width, c_out, 1)


class Forward(ResidualUnit):
    def forward(self, x):
        return self.after(self.shortcut.carry(x) + self.residual(self.shared(x)))


class Inside(ResidualUnit):
    """Fails within PyTorch, in no line of its own."""
    @classmethod
    def weights(cls, kind, c_in, width, c_out, stride):
        return iter([("conv1", nn.Conv2d(c_in + 1, c_out, 3, stride, 1))])


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Tuple(Own):
    def layers(c_in, width, c_out, stride):
        yield "conv1", conv(c_in, width, 3, stride)
        yield "both", First()
        yield "conv2", conv(width, c_out, 3)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.pair(x)[0]
'''


@pytest.fixture
def units(tmp_path, monkeypatch):
    """The name of a module with these units, in the current folder."""
    name = f"units{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(UNITS)
    monkeypatch.chdir(tmp_path)
    classes = re.findall(r"class (\w+)", UNITS)
    trust.admit(word for cls in classes for word in ("--allow-code", f"{name}:{cls}"))
    return name


@pytest.mark.parametrize("mode", ["forget", "plain-forget"])
def test_what_somebody_wrote_into_is_not_made_again(units, mode):
    net = ResNet(8, unit=f"{units}:Silu")
    kept = trained_step(net, "compiled" if mode == "forget" else "eager")
    again = trained_step(net, mode)
    assert distance(again[0], kept[0]) < 1e-4 and distance(again[1], kept[1]) < 1e-3


class Rewrites(Shortcut):
    """x + F(x), written into F(x)."""

    def forward(self, x, residual):
        residual += self.carry(x)
        return residual


def test_nor_by_a_shortcut(monkeypatch):
    monkeypatch.setitem(sys.modules["resnetv2_cli.shortcuts"].SHORTCUTS, "rewrites", Rewrites)
    net = ResNet(8, unit="bn + |", shortcut="rewrites")
    kept, again = (trained_step(net, mode) for mode in ("compiled", "forget"))
    assert distance(again[0], kept[0]) < 1e-4 and distance(again[1], kept[1]) < 1e-3


class Pooled(Shortcut):
    """The mean of x over the image, at every pixel, + F(x)."""

    def __init__(self, c_in, c_out, stride, carry):
        carry = nn.Sequential(carry, nn.AdaptiveAvgPool2d(1))
        super().__init__(c_in, c_out, stride, carry)


@needs_gcc
@pytest.mark.parametrize("unit", ["original", "full-preact"])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_shortcut_carries_is_added_at_every_pixel(unit, mixed, monkeypatch):
    """Operations that add as they write broadcast as PyTorch's addition does."""
    monkeypatch.setitem(sys.modules["resnetv2_cli.shortcuts"].SHORTCUTS, "pooled", Pooled)
    net = ResNet(8, unit=unit, shortcut="pooled")
    exact = trained_step(copy.deepcopy(net).double(), "eager")
    eager, found = (trained_step(net, mode, mixed=mixed) for mode in ("eager", "compiled"))
    for i in (0, 1):
        assert distance(found[i], exact[i]) < 1.3 * distance(eager[i], exact[i]) + 1e-3


@needs_gcc
@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_bn_and_something_else_than_relu_is_not_bn_and_relu(name):
    act = Activation(OrderedDict({"bn": nn.BatchNorm2d(16), name: nn.GELU()})).train()
    x = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
    expected = nn.GELU()(copy.deepcopy(act.bn)(x))
    act.compiled = True
    torch.testing.assert_close(act(x), expected)
    assert act.norm is None and not Activation(OrderedDict(relu=nn.GELU())).bare


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["compiled", "forget"])
def test_bn_that_learns_no_scale_is_pytorchs(mode, training):
    norm = nn.BatchNorm2d(16, affine=False)
    act = Activation(OrderedDict(bn=norm, relu=nn.ReLU()))
    branch = Branch(OrderedDict(act=act, conv=conv(16, 16, 1)))
    branch.to(memory_format=torch.channels_last).train(training)
    x = torch.randn(4, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = branch(x)
        branch.compiled, (act.compiled, act.forget) = True, MODES[mode]
        assert torch.equal(branch(x), expected)


@pytest.mark.parametrize("cls, name", [("Named", "act1"), ("Last", "last")])
def test_no_layer_takes_the_place_of_another(units, cls, name):
    with pytest.raises(UserError, match=f"has two layers called '{name}'"):
        ResNet(8, unit=f"{units}:{cls}")


def test_depthwise_weights_have_the_variance_that_relu_asks_for(units):
    """He et al. 2015: 2 / n_l, where n_l counts the outputs that one value reaches: 9, not 9 c."""
    net = ResNet(8, unit=f"{units}:Deep")
    for unit in net.units[1:]:
        std = unit.residual.conv1.weight.std().item()
        assert std == pytest.approx((2 / 9) ** 0.5, rel=0.15)


def test_what_units_of_ones_own_compute_is_counted(units):
    made = describe(Experiment(depth=8, unit=f"{units}:Deep"))
    stem, first, *_ = made["parts"]
    assert first["macs"] == (16 * 9 + 16 * 16) * 32 * 32
    assert (stem["receptive_field"], first["receptive_field"]) == (3, 3 + 2 * 2)
    assert describe(Experiment(depth=8, unit=f"{units}:Tuple"))["parts"]


def test_code_that_looks_at_numbers_trains_uncounted(units, here, tmp_path):
    name = f"{units}:Decides"
    e = Experiment(dataset="digits", depth=8, unit=name)
    with pytest.raises(Uncounted, match=f"{name} cannot be counted without computing"):
        describe(e)
    assert memory_line(e).startswith(f"what a step needs is not known: {name}")
    said = here("train", *SMALL, "--unit", name, "--steps", 2, "--output", "run")
    assert "test error" in said.stdout
    assert "cannot be counted" in here("describe", "--depth", 8, "--unit", name, status=2).stderr


def test_a_unit_is_tried_in_the_shapes_that_its_network_has(units):
    name = f"{units}:Groups"
    ResNet(18, unit=name, stem="imagenet")
    with pytest.raises(UserError, match="fails: ValueError: num_channels .16. must be divisible"):
        ResNet(8, unit=name)


def test_a_failure_within_pytorch_is_explained_by_what_is_expected(units):
    with pytest.raises(UserError, match="fails: RuntimeError") as failed:
        ResNet(8, unit=f"{units}:Inside")
    assert "given (kind, c_in, width, c_out, stride)" in failed.value.hint


def test_an_ablation_of_a_broken_unit_begins_nothing(units, here, tmp_path):
    asked = ["--unit", f"{units}:Last", "--dataset", "digits", "--depth", 8, "--output", "lab"]
    assert "two layers called" in here("ablate", *asked, status=2).stderr
    assert not (tmp_path / "lab").exists()


def test_an_analysis_of_a_forward_of_its_own_is_one_line(units):
    net = ResNet(8, unit=f"{units}:Forward")
    with pytest.raises(UserError, match="stage1.unit1 has a forward of its own"):
        trace(net, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))


def test_f_is_shrunk_whatever_it_ends_in():
    net = ResNet(8).double()
    for unit in net.units:
        unit.residual.add_module("gate", nn.Sigmoid())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small = shrink.shrunk(net, 1e-4)
    at = net.stem(x)
    whole = net.units[0].residual(at)
    torch.testing.assert_close(small.units[0].residual(at), 1e-4 * whole)


class Standardized(nn.Conv2d):
    """Computes with weights other than those it stores."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


@pytest.mark.parametrize(
    "conv, norm",
    [
        (Standardized(4, 4, 3), nn.BatchNorm2d(4)),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_only_what_can_be_folded_is(conv, norm):
    net = nn.Sequential(nn.Sequential(conv, norm)).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = net(x)
    assert fold.folded_into(net) == []
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize(
    "how", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}]
)
def test_any_bn_is_exchanged_for_one_of_all_processes(how, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("resnetv2_cli.syncbn.all_reduce", lambda x: x)  # the sum over one process
    bn = nn.BatchNorm2d(4, **how).train()
    x = torch.randn(8, 4, 3, 3)
    net = OverProcesses().apply(nn.Sequential(copy.deepcopy(bn)))
    assert type(net[0]) is SyncBN
    for _ in range(3):
        torch.testing.assert_close(net(x), bn(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(net[0].state_dict()), dict(bn.state_dict()))


def test_bn_without_averages_is_recomputed_too():
    net = ResNet(8)
    for unit in net.units:
        c = unit.residual.conv1.out_channels
        unit.residual.act2.bn = nn.BatchNorm2d(c, track_running_stats=False)
    net.segments = 2
    net(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of several files, which also imports an installed module; the name of its unit."""
    name = f"pack{abs(hash(tmp_path))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "parts.py").write_text("from .more import SCALE\n")
    (tmp_path / name / "more.py").write_text("SCALE = 1.0\n")
    (tmp_path / name / "other.py").write_text("")
    installed = tmp_path / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / f"{name}_installed.py").write_text("")
    monkeypatch.syspath_prepend(installed)
    (tmp_path / name / "unit.py").write_text(
        f"import {name}_installed\n"
        "from resnetv2_cli.units import ResidualUnit\nfrom .parts import SCALE\n\n"
        "class Own(ResidualUnit):\n"
        "    def forward(self, x): return SCALE * super().forward(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    unit = f"{name}.unit:Own"
    trust.admit(["--unit", unit])
    return unit


@pytest.mark.parametrize(
    "file, changes", [("unit", True), ("more", True), ("other", False), ("installed", False)]
)
def test_code_is_known_by_all_files_that_it_is_made_of(package, tmp_path, file, changes):
    e = Experiment(depth=8, unit=package)
    before = studies.digest(e)
    [path] = tmp_path.rglob(f"*{file}.py")
    path.write_text(path.read_text() + "\n# changed\n")
    assert (studies.digest(e) != before) == changes


def test_a_run_is_not_continued_by_other_code(package, here, resnetv2, tmp_path):
    small = [*SMALL, "--unit", package, "--output"]
    here("train", *small, "run", "--steps", 3)
    here("train", *small, "second", "--steps", 3)
    code = json.loads((tmp_path / "run" / "manifest.json").read_text())["code"]["unit"]
    names = [path.rpartition("/")[2] for path in code["with"]]
    assert names == ["__init__.py", "more.py", "parts.py"]
    more = tmp_path / package.partition(".")[0] / "more.py"
    more.write_text("SCALE = 0.5\n")
    said = here("train", "--resume", "run", "--steps", 6, "--allow-code", package, status=2)
    assert f"{package} has changed since the run began" in said.stderr
    assert (
        f"{package} has changed since this was trained"
        in here("eval", "run", "--allow-code", package).stderr
    )
    more.write_text("SCALE = 1.0\n")
    here("train", "--resume", "run", "--steps", 6, "--allow-code", package)
    assert "has changed" not in here("eval", "run", "--allow-code", package).stderr
    manifest = tmp_path / "second" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(code["sha256"], "0" * 64))
    assert "code of the unit" in here("runs", "compare", "run", "second").stdout


@pytest.mark.parametrize("text", ["def broken(:", "raise RuntimeError('not here')"])
def test_what_may_be_imported_and_cannot_be_keeps_no_training_from_beginning(
    text, package, tmp_path, here
):
    """Files are only looked up, to recognize the code later; they may never be imported."""
    folder = tmp_path / package.partition(".")[0]
    (folder / "later").mkdir()
    (folder / "later" / "__init__.py").write_text(text)
    (folder / "other.py").write_text(text)
    unit = folder / "unit.py"
    unit.write_text(
        unit.read_text() + "\ndef later():\n    from . import other\n"
        "    from .later import part\n    import later.part\n"
    )
    here("train", *SMALL, "--unit", package, "--steps", 1, "--output", "run")
