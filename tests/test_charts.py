"""Charts of an ablation: a curve for each seed, a mark for each error."""

import pytest
from conftest import ended, two_rows

from resnetv2_cli import plot
from resnetv2_cli.ablation import planning, studies
from resnetv2_cli.plot import COLORS
from resnetv2_cli.report import charts, page, rows
from resnetv2_cli.runfolder import RunFolder


def begin(planned) -> None:
    """Write metrics for all runs; the loss of each is its seed."""
    for arm in (arm for line in planned.lines for arm in line.arms):
        arm.folder.mkdir(parents=True)
        text = f"step,epoch,train_loss\n5,1,{arm.experiment.seed}\n"
        RunFolder(arm.folder).metrics.write_text(text)


@pytest.fixture
def of_two_seeds(tmp_path):
    """An ablation whose runs, of seeds 5 and 6, have begun."""
    planned = two_rows(tmp_path, 2, {"depth": 8, "seed": 5})
    begin(planned)
    return planned


def test_seeds_are_called_by_their_number(of_two_seeds):
    [chart] = charts.charts(of_two_seeds)
    found = [(curve["name"], curve["seed"], curve["values"]) for curve in chart["curves"]]
    assert found == [
        (row, f"seed {seed}", [seed]) for row in ("identity", "conv1x1") for seed in (5, 6)
    ]
    assert rows.arm(of_two_seeds.lines[0].arms[1])["says"].startswith("seed 6: ")


def test_a_curve_has_the_color_of_its_row_where_there_are_more_rows_than_colors(tmp_path):
    depths = ",".join(str(6 * n + 2) for n in range(1, len(COLORS) + 3))
    planned = planning.plan(studies.of_grid([f"depth={depths}"]), 1, {}, tmp_path)
    begin(planned)
    [chart] = charts.charts(planned)
    found = {one["name"]: one["color"] for one in chart["names"]}
    table = {row["name"]: row["color"] for row in rows.study(planned, [chart], 0.5)["rows"]}
    assert found == table and set(found.values()) == set(range(len(COLORS)))


def test_a_picture_has_the_first_seed_of_each_row(of_two_seeds):
    [(title, drawn)] = of_two_seeds.curves().items()
    assert title == f"{of_two_seeds.title}\nfirst seed of each row" and "with depth 8" in title
    first = {line.row.name: line.arms[0].folder for line in of_two_seeds.lines}
    assert {name: file.parent for name, file in drawn.items()} == first


@pytest.mark.parametrize("y", plot.YS)
def test_losses_of_0_do_not_take_the_others_out_of_the_picture(tmp_path, y):
    for name, loss in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        (tmp_path / name).write_text(f"step,train_loss\n5,{loss}\n10,{loss / 2}\n")
    axes = plot.plt.figure().subplots()
    plot.panel(axes, {name: tmp_path / name for name in "abc"}, y)
    assert axes.get_ylim()[1] >= 1
    plot.plt.close(axes.figure)


@pytest.mark.filterwarnings("error")  # matplotlib warns where there is no logarithm to show
def test_what_is_0_all_along_is_drawn_on_an_axis_without_logarithms(tmp_path):
    """As with a single class, where every prediction is right."""
    (tmp_path / "a").write_text("step,train_loss,test_error\n5,0,0\n10,0,0\n")
    axes = plot.plt.figure().subplots()
    plot.panel(axes, {"a": tmp_path / "a"}, "log")
    axes.figure.canvas.draw()
    assert [side.get_yscale() for side in axes.figure.axes] == ["linear"] * 2
    plot.plt.close(axes.figure)


def test_a_loss_that_explodes_leaves_the_frame(tmp_path):
    for name, loss in (("a", 2.0), ("b", 3.0), ("c", 1e6)):
        (tmp_path / name).write_text(f"step,train_loss\n5,{loss}\n10,1\n")
    axes = plot.plt.figure().subplots()
    plot.panel(axes, {name: tmp_path / name for name in "abc"}, "linear")
    assert axes.get_ylim() == (0.9, plot.ABOVE * 3)  # nor does it stretch the axis downward
    plot.plt.close(axes.figure)


@pytest.mark.parametrize("runs", [plot.FEW, plot.FEW + 1])
def test_names_stand_among_few_curves_and_below_many(tmp_path, runs):
    (tmp_path / "metrics.csv").write_text("step,train_loss,test_error\n1,2,90\n5,1,80\n")
    many = {str(i): tmp_path / "metrics.csv" for i in range(runs)}
    figure, axes = plot.plt.subplots()
    plot.panel(axes, many, "paper")
    figure.canvas.draw()
    right = figure.axes[1]
    below = bool(right.get_legend().get_window_extent().y1 < right.get_window_extent().y0)
    plot.plt.close(figure)
    assert below is (runs > plot.FEW)


