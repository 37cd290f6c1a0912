"""Units of your own: written as the layers between two units, or as a class."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from compiled import conv3x3, distance, needs_gcc, needs_products, trained_step
from conftest import REPOSITORY
from torch import nn
from torch.nn import functional as F

from resnetv2_cli import native, trust
from resnetv2_cli.ablation import studies
from resnetv2_cli.ablation.planning import plan
from resnetv2_cli.anatomy import anatomy, kinds
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import skeleton
from resnetv2_cli.errors import UserError
from resnetv2_cli.export import fold
from resnetv2_cli.plans import BLOCKS, unit_type
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS
from resnetv2_cli.units import Kind, residual_unit

# With BN after ReLU in each place, which no part of Fig. 4 has; and with BN twice.
OWN = [
    "relu bn + |", "+ relu bn |", "+ | relu bn", "bn + | bn", "+ bn | relu", "bn + bn | bn", "+ |",
]  # fmt: skip


@pytest.mark.parametrize(
    "text, name",
    [
        ("+|bn relu", "full-preact"),
        ("  + |  BN ReLU ", "full-preact"),
        ("bn+relu|", "original"),
        ("original", "original"),
        ("bn+|bn", "bn + | bn"),
        ("+|relu bn", "+ | relu bn"),
        ("mine:Own", "mine:Own"),
    ],
)
def test_a_unit_has_one_name_however_it_is_written(text, name):
    assert unit_type(text) == Experiment(unit=text).unit == name


def test_a_grid_has_each_of_them_once():
    grid = ["unit=original,+|bn relu,bn+|bn"]
    [study] = studies.studies(grid=grid)
    names = ["unit=original", "unit=full-preact", "unit=bn + | bn"]
    assert [row.name for row in study.table.rows] == names


@pytest.mark.parametrize(
    "text, message",
    [
        ("preact", "unknown unit 'preact'"),
        ("bn relu", "unknown unit 'bn relu'"),
        ("bn +", "must have one + and, after it, one |"),
        ("| bn +", "must have one + and, after it, one |"),
        ("+ + |", "must have one + and, after it, one |"),
        ("bn + | gelu", "what is 'gelu'?"),
        ("bn + | bn-relu", "what is '-'?"),
        ("relu relu + |", "has relu twice in one place"),
        ("mine:", "is no module:Class"),
    ],
)
def test_what_cannot_stand_between_two_units_is_one_line(text, message, here):
    said = here("show", "--unit", text, status=2)
    error, hint = said.stderr.splitlines()
    assert message in error and hint.startswith("hint: ")


def layers(unit: nn.Module) -> dict[str, list[str]]:
    """The layers in each part of a unit, from its modules."""
    found, names = {}, {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu"}
    for name, part in unit.named_children():
        found[name] = [names[type(m)] for m in part.modules() if type(m) in names]
    return found


@pytest.mark.parametrize("between", OWN)
def test_words_stand_where_they_are_written(between):
    last, after, before = (part.split() for part in re.split(r"[+|]", between))
    made = layers(residual_unit(Kind(between), 16, 16))
    inner = ["conv", "bn", "relu", "conv"]
    residual = [*before, *inner, *last]
    assert made == {"shared": [], "residual": residual, "shortcut": [], "after": after}
    net = ResNet(8, unit=between)
    assert layers(net)["head"] == before and layers(net)["stem"] == ["conv", "bn", "relu"]
    whole = ResNet(8, unit=between, first_act="unit")
    assert layers(whole)["stem"] == ["conv", *dict.fromkeys(last + after)]


def by_hand(unit, x):
    """``bn + | bn``: the unit of Han, Kim and Kim 2017, whose shortcut is the identity."""
    part = unit.residual

    def bn(norm, x):
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)

    y = F.conv2d(bn(part.act1.bn, x), part.conv1.weight, padding=1)
    y = F.conv2d(bn(part.act2.bn, y).relu(), part.conv2.weight, padding=1)
    return x + bn(part.last.bn, y)


def test_a_unit_that_the_paper_has_not_computes_what_is_written():
    unit, x = residual_unit(Kind("bn + | bn"), 16, 16), torch.randn(4, 16, 8, 8)
    torch.testing.assert_close(unit(x), by_hand(unit, x))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_they_go_with_every_block_and_shortcut(block, shortcut):
    for between in OWN:
        net = ResNet(3 * len(BLOCKS[block].kernels) + 2, block, between, shortcut)
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())


@needs_gcc
@pytest.mark.parametrize("between", OWN)
def test_compiled_operations_compute_them(between):
    net = ResNet(8, unit=between)
    exact = trained_step(copy.deepcopy(net).double(), "eager")
    eager, compiled = (trained_step(copy.deepcopy(net), mode) for mode in ("eager", "compiled"))
    assert distance(compiled[0], exact[0]) < 1e-4
    # Eager too may have a value on the other side of a ReLU than float64.
    assert distance(compiled[1], exact[1]) < 2 * distance(eager[1], exact[1]) + 1e-3


@needs_products
@pytest.mark.parametrize("depth, block", [(14, "basic"), (20, "bottleneck")])
@pytest.mark.parametrize("between", OWN)
def test_joined_operations_compute_them(between, depth, block, monkeypatch):
    """Within F, and where a unit begins with such layers; no farther from float64 than eager."""
    names, call = [], native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (names.append(name), call(name, *rest)))
    net = ResNet(depth, block, between)
    exact = trained_step(copy.deepcopy(net).double(), "eager")
    eager, found = (trained_step(net, mode, mixed=True) for mode in ("eager", "compiled"))
    layer = "pointwise" if block == "bottleneck" else conv3x3("bf16")
    assert f"{layer}_backward_bf16" in names
    for i in (0, 1):
        assert distance(found[i], exact[i]) < 1.3 * distance(eager[i], exact[i]) + 1e-3


@pytest.mark.parametrize("between", OWN)
def test_their_bn_is_folded_only_into_a_convolution_right_before_it(between):
    net = ResNet(8, unit=between)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.bias)
    net, x = net.eval(), torch.randn(4, 3, 32, 32)
    expected = net(x)
    gone = fold.folded_into(net)
    assert any(".last." in name for name in gone) == between.startswith("bn")
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


MINE = '''
from torch import nn
from resnetv2_cli.units import ResidualUnit


class Scaled(nn.Module):
    """A module with a convolution that it starts at 0, as it wants."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.weight.weight)

    def forward(self, x):
        return x * (1 + self.weight(x))


