"""Settings of a class of your own, given after its name: mine:Scaled:start=0.5."""

import json
import re

import pytest
import torch
from conftest import REPOSITORY, SMALL

from resnetv2_cli import trust
from resnetv2_cli.ablation import arms, studies
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import decided, describe
from resnetv2_cli.errors import UserError
from resnetv2_cli.manifest import own_files
from resnetv2_cli.ownname import OwnName
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.units import ResidualUnit, unit_class

CODE = '''
import torch
from torch import nn
from resnetv2_cli.shortcuts import Shortcut
from resnetv2_cli.units import ResidualUnit


class Scaled(Shortcut):
    """a x + F(x)"""

    def __init__(self, *given, start=1.0, learned=True, gate_bias=None, kind="a"):
        super().__init__(*given)
        a = torch.full((), start)
        self.a = nn.Parameter(a) if learned else a
        self.bias, self.kind = gate_bias, kind

    def forward(self, x, residual):
        return self.a * self.carry(x) + residual


class Deep(Shortcut):
    def __init__(self, *given, depth=1, pad=0):
        super().__init__(*given)


class Wide(ResidualUnit):
    """F of more channels inside."""

    ratio = 2
    between = "bn + | bn"
    _hidden = 1

    @classmethod
    def weights(cls, kind, c_in, width, c_out, stride):
        yield from super().weights(kind, c_in, cls.ratio * width, c_out, stride)


class Wider(Wide):
    ratio, more = 4, 0
'''


