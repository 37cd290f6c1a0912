"""Pictures: names drawn literally, and nothing where there is no number."""

import re
import warnings

import pytest
import torch

from resnetv2_cli import plot
from resnetv2_cli.analysis.draw import Panels
from resnetv2_cli.inference import Prediction
from resnetv2_cli.sheet import sheet

NAMES = ["$a_$", r"\$ and $b^$", "\udce9", "猫"]  # not formulas; not valid text; not in the font


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


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_figure_is_the_same_file_each_time(tmp_path, suffix):
    for name in ("a", "b"):
        plot.confusion([[1, 0], [0, 1]], ("a", "b"), tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_the_likeliest_class_stands_below_its_picture(tmp_path):
    top = [("cat", 0.7), ("dog", 0.3)]
    sheet([Prediction("a.png", top, "", torch.zeros(8, 8, 3))], tmp_path / "a.svg")
    assert set(words(tmp_path / "a.svg")) == {"a.png", "cat 70 %"}


def test_a_value_of_a_unit_stands_above_its_place(tmp_path):
    """Units count from 1, or in percent if another network has others; stages end between two."""
    one, two = {"stage": [1, 1, 2, 2]}, {"stage": [1, 2]}
    for found, places, change in (
        ({"a": one}, [1, 2], 2.5),
        ({"b": one, "a": two}, [50, 100], 62.5),
    ):
        panels = Panels(found, "title")
        panels.over_depth(0, "a", [5.0, None, 7.0, 8.0][: len(found["a"]["stage"])])
        [ends, curve] = panels.panels[0].lines
        assert list(curve.get_xdata())[:2] == places and curve.get_ydata()[0] == 5
        assert list(ends.get_xdata()) == [change] * 2
        panels.save(tmp_path / "a.svg")


def test_a_row_of_the_confusion_matrix_is_of_a_label(monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, to: drawn.extend(figure.axes))
    plot.confusion([[3, 1], [0, 4]], ("a", "b"), None)
    [axes] = drawn
    shares = {text.get_position(): text.get_text() for text in axes.texts}
    assert shares == {(0, 0): "75", (1, 0): "25", (0, 1): "0", (1, 1): "100"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("guess", "label")
    plot.plt.close(axes.figure)


def test_a_long_name_of_a_class_is_cut_in_its_middle_and_all_words_are_in_the_picture(monkeypatch):
    """ImageNet has such names."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, to: drawn.append(figure))
    long = "American Staffordshire terrier, Staffordshire terrier, American pit bull terrier"
    plot.confusion([[1, 0], [0, 1]], (long, "Staffordshire bull"), None)
    [figure] = drawn
    figure.canvas.draw()
    [axes] = figure.axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["American… terrier", "Staffordshire bull"]
    words = [*labels, *axes.get_xticklabels(), axes.xaxis.label, axes.yaxis.label, axes.title]
    for box in [word.get_window_extent() for word in words]:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
    plot.plt.close(figure)


def test_a_class_without_images_has_a_blank_row(tmp_path):
    plot.confusion([[3, 1], [0, 0]], ("a", "b"), tmp_path / "a.svg")
    assert [w for w in words(tmp_path / "a.svg") if w.isdigit() or w == "nan"] == ["75", "25"]
