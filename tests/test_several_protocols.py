"""One training, tested under several protocols: its result, and rows of a table that share it."""

import json
import math
import os
import re
import signal
from dataclasses import replace

import pytest
from lightning.pytorch import Callback
from trainings import trained_as

from resnetv2_cli import evaluation, jsonfile, paper
from resnetv2_cli.ablation import planning, record, studies, tables
from resnetv2_cli.commands.ablate import every
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import errors
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.report import rows
from resnetv2_cli.report.charts import charts
from resnetv2_cli.task import Classification

WAYS = ("320", "224", "ten-crop")
SMALL = {"dataset": "folder", "stem": "cifar", "depth": 8, "batch_size": 4, "steps": 2}
SMALL |= {"workers": 0, "precision": "32-true", "warmup": 0, "log_every": 1}
RESNET_152 = {"depth": 152, "unit": "original", "batch_size": 256, "warmup": 0, "epochs": 90.0}
RESNET_152 |= {"drops": paper.TABLE_5.base["drops"], "color": "lighting"}


def test_each_protocol_is_named_once_and_exists():
    given = {"dataset": "imagenet", "depth": 50}
    assert Experiment(**given, protocol=" 320, 224,320").protocols == ("320", "224")
    with pytest.raises(UserError, match="unknown protocol '32'"):
        Experiment(**given, protocol="224,32")
    with pytest.raises(UserError, match="unknown protocol ''"):
        Experiment(**given, protocol="224,")
    with pytest.raises(UserError, match="224,320 is for larger images than those of digits"):
        Experiment(dataset="digits", protocol="224,320")


@pytest.mark.parametrize("val", [0, 2])
def test_a_result_has_the_scores_by_each(tree, tmp_path, val):
    """Training evaluates under the first, which also gives the headline; with held-out images, the
    scores under the others are of the chosen checkpoint too."""
    given = SMALL | {"data_dir": str(tree), "val": val, "batch_size": 4 - val}
    folder = trained_as(tmp_path / "run", **given, protocol=",".join(WAYS))
    result = folder.read_result()
    assert list(result["by_protocol"]) == ["224", "ten-crop"]
    found = {"320": {k: result[f"test_{k}"] for k in ("error", "top5_error", "loss")}}
    found |= result["by_protocol"]
    assert len({scores["loss"] for scores in found.values()}) == 3
    file = folder.best if val else folder.last
    for way, scores in found.items():
        alone, _ = evaluation.evaluate(file, protocol=way)
        assert alone["by_protocol"] == {}
        assert {k: alone[k] for k in scores} == pytest.approx(scores, rel=1e-5)
    # Under the first after each of two iterations, or once at the end; under each other once.
    assert result["test_set_readings"] == (1 if val else 2) + 2


class InTheLastTest(Callback):
    """Sends SIGTERM when the test under the last protocol begins."""

    def on_test_batch_start(self, trainer, *_) -> None:
        if trainer.datamodule.protocol:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_stopped_in_its_tests_makes_them_again(tree, tmp_path):
    given = SMALL | {"data_dir": str(tree), "protocol": "224,320"}
    whole = trained_as(tmp_path / "whole", **given).read_result()
    with pytest.raises(Stopped, match="SIGTERM"):
        trained_as(tmp_path / "run", display=[InTheLastTest()], **given)
    assert not (tmp_path / "run" / "result.json").exists()
    result = trained_as(tmp_path / "run", resume={}).read_result()
    for key in ("test_loss", "by_protocol"):
        assert result[key] == whole[key]


