"""The console script: its commands, and what scripts rely on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import SCRIPT, SMALL, STOPPED, THREADS

from resnetv2_cli import __version__, cli, console, evaluation
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.flags import seconds
from resnetv2_cli.plans import BLOCKS, UNITS, shortcuts
from resnetv2_cli.quantities import duration
from resnetv2_cli.task import class_errors


def test_version(resnetv2):
    assert resnetv2("--version").stdout == f"resnetv2 {__version__}\n"


def test_help_names_every_choice(resnetv2):
    text = resnetv2("train", "--help").stdout
    for name in [*UNITS, *BLOCKS, *shortcuts(), *DATASETS]:
        assert name in text, name


def test_list_names_everything_with_its_published_error(here):
    text = here("list").stdout
    for name in [*UNITS, *shortcuts(), *DATASETS, "cifar10_resnet20_quick"]:
        assert name in text, name
    for error in ("6.61", "8.17", "5.46", "12.35 (0.5/0.5)", "8.70 (b=-6)", "fail (0.5)"):
        assert error in text, error
    there = json.loads(here("list", "--json").stdout)
    assert {"unit", "shortcut", "layout", "dataset", "config"} == there.keys()
    assert all(name in text for names in there.values() for name in names)
    assert there["shortcut"]["identity"]["paper, %"] == "6.61"


def test_show_prints_the_settled_experiment(here):
    text = here("show", "--config", "cifar10_resnet20_quick", "--lr", 0.3).stdout
    file = "  # file cifar10_resnet20_quick\n"
    assert f"depth: 20{file}" in text and f"schedule: one-cycle{file}" in text
    assert "lr: 0.3  # flag\n" in text and "momentum: 0.9\n" in text


def test_describe_as_json(here):
    done = here("describe", "--depth", 1001, "--unit", "full-preact", "--json")
    described = json.loads(done.stdout)
    assert described["parameters"] == 10_327_706
    assert described["macs"] == pytest.approx(1487.9e6, rel=1e-3)
    assert len(described["parts"]) == 333 + 2
    assert sum(p["parameters"] for p in described["parts"]) == described["parameters"]
    assert sum(p["macs"] for p in described["parts"]) == described["macs"]
    assert described["parts"][-2]["output"] == [256, 8, 8]


def test_describe_as_a_table(here):
    text = here("describe", "--depth", 20).stdout
    assert text == here("describe", "depth=20").stdout
    said = here("describe", "depth=20", "--depth", 8, status=2).stderr
    assert "depth=20 takes no flags" in said
    assert "stage3.unit3" in text and "269,722" in text and "40,551,040" in text
    [head] = [line for line in text.splitlines() if "head" in line]
    assert head.split()[-4::2] == ["778", "640"]  # BN of 64 channels; 64x10 weights, 10 biases


def test_eval_of_a_checkpoint_and_of_a_run_folder(resnetv2, trained, tmp_path):
    result = json.loads((trained / "result.json").read_text())
    checkpoint = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path / "checkpoint.ckpt")
    for what in (checkpoint, trained):
        scores = json.loads(resnetv2("eval", what, "--json").stdout)
        assert scores["error"] == result["test_error"]
        assert scores["top5_error"] == result["test_top5_error"]
        assert scores["loss"] == pytest.approx(result["test_loss"], rel=1e-3)
        assert scores["images"] == 360
        assert sum(map(sum, scores["confusion"])) == 360
        wrong = sum(
            e * sum(row) / 100
            for e, row in zip(scores["class_error"].values(), scores["confusion"], strict=True)
        )
        assert wrong == pytest.approx(3.6 * scores["error"])
    assert (tmp_path / "confusion-checkpoint.png").read_bytes().startswith(b"\x89PNG")


def test_a_class_without_test_images_has_no_error(trained, tmp_path, here, monkeypatch):
    def without(*given, **more):
        scores, task = evaluate(*given, **more)
        scores["confusion"][3] = [0] * 10
        return scores | {"class_errors": class_errors(scores["confusion"])}, task

    evaluate = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", without)
    for more in ([], ["--json"]):
        said = here("eval", trained, "--output", tmp_path, *more).stdout
        assert ('"3": null' if more else "│ 3     │     — │") in said


def test_numbers_that_are_not_finite_count_as_wrong_and_are_told(trained, tmp_path, here):
    """As left by a broken conversion, or by a run from before training checked for them."""
    saved = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    saved["state_dict"]["net.head.fc.bias"][0] = torch.nan
    del saved["sealed"]
    torch.save(saved, tmp_path / "nan.ckpt")
    done = here("eval", tmp_path / "nan.ckpt", "--output", tmp_path, "--json")
    assert "the numbers for 360 images are not finite: they count as wrong" in done.stderr
    scores = json.loads(done.stdout)
    assert scores["error"] == scores["top5_error"] == 100 and scores["loss"] is None
    assert set(scores["class_error"].values()) == {100}


def test_eval_shows_a_table(here, trained):
    done = here("eval", trained)
    assert "digits-resnet8-basic-full-preact-s0" in done.stdout
    assert "error by class" in done.stdout and "confusion matrix:" in done.stderr


@pytest.mark.parametrize(
    "text, value",
    [
        ("90", 90), ("90s", 90), ("25m", 1500), ("2h", 7200), ("1h30m", 5400), ("1h30", 5400),
        ("5m30", 330), ("1h5m30", 3930), ("1h30s", 3630),
    ],
)  # fmt: skip
def test_durations(text, value):
    assert seconds(text) == value


def test_a_duration_is_said_in_the_unit_that_suits_it():
    said = [duration(number) for number in (40, 720, 12_600, 181_440, None)]
    assert said == ["40 s", "12 min", "3.5 h", "2.1 days", "—"]


def test_what_is_no_duration():
    for text in ("", "soon", "-5m", "5x"):
        with pytest.raises(UserError, match="is no duration"):
            seconds(text)


# Mistakes.


@pytest.mark.parametrize("where", [0, 1, 3])
def test_debug_shows_the_traceback(resnetv2, where):
    arguments = ["train", "--depth", 111]
    done = resnetv2(*arguments[:where], "--debug", *arguments[where:], status=1)
    assert "Traceback" in done.stderr and "no network has 111 layers" in done.stderr


def test_a_command_to_go_on_with_can_be_typed(resnetv2, tmp_path):
    folder = tmp_path / "with a blank"
    done = resnetv2("train", *SMALL, "--steps", 2, "--output", folder)
    assert done.stderr.splitlines()[-1] == f"evaluate: resnetv2 eval '{folder}'"
    again = resnetv2("train", *SMALL, "--steps", 2, "--output", folder, status=2)
    assert f"resnetv2 train --resume '{folder}'" in again.stderr
    said = json.loads((folder / "manifest.json").read_text())["command"]
    assert said.endswith(f"--output '{folder}'") and shlex.split(said)[-1] == str(folder)


@pytest.mark.parametrize("words", [["list"], ["train", "--depth", "9"]])
def test_a_reader_who_leaves_is_no_difference_that_verify_resume_found(words):
    """For a table and for an error message: status 1 is reserved for such a difference."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([SCRIPT, *words], stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == cli.UNHEARD == 141


