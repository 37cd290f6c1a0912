"""Reports of what is on disk: figures, and the page."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import LAB, ended, two_rows

from resnetv2_cli import figures, inventory, plot
from resnetv2_cli.ablation import planning, record, studies, tables
from resnetv2_cli.errors import UserError
from resnetv2_cli.plot import COLORS, plt, save
from resnetv2_cli.report import charts, facts, pictures, rows
from resnetv2_cli.report.page import DARK, MOST_BYTES, write
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.scales import YS


def test_an_ablation_is_read_as_it_was_written(lab):
    planned = two_rows(lab / "lab", 2, LAB)
    found = record.read(planned.file)
    assert tables.as_json(found, 0.5) == tables.as_json(planned, 0.5)
    assert [a.experiment for line in found.lines for a in line.arms] == [
        a.experiment for line in planned.lines for a in line.arms
    ]
    assert found.title.endswith("here with dataset digits, depth 8, batch_size 128, steps 6")


def test_numbers_of_a_logarithmic_axis_stand_apart():
    axes = plt.figure().subplots()
    axes.set(yscale="log", ylim=(0.009, 120))
    plot.label_numbers(axes.yaxis)
    axes.figure.canvas.draw()
    said = {t.get_text() for t in axes.yaxis.get_ticklabels(which="both")} - {""}
    assert {"0.01", "0.5", "2", "100"} <= said
    assert all(text.lstrip("0.")[0] in "125" for text in said)
    plt.close(axes.figure)


def test_where_nothing_is_there_is_no_report(here, tmp_path):
    done = here("report", tmp_path, "--output", tmp_path / "report.html", status=2)
    assert "nothing to report in" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["report", "plot"])
def test_what_names_neither_a_folder_nor_a_run_is_told_so(here, tmp_path, command):
    said = ["error: there is no folder lab, nor a run in runs", f"hint: {inventory.NAMED}"]
    assert here(command, "lab", status=2, cwd=tmp_path).stderr.splitlines() == said
    (tmp_path / "runs").mkdir()
    assert here(command, "lab", status=2).stderr.splitlines() == said


def test_a_picture_has_the_suffix_of_one(tmp_path):
    with pytest.raises(UserError, match="seen.xyz does not have the suffix of a picture"):
        save(plt.figure(), tmp_path / "seen.xyz")
    assert not list(tmp_path.iterdir())


def test_plot_draws_every_figure_in_every_format(here, lab, tmp_path):
    to = tmp_path / "figures"
    formats = [word for f in ("png", "svg", "pdf") for word in ("--format", f)]
    here("plot", lab, *formats, "--y", "log", "-o", to)
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    files = sorted(p.name for p in to.iterdir())
    [ablation] = inventory.look([lab]).ablations
    assert files == [
        f"{n}.{s}" for n in ("runs", ablation.study.name) for s in ("pdf", "png", "svg")
    ]
    for file in to.iterdir():
        assert file.read_bytes().startswith(heads[file.suffix])
    done = here("plot", lab, "--format", "gif", status=2)
    assert done.stderr.startswith("error: unknown format 'gif'")
    (tmp_path / "empty").mkdir()
    assert "nothing to draw" in here("plot", tmp_path / "empty", status=2).stderr


@pytest.fixture
def namesakes(lab, tmp_path):
    """Runs and analyses with the same name in different folders, one of them deeper: m1/runs/x,
    m2/runs/x, m2/old/runs/x."""
    measured = {"a": {"factor": [1.0, 0.1], "change": [[0.2], [0.02]]}}
    analysis = {"networks": [{"label": "a"}], "topics": {"shrink": measured}}
    made = [tmp_path / place / "runs" for place in ("m1", "m2", "m2/old")]
    for root in made:
        shutil.copytree(lab / "alone", root / "x")
        (root / "x" / "metrics.csv").write_text("step,train_loss,test_error\n5,2.3,80\n")
        (root / "x" / "analysis").mkdir()
        (root / "x" / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    return made


def test_runs_and_analyses_of_one_name_are_told_apart(namesakes):
    found = inventory.look(namesakes)
    expected = ["m1/runs/x", "m2/runs/x", "old/runs/x"]
    assert [run.name for run in found.runs] == [run.name for run in found.every] == expected
    assert [one.name for one in found.analyses] == [f"{name}/analysis" for name in expected]
    alone = inventory.look([root / "x" for root in namesakes[:2]])
    assert [run.name for run in alone.runs] == expected[:2]
    assert [run.name for run in inventory.look(namesakes[:1]).runs] == ["x"]


def test_a_name_with_folders_before_it_is_not_anothers(namesakes, tmp_path):
    """Two runs called ``x`` become ``runs/x``, which is already the name of a third."""
    found = inventory.look([namesakes[0], namesakes[1], tmp_path / "m2" / "old"])
    assert [run.name for run in found.runs] == ["m1/runs/x", "m2/runs/x", "old/runs/x"]


@pytest.mark.parametrize(
    "asked, expected",
    [
        (["a/s1", "b/s0"], ["a/s1", "b/s0"]),
        (["a/s0", "a/s1", "b/s0"], ["a/s0", "a/s1", "b/s0"]),
        (["a"], ["a/s0", "a/s1"]),
        (["."], ["a/s0", "a/s1", "b/s0"]),
    ],
)
def test_a_run_that_is_called_by_its_seed_is_called_by_its_network_too(
    lab, tmp_path, asked, expected
):
    for place in ("a/s0", "a/s1", "b/s0"):
        shutil.copytree(lab / "alone", tmp_path / place)
    found = inventory.look([tmp_path / place for place in asked])
    assert [run.name for run in found.runs] == [run.name for run in found.every] == expected


def test_runs_of_two_ablations_are_told_apart(lab, tmp_path):
    for place in ("m1", "m2"):
        shutil.copytree(lab / "lab", tmp_path / place)
    names = [run.name for run in inventory.look([tmp_path / "m1", tmp_path / "m2"]).every]
    assert len(set(names)) == len(names) == 8
    assert all(name.startswith(("m1/digits", "m2/digits")) for name in names)


def test_each_run_and_analysis_of_one_name_is_drawn(namesakes, tmp_path):
    found, to = inventory.look(namesakes), tmp_path / "figures"
    with plt.rc_context({"svg.fonttype": "none"}):  # text stays text
        files = list(figures.every(found, to, "svg", "paper"))
    assert len(set(files)) == 4 == len(list(to.iterdir()))
    text = (to / "runs.svg").read_text()
    assert all(f"{run.name}: 80.00 %" in text for run in found.runs)
    [chart] = charts.of_runs(found.runs)
    assert [one["name"] for one in chart["names"]] == [run.name for run in found.runs]


def test_a_panel_has_as_many_runs_as_there_are_colors_and_none_is_left_out(tmp_path, monkeypatch):
    runs, drawn = [], {}
    for i in range(len(COLORS) + 2):
        folder = RunFolder(tmp_path / f"{i:02}")
        folder.path.mkdir()
        folder.metrics.write_text("step,test_error\n5,80\n")
        runs.append(inventory.Run(folder.path.name, folder))
    monkeypatch.setattr(figures, "panels", lambda groups, *_: drawn.update(groups))
    list(figures.every(inventory.Found(runs=runs), tmp_path, "png", "paper"))
    assert list(map(len, drawn.values())) == [len(COLORS), 2]
    assert [name for group in drawn.values() for name in group] == [run.name for run in runs]


def test_analyses_whose_files_would_have_one_name_are_told_apart(tmp_path):
    measured = {"a": {"factor": [1.0], "change": [[0.2]]}}
    made = [
        inventory.Analysis(
            name, tmp_path, {"networks": [{"label": "a"}], "topics": {"shrink": measured}}
        )
        for name in ("a/b", "a-b", "a-b-2")
    ]
    files = figures.every(inventory.Found(analyses=made), tmp_path, "svg", "paper")
    names = [file.name.removesuffix("-shrink.svg") for file in files]
    assert names == ["a-b", "a-b-2", "a-b-2-2"]


class Page(HTMLParser):
    """The cells of its tables, what it would fetch, and its data."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self.inside, self.data = [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given[k] for k in ("src", "href") if k in given]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.inside = "data" if given.get("id") == "data" else tag

    def handle_endtag(self, tag):
        self.inside = ""
        if tag == "table":
            self.rows.append([])  # what follows is in no table

    def handle_data(self, text):
        if self.inside == "data":
            self.data += text
        elif self.rows and self.rows[-1] and self.inside not in ("small", "span"):
            self.rows[-1][-1] += text.strip()