def test_two_processes_count_each_image_once_by_each(tree, tmp_path, resnetv2):
    flags = [x for k, v in SMALL.items() for x in (f"--{k.replace('_', '-')}", v)]
    to = tmp_path / "run"
    resnetv2("train", *flags, "--data-dir", tree, "--protocol", "224,320", "--devices", 2,
             "--strategy", "ddp", "--accelerator", "cpu", "--output", to)  # fmt: skip
    result = json.loads((to / "result.json").read_text())
    alone, _ = evaluation.evaluate(to / "checkpoints" / "last.ckpt", protocol="320,224")
    assert result["test_images"] == alone["images"] == 2
    assert result["test_loss"] == pytest.approx(alone["by_protocol"]["224"]["loss"], rel=1e-5)
    assert result["by_protocol"]["320"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "damage", [None, [], 3, {"320": None}, {"320": {}}, {"320": {"error": "x"}}]
)
def test_a_damaged_result_is_none_and_is_made_again(tree, tmp_path, here, damage):
    given = SMALL | {"data_dir": str(tree), "protocol": "224,320"}
    folder = trained_as(tmp_path / "run", **given)
    whole = folder.read_result()
    jsonfile.write(folder.result, whole | {"by_protocol": damage})
    assert folder.read_result() == {} != whole
    assert "stopped" in here("runs", "ls", "--root", tmp_path).stdout
    assert (
        trained_as(tmp_path / "run", resume={}).read_result()["by_protocol"]
        == (whole["by_protocol"])
    )


def test_a_result_without_a_test_that_was_asked_for_is_completed(tree, tmp_path):
    given = SMALL | {"data_dir": str(tree), "protocol": "224,320"}
    folder = trained_as(tmp_path / "run", **given)
    whole = folder.read_result()
    jsonfile.write(folder.result, {k: v for k, v in whole.items() if k != "by_protocol"})
    again = trained_as(tmp_path / "run", resume={}).read_result()
    assert again["by_protocol"] == whole["by_protocol"]