def test_ctrl_c_saves_and_exits_with_130(tmp_path):
    folder = tmp_path / "run"
    command = [SCRIPT, "train", *SMALL, "--steps", 5000, "--output", folder]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **THREADS}, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (
        (folder / "metrics.csv").exists() and "\n5," in (folder / "metrics.csv").read_text()
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert f"resnetv2 train --resume {folder}" in said
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 5


@pytest.mark.parametrize("number", STOPPED)
def test_a_signal_to_all_processes_of_the_command_saves_too(tree, tmp_path, number):
    """As Ctrl-C, timeout and some queues send it: workers that decode images receive it too."""
    folder = tmp_path / "run"
    photographs = ["--dataset", "folder", "--data-dir", tree, "--depth", 18, "--batch-size", 4]
    command = [SCRIPT, "train", *photographs, "--workers", 2, "--log-every", 1, "--steps", 5000]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(folder)],
        env={**os.environ, **THREADS}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines = folder / "metrics.csv"
    while process.poll() is None and not (lines.exists() and "\n1," in lines.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == STOPPED[number][0] and "Traceback" not in said
    assert f"{number.name}: saved" in said and (folder / "checkpoints" / "last.ckpt").exists()


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    folder = tmp_path / "run"
    # An iteration takes seconds.
    slow = ["--dataset", "digits", "--depth", 110, "--batch-size", 512, "--log-every", 1]
    command = [SCRIPT, "train", *slow, "--steps", 5000, "--output", folder]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **THREADS}, stderr=subprocess.PIPE, text=True
    )
    lines = folder / "metrics.csv"
    while process.poll() is None and not (lines.exists() and "\n1," in lines.read_text()):
        time.sleep(0.02)
    while process.poll() is None:  # two that arrive together count as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved" not in said and "Traceback" not in said
    assert not (folder / "checkpoints" / "last.ckpt").exists()


def test_pictures_are_drawn_in_silence_without_a_home(resnetv2, tmp_path):
    to = tmp_path / "units.svg"
    nowhere = {
        "HOME": "/proc/nohome",
        "MPLCONFIGDIR": "",
        "XDG_CONFIG_HOME": "",
        "XDG_CACHE_HOME": "",
    }
    done = resnetv2("list", "--picture", to, env=nowhere)
    assert to.stat().st_size and done.stderr.splitlines() == [f"picture: {to}"]


def test_a_python_that_reads_ascii_gets_the_list(resnetv2):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "table1_cifar10_resnet110" in resnetv2("list", env=plain).stdout


def test_names_are_no_pictures_and_no_markup(here, tmp_path, capsys):
    """Rich takes :key: for an emoji, and [v2] for a style."""
    said = here("describe", "--depth", 8, "--shortcut", "a:b:c", status=2).stderr
    assert "'a:b:c' is no module:Class" in said
    console.table("mine:Fire:ratio=4", ["mine:Key:a"], [["mine:Link:start=0"]])
    console.say("a:fire:[v2] in q[/b]")
    said = capsys.readouterr().out
    for text in ("mine:Fire:ratio=4", "mine:Key:a", "mine:Link:start=0", "a:fire:[v2] in q[/b]"):
        assert text in said


def test_debug_is_of_one_command(here, monkeypatch):
    monkeypatch.delenv(cli.DEBUG, raising=False)
    with pytest.raises(UserError):
        here("--debug", "show", "--depth", 7)
    here("show", "--depth", 7, status=2)
    assert cli.DEBUG not in os.environ


@pytest.mark.parametrize("place", ["/a/" + "with blanks " * 12 + "x", "a\nb", "steps: 3  # no"])
def test_what_show_prints_is_read_again(place, here, tmp_path):
    shown = here("show", "--data-dir", place, "--depth", 20).stdout
    assert "depth: 20  # flag\n" in shown
    (tmp_path / "mine.yaml").write_text(shown)
    e = Experiment.load(tmp_path / "mine.yaml")
    assert (e.data_dir, e.depth) == (place, 20)


def test_help_shows_no_default_that_is_empty(here):
    """``--freeze`` and others have an empty text; None and "" are no defaults to show."""
    said = here("train", "--help").stdout
    assert "--freeze" in said and "(default: 64000)" in said
    assert "(default: )" not in said and "(default: None)" not in said