def test_the_page_has_the_table_the_curves_and_every_run_and_fetches_nothing(here, lab, tmp_path):
    to = tmp_path / "r.html"
    said = here("report", lab, "-o", to).stderr
    assert "1 done" in said and "2 waiting" in said and "1 fail" in said
    text = to.read_text()
    assert len(text.encode()) < MOST_BYTES
    made = Page(text)
    assert all(f.startswith(("#", "data:")) for f in made.fetched)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    columns, rows = tables.table(inventory.look([lab]).ablations[0], 0.5)
    shown = [[cell for cell in row if cell] for row in made.rows]
    for row in rows:
        [found] = [s for s in shown if s[:1] == row[:1]]
        assert found[1:] == row[1:]
    assert [c for c in shown[0] if c in columns] == columns
    [chart, _] = json.loads(made.data)["charts"]
    loss = next(c for c in chart["curves"] if c["kind"] == "loss")
    [folder] = [a.folder for a in inventory.look([lab]).ablations[0].lines[0].arms if a.begun]
    metrics = read_metrics(RunFolder(folder).metrics)["train_loss"]
    assert loss["steps"] == [s for s, _ in metrics]
    assert loss["values"] == pytest.approx([v for _, v in metrics], rel=1e-4)
    for word in ("AMD", "Intel", "cores"):
        if word in (inventory.Run("", RunFolder(folder)).environment["hardware"]):
            assert word in text
    assert "the loss is not finite" in text and "--shortcut" in text