CLASSES = re.findall(r"class (\w+)", CODE)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a module with this code, in the current folder."""
    name = f"settled{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    words = [w for cls in CLASSES for w in ("--allow-code", f"{name}:{cls}")]
    trust.admit(words)
    return name


@pytest.mark.parametrize(
    "text, settings, written",
    [
        ("mine:Own", {}, None),
        ("a.b:Own:x=0.50", {"x": 0.5}, "a.b:Own:x=0.5"),
        ("mine:Own:x=1.0", {"x": 1.0}, None),
        ("mine:Own:x=1", {"x": 1}, None),
        ("mine:Own:x=12345678901234567", {"x": 12345678901234567}, None),
        ("mine:Own:x=1e300", {"x": 1e300}, "mine:Own:x=1e+300"),
        ("mine:Own:x=-6", {"x": -6}, None),
        ("mine:Own:x=1e-4", {"x": 1e-4}, "mine:Own:x=0.0001"),
        ("mine:Own:x=1e-07", {"x": 1e-7}, None),
        ("mine:Own:y=True:x=false", {"x": False, "y": True}, "mine:Own:x=false:y=true"),
        ("mine:Own:x=1:y=word", {"x": 1, "y": "word"}, None),
    ],
)
def test_a_class_with_settings_has_one_name_however_it_is_written(text, settings, written):
    own = OwnName.of(text)
    assert own.settings == settings and own.place == text.partition(":Own")[0] + ":Own"
    assert list(map(type, own.settings.values())) == list(map(type, settings.values()))
    for experiment in (Experiment(shortcut=text), Experiment(unit=text)):
        assert (written or text) in (experiment.shortcut, experiment.unit)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mine:Own:", "is no module:Class"),
        ("mine:Own:x", "is no module:Class"),
        ("mine:Own:x=", "is no module:Class"),
        ("mine:Own:x=1 ", "is no module:Class"),
        ("mine:Own:x=a/b", "is no module:Class"),
        ("mine:Own(x=1)", "is no module:Class"),
        ("mine:Own:x=1:x=2", "has a setting twice"),
        ("mine:Own:x=nan", "nan is not finite"),
        ("mine:Own:x=-inf", "-inf is not finite"),
        ("mine:Own:x=1e999", "1e999 is not finite"),
    ],
)
def test_what_is_no_such_name_is_refused(text, message):
    for kind in ("shortcut", "unit"):
        with pytest.raises(UserError, match=re.escape(message)):
            Experiment(**{kind: text})


def test_a_shortcut_is_made_with_its_settings(mine):
    made = ResNet(8, shortcut=f"{mine}:Scaled:start=2:learned=false:kind=b").units[0].shortcut
    assert float(made.a) == 2 and not made.a.requires_grad and made.kind == "b"
    made = ResNet(8, shortcut=f"{mine}:Scaled:gate_bias=-3.0:kind=3").units[0].shortcut
    assert made.a.item() == 1 and made.a.requires_grad and made.kind == "3"
    assert made.bias == -3 and isinstance(made.bias, float)  # as written: no default tells its type
    made = ResNet(8, shortcut=f"{mine}:Scaled:start=0", settings={"gate_bias": -1.0})
    assert made.units[0].shortcut.bias == -1 and made.units[0].shortcut.a.item() == 0


@pytest.mark.parametrize(
    "cls, given, message, hint",
    [
        ("Scaled", "strt=1", "has no setting 'strt'", "start, learned, gate_bias, kind"),
        ("Scaled", "c_in=1", "has no setting 'c_in'", "keyword arguments of its __init__"),
        ("Scaled", "start=x", "start of shortcut .* must be a number, not 'x'", "default is 1.0"),
        ("Scaled", "start=true", "must be a number, not True", "default is 1.0"),
        ("Scaled", "learned=1", "must be true or false, not 1", "default is True"),
        ("Wide", "wide=1", "has no setting 'wide'", "ratio (numbers"),
        ("Wide", "between=1", "has no setting 'between'", "ratio"),
        ("Wide", "_hidden=1", "has no setting '_hidden'", "ratio"),
        ("Wider", "training=true", "has no setting 'training'", "ratio, more"),
        ("Wide", "ratio=x", "ratio of unit .* must be a number", "default is 2"),
    ],
)
def test_a_setting_that_a_class_has_not_is_one_line(mine, here, cls, given, message, hint):
    kind = "shortcut" if cls == "Scaled" else "unit"
    for command in ("train", "describe"):
        flags = [f"--{kind}", f"{mine}:{cls}:{given}", "--dataset", "digits", "--depth", 8]
        error, told = here(command, *flags, status=2).stderr.splitlines()[-2:]
        assert re.search(message, error) and hint in told


def test_a_setting_is_given_in_one_place(mine):
    with pytest.raises(UserError, match="--gate-bias is in the name .* too"):
        Experiment(shortcut=f"{mine}:Scaled:gate_bias=-3", gate_bias=-3.0)


def test_a_unit_has_its_settings_and_its_class_is_one(mine):
    """Compilers and caches recognize a class by its identity."""
    wide, three = unit_class(f"{mine}:Wide"), unit_class(f"{mine}:Wide:ratio=3")
    assert unit_class(f"{mine}:Wide:ratio=3") is three and issubclass(three, wide)
    assert (wide.ratio, three.ratio, unit_class(f"{mine}:Wider:more=1").more) == (2, 3, 1)
    assert issubclass(three, ResidualUnit) and three.__doc__ == wide.__doc__
    net = ResNet(8, unit=f"{mine}:Wide:ratio=3")
    assert {type(unit) for unit in net.units} == {three}
    assert net.units[0].residual.conv1.out_channels == 3 * 16
    assert list(net.units[0].residual.last._modules) == list(
        ResNet(8, unit="bn + | bn").units[0].residual.last._modules
    )


def test_rows_that_differ_in_a_setting_are_different_experiments(mine, tmp_path):
    values = [f"{mine}:Scaled:start={start}" for start in ("0.0", "0.00", "1", "1.5")]
    [study] = studies.studies(grid=[f"shortcut={','.join(values)}"])
    experiments = [Experiment(**row.settings) for row in study.table.rows]
    folders = [arms.Arm.of("row", e, tmp_path).folder for e in experiments]
    assert len({*folders}) == 3 and folders[0] == folders[1]
    assert all(re.fullmatch(r"[\w.-]+", folder.parent.name) for folder in folders)
    assert {files[0].name for e in experiments for files in own_files(e).values()} == {f"{mine}.py"}
    assert [decided(e)["start of the shortcut"] for e in experiments] == [0, 0, 1, 1.5]
    small = Experiment(depth=8, shortcut=values[0])
    assert describe(small, 10)["parameters"] == describe(Experiment(depth=8), 10)["parameters"] + 3


def test_settings_are_called_as_one_likes(mine, here):
    """A shortcut's own ``depth`` is not the network's."""
    words = here("diff", f"dataset=digits,depth=8,shortcut={mine}:Deep:depth=3", "depth=14").stdout
    assert re.search(r"depth +│ +8 │ +14 │", words) and "are the same" not in words
    made = here(
        "diff", f"dataset=digits,depth=8,shortcut={mine}:Deep", "shortcut=identity", "--json"
    )
    assert json.loads(made.stdout)["settings"] == {
        "shortcut": [f"{mine}:Deep", "identity"],
        "depth of the shortcut": [1, None],
        "pad of the shortcut": [0, None],
    }


def test_weights_of_other_settings_are_refused_with_the_flags_that_fit(mine, here, tmp_path):
    given = ["--shortcut", f"{mine}:Scaled:start=0.5", "--steps", 1, "--output", tmp_path / "run"]
    here("train", *SMALL, *given)
    for other in ("identity", f"{mine}:Scaled:start=1"):
        given = ["--weights", tmp_path / "run", "--shortcut", other, "--output", tmp_path / "b"]
        said = here("train", *SMALL, *given, "--steps", 1, status=2).stderr.splitlines()[-1]
        assert said == f"hint: it is that of --shortcut {mine}:Scaled:start=0.5"


def test_a_run_keeps_its_settings(mine, here, resnetv2, tmp_path):
    """Its checkpoint names them. Only the command line admits the code, whatever its settings."""
    flags = ["--shortcut", f"{mine}:Scaled:start=0.25:learned=false", "--steps", 2]
    here("train", *SMALL, *flags, "--output", tmp_path / "run")
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["experiment"]["shortcut"] == f"{mine}:Scaled:learned=false:start=0.25"
    error = json.loads((tmp_path / "run/result.json").read_text())["test_error"]
    refused = resnetv2("eval", tmp_path / "run", status=2).stderr
    assert f"--allow-code {mine}:Scaled\n" in refused
    said = here("eval", tmp_path / "run", "--allow-code", f"{mine}:Scaled", "--json")
    assert json.loads(said.stdout)["error"] == error


def test_the_classes_of_the_readme_have_settings(tmp_path, monkeypatch):
    """Under other module names: other tests have a module ``mine``."""
    text = (REPOSITORY / "README.md").read_text()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        (tmp_path / f"of_the_readme{number}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    names = "of_the_readme0:LearnedScale:start=0.5", "of_the_readme1:Squeezed:ratio=8"
    for name, kind in zip(names, ("shortcut", "unit"), strict=True):
        assert name.partition(":")[2] in text
        trust.admit([f"--{kind}", name])
        net = ResNet(8, **{kind: name})
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        if kind == "unit":
            assert net.units[0].residual.excite[1].out_channels == 2
        else:
            assert all(unit.shortcut.a.item() == 0.5 for unit in net.units)
