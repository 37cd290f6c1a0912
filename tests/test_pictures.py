"""Pictures: names as they stand, and nothing where there is no number."""

import re
import warnings

import pytest
import torch

from resnetv2_cli import plot
from resnetv2_cli.analysis.draw import Panels
from resnetv2_cli.inference import Prediction
from resnetv2_cli.sheet import sheet

NAMES = ["$a_$", r"\$ and $b^$", "\udce9", "猫"]  # no formulas, no text, none of the font's


def words(svg) -> list[str]:
    return re.findall(r">([^<>]+)</text>", svg.read_text())


@pytest.fixture(autouse=True)
def as_text():
    with plot.plt.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_stands(tmp_path, name):
    to, shown = tmp_path / "a.svg", name.replace("\udce9", "?")
    plot.confusion([[1, 0], [0, 1]], (name, "b"), to)
    assert words(to).count(shown) == 2
    sheet([Prediction(f"{name}.png", [(name, 1.0)], "", torch.zeros(8, 8, 3))], to)
    assert set(words(to)) == {f"{shown}.png", f"{shown} 100 %"}
    (tmp_path / "metrics.csv").write_text("step,test_error\n1,9\n2,8\n")
    plot.panels({name: {name: tmp_path / "metrics.csv"}}, to)
    assert {shown, f"{shown}: 8.00 % test error"} <= set(words(to))
    Panels({name: {}}, "title", over_depth=False).save(to)
    assert shown in words(to)


def test_a_class_without_images_has_a_blank_row(tmp_path):
    plot.confusion([[3, 1], [0, 0]], ("a", "b"), tmp_path / "a.svg")
    assert [w for w in words(tmp_path / "a.svg") if w.isdigit() or w == "nan"] == ["75", "25"]