class Own(ResidualUnit):
    """Two weights and a module of one's own; BN ends F, and nothing follows the addition."""

    between = "bn + | relu"

    @classmethod
    def weights(cls, kind, c_in, width, c_out, stride):
        yield from super().weights(kind, c_in, width, c_out, stride)
        yield "scaled", Scaled(c_out)


class Other: pass
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file of the user's in the current folder; the name of its module."""
    name = f"own{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    trust.admit(f"--unit={name}:{cls}" for cls in ("Own", "Other", "Missing"))
    return name


def test_a_class_of_ones_own_is_a_unit(mine):
    e = Experiment(unit=f"{mine}:Own", depth=8)
    inner = ("weight 3x3, 16", "BN", "ReLU", "weight 3x3, 16", "Scaled", "BN")
    assert kinds(skeleton(e))[0].anatomy.residual == inner
    assert sys.path[-1] == str(Path.cwd())  # after everything installed
    net = ResNet(**e.architecture)
    assert anatomy(net.units[1]).residual[0] == "ReLU" and layers(net)["head"] == ["relu"]
    for unit in net.units:
        assert not unit.residual.scaled.weight.weight.any()  # as its class initializes it
        weight = unit.residual.conv2.weight  # as all others in the network
        assert weight.std().item() == pytest.approx((2 / weight[:, 0].numel()) ** 0.5, rel=0.1)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_class_that_cannot_be_used_is_one_line(mine):
    for cls, message in [
        ("Missing", f"cannot import unit '{mine}:Missing'"),
        ("Other", f"'{mine}:Other' is not a ResidualUnit"),
    ]:
        with pytest.raises(UserError, match=message):
            ResNet(8, unit=f"{mine}:{cls}")
    with pytest.raises(UserError, match="is code that a file asks for, not the command line"):
        ResNet(8, unit="strange:Unit")