def test_a_run_is_described_by_what_is_not_shared_and_by_its_usual_speed(tmp_path):
    runs = [inventory.Run(lr, RunFolder(tmp_path / lr)) for lr in ("0.1", "0.2")]
    for run in runs:
        run.place.mkdir()
        run.folder.config.write_text(f"depth: 8\nlr: {run.name}\n")
        run.folder.speed.write_text("step,images_per_second\n2,100\n4,300\n6,900\n8,200\n9,400\n")
    shared = facts.in_common(runs)
    assert shared == {"depth": 8}
    made = facts.described(runs[1], shared)
    assert made["settings"] == [("--lr", "0.2")]
    assert made["environment"] == [("images a second", "300")]


def test_versions_of_code_of_ones_own_are_told_apart(here, tmp_path):
    planned, said = two_rows(tmp_path, 2), ("code of the shortcut", "abababababab")
    run = planned.lines[1].arms[1].run
    run.path.mkdir(parents=True)
    run.config.write_text("depth: 8\n")
    run.manifest.path.write_text(json.dumps({"code": {"shortcut": {"sha256": 32 * "ab"}}}))
    assert [rows.note(line) for line in planned.lines] == ["", " ".join(said)]
    assert said in facts.described(inventory.Run("x", run), {})["settings"]
    shown = here("runs", "show", run.path, "--format", "csv").stdout
    assert ",".join(said) in shown.splitlines()
    shown = here("runs", "show", run.path, "--format", "json").stdout
    assert json.loads(shown)["code"] == dict([said])


def test_the_mistakes_of_a_page(here, lab, tmp_path):
    assert "is a folder" in here("report", lab, "-o", tmp_path, status=2).stderr
    done = here("report", lab, "--watch", "soon", status=2)
    assert "--watch 'soon' is no duration" in done.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ablation-x.json").write_text("{}")
    done = here("report", broken, "-o", tmp_path / "r.html", status=2)
    assert "is not what an ablation leaves" in done.stderr


@pytest.mark.parametrize("command", ["report", "export"])
@pytest.mark.parametrize("file", ["config.yaml", "metrics.csv", "checkpoints/last.ckpt"])
def test_what_a_run_needs_is_not_written_over(here, trained, tmp_path, command, file):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / file).read_bytes()
    form = ["--format", "safetensors"] if command == "export" else []
    done = here(command, run, *form, "--output", run / "." / file, status=2)
    assert "is part of a run" in done.stderr and (run / file).read_bytes() == before


def test_watching_ends_with_the_last_open_run(here, lab, tmp_path, monkeypatch):
    """The page reloads itself while runs are open, and stops when none is."""
    root = shutil.copytree(lab, tmp_path / "runs")
    os.utime(root / "alone" / "metrics.csv")
    to, seen = tmp_path / "r.html", []

    def meanwhile(seconds):
        seen.append((seconds, json.loads(Page(to.read_text()).data)["refresh"]))
        for line in inventory.look([root]).ablations[0].lines:
            for arm in line.arms:
                arm.folder.mkdir(parents=True, exist_ok=True)
                (arm.folder / "failed.json").write_text('{"reason": "x", "diverged": true}')

    monkeypatch.setattr("time.sleep", meanwhile)
    here("report", root, "-o", to, "--watch", "30s")
    assert seen == [(30, 30)]
    assert json.loads(Page(to.read_text()).data)["refresh"] == 0


def test_a_page_is_of_one_look_at_its_runs(lab, tmp_path, monkeypatch):
    """A run that ends while a page is written is running everywhere on it; another page follows."""
    root, to = tmp_path / "runs", tmp_path / "r.html"
    shutil.copytree(lab / "alone", root / "alone")
    (root / "alone" / "failed.json").unlink()
    first = iter([True])
    monkeypatch.setattr(inventory, "alive", lambda folder: next(first, False))
    assert write([root], to, 0.5, refresh=30) == ({"running": 1}, True)
    assert "dot running" in to.read_text() and "dot stopped" not in to.read_text()


