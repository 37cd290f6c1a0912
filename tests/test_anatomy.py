"""The layers of h, F and f in each unit, compared with Figs. 2 and 4, and its picture."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from resnetv2_cli.anatomy import anatomy, kinds
from resnetv2_cli.blueprint import blueprint
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import describe, skeleton
from resnetv2_cli.plans import UNITS
from resnetv2_cli.shortcuts import SHORTCUTS, Shortcut
from resnetv2_cli.units import Kind, residual_unit

FIGURE_4 = {  # F, then the layers after the addition
    "original": ("weight BN ReLU weight BN", "ReLU"),
    "bn-after-add": ("weight BN ReLU weight", "BN ReLU"),
    "relu-before-add": ("weight BN ReLU weight BN ReLU", ""),
    "relu-only-preact": ("ReLU weight BN ReLU weight BN", ""),
    "full-preact": ("BN ReLU weight BN ReLU weight", ""),
}
FIGURE_2 = {  # the operations on the shortcut, and the factor of F
    "identity": ("", ""),
    "constant-scale": ("a x", "b"),
    "exclusive-gate": ("(1 - g(x)) x", "g(x)"),
    "shortcut-only-gate": ("(1 - g(x)) x", ""),
    "conv1x1": ("weight 1x1, 16, BN", ""),
    "dropout": ("dropout(x)", ""),
    "stochastic-depth": ("", "d"),
    "rezero": ("", "a"),
}


def parts(**kind):
    with torch.device("meta"):
        return anatomy(residual_unit(Kind(**kind), 16, 16))


def words(layers) -> str:
    return " ".join(layer.split()[0] for layer in layers)


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_those_of_figure_4(unit):
    a = parts(unit=unit)
    assert (words(a.residual), words(a.after)) == FIGURE_4[unit]
    assert a.shared == a.shortcut == () and a.formula == "x + F(x)"


def test_padding_says_how_many_channels_it_adds_and_its_stride():
    with torch.device("meta"):
        assert anatomy(residual_unit(Kind(), 16, 64, stride=2)).shortcut == ("zero-pad +48, /2",)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_shortcuts_are_those_of_figure_2(shortcut):
    a = parts(unit="original", shortcut=shortcut)
    assert (", ".join(a.shortcut), a.scale) == FIGURE_2[shortcut]
    assert "F(x)" in a.formula and "Fig" not in a.formula and "where" not in a.formula


def test_a_shortcut_without_a_formula_is_named():
    class Mine(Shortcut):
        """Something new."""

    with torch.device("meta"):
        unit = residual_unit(Kind(), 16, 16)
        unit.shortcut = Mine(16, 16, 1, unit.shortcut.carry)
    a = anatomy(unit)
    assert (a.formula, a.shortcut, a.scale) == ("Mine(x, F(x))", ("Mine",), "")


@pytest.mark.parametrize(
    "written, formula, h, scale",
    [
        ("(x + F(x)) / sqrt(2): the sum of two", "(x + F(x)) / sqrt(2)", "Mine", ""),
        ("2 (a x + F(x))", "2 (a x + F(x))", "Mine", ""),
        ("(1 + a) x + (1 - a) F(x), say", "(1 + a) x + (1 - a) F(x)", "(1 + a) x", "(1 - a)"),
        ("a x + b * F(x)", "a x + b * F(x)", "a x", "b"),
        ("x + F(x) / sqrt(2)", "x + F(x) / sqrt(2)", "Mine", ""),
        ("x + a * F(x) - G(x)", "x + a * F(x) - G(x)", "Mine", ""),
        ("x + G(x) - F(x)", "x + G(x) - F(x)", "Mine", ""),
    ],
)
def test_a_formula_is_cut_at_the_plus_and_at_a_factor_of_f(written, formula, h, scale):
    cls = type("Mine", (Shortcut,), {"__doc__": written})
    with torch.device("meta"):
        unit = residual_unit(Kind(), 16, 16)
        unit.shortcut = cls(16, 16, 1, unit.shortcut.carry)
    a = anatomy(unit)
    assert (a.formula, a.shortcut, a.scale) == (formula, (h,), scale)


def test_units_that_are_alike_are_told_once():
    made = describe(Experiment(depth=164))["units"]
    stages = [f"stage {s}, unit{u}" for s in (1, 2, 3) for u in (" 1", "s 2 to 18")]
    assert [u["units"] for u in made] == stages
    first, inner, strided = made[0], made[1], made[2]
    assert first["shortcut"] == ("weight 1x1, 64",) and words(first["residual"])[:6] == "weight"
    assert words(inner["residual"])[:7] == "BN ReLU" and inner["shortcut"] == ()
    assert strided["shared"] == ("BN", "ReLU")  # projections are pre-activated too
    assert strided["equations"][0] == "y_l = x + F(x), x = BN -> ReLU of x_l"
    assert strided["residual"][0] == "weight 1x1, 32, /2"


@pytest.mark.parametrize(
    "given", [{"shortcut": "exclusive-gate", "unit": "original"}, {"option": "B"}]
)
def test_the_picture_has_every_layer_of_every_kind_of_unit(tmp_path, here, given):
    """Including those that both paths share before a projection."""
    flags = ["--depth", 20, *(word for k, v in given.items() for word in (f"--{k}", v))]
    for name in ("a.svg", "b.svg"):
        done = here("describe", *flags, "--picture", tmp_path / name)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    said = ["".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("}text")]
    drawn = []
    for alike in kinds(skeleton(Experiment(depth=20, **given))):
        assert alike.name in said
        a = alike.anatomy
        drawn += [*a.shared, *a.residual, *a.shortcut, *a.after]
        drawn += [f"× {a.scale}"] if a.scale else []
    for layer in drawn:
        assert said.count(layer) == drawn.count(layer), layer
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "stage 2, unit 1" in done.stdout


def test_a_formula_is_drawn_as_it_is_written(tmp_path):
    file = tmp_path / "a.svg"
    blueprint({"unit 1": replace(parts(), shortcut=(r"$\frac$ x",))}, file)
    assert r"$\frac$ x" in file.read_text()


@pytest.mark.parametrize("name", ["a.xyz", "a.pgf"])
def test_a_picture_of_no_known_kind_is_a_mistake(name, tmp_path, here):
    done = here("list", "--picture", tmp_path / name, status=2)
    assert "does not have the suffix of a picture" in done.stderr and ".svg" in done.stderr
    assert not list(tmp_path.iterdir())