BROKEN = {
    'between = "bn |"': ("'bn |' must have one +", "such as"),
    'between = "mine:Own"': ("unknown unit 'mine:Own'", "original"),
    "weights = lambda kind, c_in: []": ("fails: TypeError", "given (kind, c_in, width"),
    "weights = lambda kind, c, w, c_out, s: [('conv1', nn.Conv2d(c, c_out, 1))]": (
        "gives .* where F.x. is",
        "c_out",
    ),
    "def forward(self, x): return x.nothing": ("fails: AttributeError", "line 5: def forward"),
    "def forward(self, x): pass": ("gives NoneType where x_l.1 is", "its forward returns"),
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_class_that_fails_is_one_line(body, refused, request):
    name, (message, hint) = f"broken{request.node.callspec.indices['body']}", BROKEN[body]
    text = (
        "from torch import nn\nfrom resnetv2_cli.units import ResidualUnit\n\n"
        f"class Own(ResidualUnit):\n    {body}\n"
    )
    error, said = refused("unit", name, text)
    assert re.search(message, error) and hint in said


def test_it_is_trained_evaluated_and_kept(mine, here, resnetv2, tmp_path):
    unit, small = f"{mine}:Own", ["--dataset", "digits", "--depth", 8, "--batch-size", 128]
    said = here("train", *small, "--unit", unit, "--epochs", 1, "--output", "run")
    assert f"resnetv2 eval run --allow-code {unit}" in said.stderr
    refused = resnetv2("eval", "run", status=2, cwd=tmp_path).stderr  # not imported there yet
    assert f"{unit} is code that a file asks for" in refused
    assert f"{mine}.Own" in resnetv2("eval", "run", "--allow-code", unit, cwd=tmp_path).stdout
    code = json.loads((tmp_path / "run" / "manifest.json").read_text())["code"]
    assert code["unit"]["source"] == MINE and "shortcut" not in code


def test_another_file_is_another_run(mine, tmp_path):
    """A run's folder is named after its code too."""
    e = Experiment(unit=f"{mine}:Own", depth=8)
    before = studies.digest(e)
    with (tmp_path / f"{mine}.py").open("a") as file:
        file.write("# changed\n")
    assert studies.digest(e) != before


@pytest.mark.parametrize("unit", ["bn + | bn", "mine:Own"])
def test_an_ablation_of_it_has_the_original_units_beside_it(unit, mine, tmp_path):
    unit = unit.replace("mine", mine)
    [study] = studies.studies(unit=unit)
    rows = study.table.rows
    assert [row.name for row in rows] == ["original", "full-preact", unit]
    assert [row.published for row in rows[:2]] == [6.61, 6.37] and rows[2].published is None
    assert [row.baseline for row in rows] == ["", "original", "original"]
    made = plan(study, 1, {"depth": 20}, tmp_path, "laptop")
    assert {line.arms[0].experiment.depth for line in made.lines} == {20}
    folders = [line.arms[0].folder.parent.name for line in made.lines]
    assert len(set(folders)) == 3 and not any(set(name) & set("+| :") for name in folders)
    [table] = studies.studies(tables=[2])  # which shares two of the runs
    theirs = plan(table, 1, {"steps": 9}, tmp_path).lines
    ours = plan(study, 1, {"steps": 9}, tmp_path).lines
    assert [line.arms[0].folder for line in ours[:2]] == [theirs[n].arms[0].folder for n in (0, 4)]


def test_the_unit_of_the_readme_is_one(tmp_path, monkeypatch):
    text = (REPOSITORY / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    file = code.splitlines()[0].removeprefix("# ")
    (tmp_path / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    [name] = set(re.findall(r"--unit (\w+:\w+)", text))
    assert name.partition(":")[0] == file.removesuffix(".py")
    trust.admit(["--unit", name])
    net = ResNet(8, unit=name)
    assert anatomy(net.units[1]).residual[-1] == "Excite"
    gates = []
    for unit in net.units:
        unit.residual.excite[-1].register_forward_hook(lambda m, args, out: gates.append(out))
    net(torch.randn(2, 3, 32, 32))
    assert [tuple(gate.shape) for gate in gates] == [(2, c, 1, 1) for c in (16, 32, 64)]