def test_runs_of_any_name_are_in_the_legend(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,test_error\n1,90\n5,80\n")
    names = ["_a", r"$\bad$", "$x$", "a_b^c"]
    runs = dict.fromkeys(names, tmp_path / "metrics.csv")
    with plot.plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot.panels({r"$\worse$": runs}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert r">$\worse$<" in text
    assert all(f">{name}: 80.00 % test error<" in text for name in names)


@pytest.mark.parametrize(
    "columns, errors",
    [
        ("test_error", "test error"),
        ("val_error", "validation error"),
        ("test_error,val_error", "test error and validation error"),
        ("lr", "error"),
    ],
)
def test_a_chart_says_which_errors_it_shows(tmp_path, columns, errors):
    run = RunFolder(tmp_path)
    run.config.write_text("depth: 8\n")
    cells = columns.replace("lr", "0.1").replace("test_error", "80").replace("val_error", "70")
    run.metrics.write_text(f"step,train_loss,{columns}\n5,1,{cells}\n")
    axes = plot.plt.figure().subplots()
    plot.panel(axes, {"a": run.metrics}, "paper")
    assert axes.figure.axes[1].get_ylabel() == f"{errors}, % (solid)"
    plot.plt.close(axes.figure)
    page.write([tmp_path], tmp_path / "r.html", 0.5)
    assert f"</svg>{errors}, right" in (tmp_path / "r.html").read_text()


def test_what_became_of_a_run_is_said_beside_its_row(tmp_path):
    planned = two_rows(tmp_path, 3)
    ended(planned, (6.0,))
    arms = planned.lines[0].arms
    arms[1].fail("the disk is full")
    says = [rows.arm(arm)["says"] for arm in arms]
    assert says[:2] == ["seed 0: done, 6.00 %", "seed 1: crashed, the disk is full"]
    assert says[2] == "seed 2: not begun"


def test_marks_stand_at_the_errors(tmp_path):
    planned = two_rows(tmp_path, 3)
    ended(planned, (6.0, 7.0, 9.0), (12.0, 13.5, 18.0))
    axis = rows.Axis(planned)
    marks = axis.marks(planned.lines[0])
    assert marks["median"] == axis.x(7.0) and marks["published"] == axis.x(6.61)
    assert marks["seeds"] == [axis.x(e) for e in (6.0, 7.0, 9.0)]
    assert axis.x(6.0) < axis.x(6.61) < axis.x(7.0) < axis.x(9.0)


@pytest.mark.parametrize(
    "how, shaded", [({}, True), ({"protocol": "val"}, True), ({"scale": "laptop"}, False)]
)
def test_a_row_that_failed_in_the_paper_is_marked_so(tmp_path, how, shaded):
    """From 20 % on; after a smaller recipe, no error here is shaded as a failure."""
    [study] = studies.studies(tables=[1])
    planned = planning.plan(study, 1, {}, tmp_path, **how)
    axis = rows.Axis(planned)
    marks = {line.row.name: axis.marks(line) for line in planned.lines}
    failed = {name: mark["failed"] for name, mark in marks.items() if mark["failed"] is not None}
    assert failed == dict.fromkeys(
        ("constant-scale 0/1", "constant-scale 0.5/1", "exclusive-gate b=0", "dropout 0.5"),
        axis.x(20.0),
    )
    assert axis.x(20.0) < 100 and axis.shaded is shaded
    assert {mark["fail"] for mark in marks.values()} == {axis.x(20.0) if shaded else 100.0}


@pytest.mark.parametrize(
    "errors, ticks",
    [
        ((6.0, 18.0), ["5", "10", "20"]),
        ((6.4, 6.5), ["6", "7"]),
        ((0.28, 0.28), ["0.25", "0.3"]),
        ((24.0, 26.0), ["20", "25"]),
    ],
)
def test_the_axis_of_marks_has_ticks_where_errors_are_alike(tmp_path, errors, ticks):
    planned = planning.plan(studies.of_grid(["depth=8"]), 2, {"dataset": "digits"}, tmp_path)
    ended(planned, errors)
    axis = rows.Axis(planned)
    assert [said for said, _ in axis.ticks] == ticks
    assert all(x == axis.x(float(said)) for said, x in axis.ticks)


@pytest.mark.parametrize("curves, most", [(1, charts.MOST_POINTS), (1000, 60)])
def test_long_curves_are_thinned_and_keep_their_end(curves, most):
    """The more curves there are, the fewer points each keeps."""
    steps = list(range(1, 5000))
    curve = {"name": "a", "color": 0, "kind": "loss", "steps": steps, "values": steps}
    made = [charts.chart("x", "", [dict(curve) for _ in range(curves)])]
    charts.thin(made)
    for curve in made[0]["curves"]:
        assert most / 2 < len(curve["steps"]) <= most and curve["steps"][-1] == 4999
        assert curve["steps"] == curve["values"]