def test_what_is_no_number_is_shown_as_none(tree, tmp_path, here):
    folder = trained_as(tmp_path / "run", **SMALL, data_dir=str(tree), protocol="224,320")
    wrong = folder.read_result() | {"test_top5_error": "x", "test_loss": None}
    jsonfile.write(folder.result, wrong)
    shown = here("runs", "compare", folder.path, folder.path).stdout
    assert re.search(r"by_protocol\.320\.error, %.*\d\.\d{4}", shown)
    here("report", tmp_path, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "by_protocol.320.loss, nats" in page and "{'" not in page


def test_the_commands_show_each(tree, tmp_path, here):
    more = [x for k, v in SMALL.items() for x in (f"--{k.replace('_', '-')}", v)]
    to = tmp_path / "run"
    said = here("train", *more, "--data-dir", tree, "--protocol", "320,224", "--output", to).stdout
    result = json.loads((to / "result.json").read_text())
    error = result["by_protocol"]["224"]["error"]
    assert f"by --protocol 224: {error:.2f} %\n" in said  # and no top-5 for two classes
    scores = json.loads(here("eval", to, "--protocol", "224,320", "--json").stdout)
    assert scores["protocol"] == "224" and list(scores["by_protocol"]) == ["320"]
    assert scores["loss"] == pytest.approx(result["by_protocol"]["224"]["loss"])
    assert scores["by_protocol"]["320"]["loss"] == pytest.approx(result["test_loss"])
    told = here("eval", to, "--protocol", "224,320").stdout
    losses = {"224 as 32": scores["loss"], "320 as 46": scores["by_protocol"]["320"]["loss"]}
    for way, loss in losses.items():
        [line] = [line for line in told.splitlines() if way in line]
        assert f"{loss:.2f}" in line
    assert "error by class, by --protocol 224" in told
    told = here("runs", "show", to).stdout
    assert "by_protocol.224.error, %" in told and "by_protocol.224.top5" not in told
    here("export", to, "--format", "safetensors")
    page = next((to / "export").glob("*.md")).read_text(encoding="utf-8")
    assert f"That is by protocol 320; {error:.2f} % by 224." in page
    refused = here("predict", to, tree / "val" / "ant", "--protocol", "224,320", status=2)
    assert "predict takes only one protocol" in refused.stderr


def test_a_mean_image_fits_every_protocol_or_none_is_begun(trained, tree, tmp_path):
    given = SMALL | {"data_dir": str(tree), "protocol": "224,320", "weights": str(trained)}
    with pytest.raises(UserError, match="with --protocol 320 it sees 46x46"):
        trained_as(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    file = trained_as(tmp_path / "begun", **given | {"protocol": "224"}).last
    with pytest.raises(UserError, match="with --protocol 320 it sees 46x46"):
        evaluation.evaluate(file, protocol="224,320")
    read = jsonfile.mapping(tmp_path / "begun" / "manifest.json")["test_set_readings"]
    assert read == 2  # in training only


def test_numbers_that_are_not_finite_by_another_protocol_are_told(
    tree, tmp_path, here, monkeypatch
):
    file = trained_as(tmp_path / "run", **SMALL, data_dir=str(tree)).last
    look = Classification.look

    def wild(task, images):
        return look(task, images) * (math.nan if images.shape[1] > 32 else 1)

    monkeypatch.setattr(Classification, "look", wild)
    said = here("eval", file, "--protocol", "224,320", "--output", tmp_path).stderr
    assert "the numbers for 2 images are not finite" in said


def table_5(root, runs=1):
    """The three rows of Table 5 with 152 layers."""
    [study] = studies.studies(tables=[5])
    wanted = [row.name for row in study.table.rows if "ResNet-152" in row.name]
    return planning.plan(study.only(wanted), runs, {}, root)


def leave(line, *scores):
    """Leave a result for each arm of a line: (error, top-5 error) under 320, and under 224."""
    for arm, each in zip(line.arms, scores, strict=True):
        by_320, by_224 = ({"error": e, "top5_error": t} for e, t in each)
        arm.folder.mkdir(parents=True)
        result = {f"test_{k}": v for k, v in by_320.items()} | {"by_protocol": {"224": by_224}}
        jsonfile.write(arm.folder / "result.json", result)


def test_rows_of_one_training_share_its_runs(tmp_path):
    made = table_5(tmp_path)
    first, second, other = (line.arms[0] for line in made.lines)
    assert first.folder == second.folder != other.folder
    assert first.experiment.protocols == ("320", "224")
    assert [arm.error for arm in (first, second)] == [None, None]
    leave(made.lines[0], [(21.5, 5.75), (23.25, 6.5)])
    assert [arm.error for arm in (first, second, other)] == [23.25, 21.5, None]


@pytest.mark.parametrize("again", [False, True], ids=["planned", "as recorded"])
def test_a_table_has_the_errors_by_each_and_of_five_guesses(tmp_path, again):
    made = table_5(tmp_path, 3)
    scores = [[(21.5 + s, 5.75), (23.25 + s, 6.5 - s)] for s in (0.0, 0.5, 1.0)]
    leave(made.lines[0], *scores)
    if again:
        record.write(made)
        made = record.read(made.file)
    columns, cells = tables.table(made, 0.5)
    found = [dict(zip(columns, row, strict=True)) for row in cells]
    assert [row["here, %"] for row in found] == ["23.75 (23.75±0.50)", "22.00 (22.00±0.50)", "—"]
    assert [row["top-5: paper, %"] for row in found] == ["6.70", "5.50", "5.50"]
    assert [row["top-5: here, %"] for row in found] == ["6.00 (6.00±0.50)", "5.75 (5.75±0.00)", "—"]
    assert [row["to paper"] for row in found] == ["+0.75", "+0.70", "—"]
    [one, two, _] = tables.as_json(made, 0.5)["rows"]
    assert one["top5"] == {"published": 6.7, "errors": {"0": 6.5, "1": 6.0, "2": 5.5}}
    assert (one["tested"], two["tested"]) == ("224", "320")
    page = rows.study(made, [], 0.5)["rows"]
    assert [row["arms"][0]["says"] for row in page] == [
        "seed 0: done, 23.25 %", "seed 0: done, 21.50 %", "seed 0: not begun",
    ]  # fmt: skip


def test_photographs_of_ones_own_have_no_top_5_column(tmp_path):
    given = {"dataset": "folder", "data_dir": str(tmp_path / "gone")}
    made = planning.plan(studies.of_grid(["depth=18", "protocol=320,224"]), 1, given, tmp_path)
    leave(made.lines[0], [(21.5, 5.75), (23.25, 6.5)])
    columns, cells = tables.table(made, 0.5)
    assert not [column for column in columns if "top-5" in column]
    assert [row[columns.index("here, %")] for row in cells] == ["21.50", "23.25"]


@pytest.mark.parametrize("damage", [{"tested": []}, {"tested": "nowhere"}, {"top5": "x"}])
def test_a_damaged_record_is_told(tmp_path, damage):
    made = table_5(tmp_path)
    record.write(made)
    saved = jsonfile.mapping(made.file)
    saved["rows"][0] |= damage
    jsonfile.write(made.file, saved)
    with pytest.raises(UserError, match="is not what an ablation leaves"):
        record.read(made.file)


def test_a_record_of_an_earlier_version_has_the_first_protocol(tmp_path):
    made = planning.plan(studies.of_grid(["depth=50", "dataset=imagenet"]), 1, {}, tmp_path)
    record.write(made)
    saved = jsonfile.mapping(made.file)
    for row in saved["rows"]:
        del row["tested"], row["top5"]
    jsonfile.write(made.file, saved)
    assert record.read(made.file).lines[0].arms[0].tested == ""


def test_a_plan_has_the_time_of_each_training_once(tree, tmp_path, here):
    small = [x for k, v in SMALL.items() for x in (f"--{k.replace('_', '-')}", v)]
    said = here("ablate", "--grid", "protocol=224,320", *small, "--data-dir", tree, "--output",
                tmp_path, "--dry-run", "--format", "csv").stdout  # fmt: skip
    [_, first, second] = said.strip().splitlines()
    assert second.endswith(",the same") and not first.endswith(",the same")


def test_one_curve_of_one_training(tmp_path):
    made = table_5(tmp_path)
    for line in (made.lines[0], made.lines[2]):
        line.arms[0].folder.mkdir(parents=True)
        line.arms[0].run.metrics.write_text("step,train_loss\n1,2.5\n", encoding="utf-8")
    [chart], [drawn] = charts(made), made.curves().values()
    assert [each["name"] for each in chart["names"]] == list(drawn)
    assert list(drawn) == ["ResNet-152 original, test 320", "ResNet-152 full-preact, test 320"]
    alone = replace(made, lines=made.lines[:1])  # --row "ResNet-152 original, test 224"
    assert [list(each) for each in alone.curves().values()] == [["ResNet-152 original, test 224"]]
    assert [arm.row for arm in every([made])] == list(drawn)
    assert [arm.row for arm in every([alone])] == ["ResNet-152 original, test 224"]


def test_protocols_of_a_grid_are_tests_of_one_training(tmp_path):
    axes = ["depth=50,152", "protocol=224,320"]
    given = {"dataset": "imagenet"} | {k: v for k, v in RESNET_152.items() if k != "depth"}
    made = planning.plan(studies.of_grid(axes), 1, given, tmp_path)
    assert [line.row.name for line in made.lines] == [
        f"depth={depth} protocol={way}" for depth in (50, 152) for way in (224, 320)
    ]
    folders = [line.arms[0].folder for line in made.lines]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert [line.row.published for line in made.lines] == [None, None, 23.0, 21.3]
    assert [line.row.top5 for line in made.lines] == [None, None, 6.7, 5.5]
    assert made.lines[1].arms[0].experiment.protocols == ("224", "320")
    with pytest.raises(UserError, match="are one and the same run"):
        planning.plan(studies.of_grid(["depth=50", "protocol=224,224"]), 1, given, tmp_path)


@pytest.mark.parametrize("protocol, known", [("224", ["23.00"]), ("320,224", ["23.00", "21.30"])])
def test_what_is_published_by_each_is_described(protocol, known):
    e = Experiment(dataset="imagenet", protocol=protocol, **RESNET_152)
    assert [f"{row.published:.2f}" for row in paper.evaluated(e)] == known
    told = errors(e)["network"]
    assert all(error in told for error in known) and "top-5 6.7" in told
    assert ("21.30" in told) is ("320" in protocol)