def test_the_scales_that_a_page_offers_are_those_of_plot(lab, tmp_path, monkeypatch):
    monkeypatch.setitem(YS, "swapped", ("linear", "log"))
    write([lab], to := tmp_path / "r.html", 0.5)
    assert json.loads(Page(to.read_text()).data)["scales"] == {y: [*of] for y, of in YS.items()}
    buttons = re.findall('data-y="(.*?)" title="(.*?)"', to.read_text())
    assert set(buttons) == {(y, f"loss {loss}, error {error}") for y, (loss, error) in YS.items()}


def test_watching_begins_where_nothing_is_yet(here, lab, tmp_path, monkeypatch):
    root, to = tmp_path / "runs", tmp_path / "r.html"
    root.mkdir()
    monkeypatch.setattr("time.sleep", lambda _: shutil.copytree(lab / "alone", root / "alone"))
    said = here("report", root, "-o", to, "--watch", "5s").stderr
    assert [line.partition("r.html: ")[2] for line in said.splitlines()] == ["no runs", "1 fail"]


def test_watching_ends_where_an_ablation_was_stopped_long_ago(here, lab, tmp_path, monkeypatch):
    """Even though rows are waiting. While an ablation reserves one of them, in a queue say, more is
    to come."""
    root, to = shutil.copytree(lab, tmp_path / "runs"), tmp_path / "r.html"
    for file in root.rglob("*"):
        os.utime(file, (0, 0))
    lock = inventory.look([root]).ablations[0].lines[0].arms[1].claim()
    monkeypatch.setattr("time.sleep", lambda _: os.close(lock))
    said = here("report", root, "-o", to, "--watch", "30s").stderr
    assert [line.count("1 running") for line in said.split("r.html: ")[1:]] == [1, 0]
    assert json.loads(Page(to.read_text()).data)["refresh"] == 0


def test_names_cannot_break_out_of_the_page(here, lab, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    root = tmp_path / "runs"
    shutil.copytree(lab / "alone", root / evil.replace("/", "%"))
    (root / evil.replace("/", "%") / "failed.json").write_text(json.dumps({"reason": evil}))
    here("report", root, "-o", tmp_path / "r.html")
    assert "<img" not in (tmp_path / "r.html").read_text()


def test_a_name_that_is_no_text_stands_on_the_page(here, lab, tmp_path):
    shutil.copytree(lab / "alone", tmp_path / "runs" / "l\udce4ufe")
    here("report", tmp_path / "runs", "-o", tmp_path / "r.html")
    assert '<span class="name">l?ufe</span>' in (tmp_path / "r.html").read_text()


def test_there_is_a_color_by_night_for_each_by_day():
    assert len(DARK) == len(COLORS) == len(set(COLORS)) == len(set(DARK))


def test_pictures_that_a_page_has_no_room_for_are_named(namesakes):
    analyses = inventory.look(namesakes[:2]).analyses
    [(_, svg)] = pictures.pictures(analyses[0], "a0-")
    made = pictures.embedded(analyses, int(1.5 * len(svg)))
    assert [one["left_out"] for one in made] == [[], ["shrink"]]
    assert [len(one["pictures"]) for one in made] == [1, 0]


def test_pictures_follow_the_page_and_keep_their_names_apart(tmp_path):
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], color=COLORS[1], label="line")
    axes.legend()
    plot.save(figure, tmp_path / "a.svg")
    svg = pictures.themed((tmp_path / "a.svg").read_text(), "p0-")
    assert svg.startswith("<svg") and "var(--c1)" in svg and COLORS[1] not in svg
    names = re.findall(r'\bid="([^"]+)"', svg)
    meant = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert names and meant and all(n.startswith("p0-") for n in names)
    assert {a or b for a, b in meant} <= set(names)
    assert not re.search(r"<svg[^>]* (width|height)=", svg)


@pytest.mark.parametrize("table, some", [(1, True), (2, False)])
def test_the_dashes_of_the_papers_fails_are_explained_where_there_are_some(
    table, some, here, tmp_path
):
    [study] = studies.studies(tables=[table])
    made = planning.plan(study, 1, {}, tmp_path / "lab")
    record.write(made)
    ended(made, (6.5,))
    here("report", tmp_path / "lab", "--output", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert ("its “fail”, above 20 %" in text) is some is ('class="failed" style' in text)
