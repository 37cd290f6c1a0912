"""The console script: its commands, what scripts rely on, and one clear line for each mistake."""

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

from resnetv2_cli import __version__, cli, console, run
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
    assert "stage3.unit3" in text and "269,722" in text and "40,551,040" in text
    [head] = [line for line in text.splitlines() if "head" in line]
    assert head.split()[-4::2] == ["778", "640"]  # BN of 64 channels, and 64x10 with 10 more


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

    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", without)
    for more in ([], ["--json"]):
        said = here("eval", trained, "--output", tmp_path, *more).stdout
        assert ('"3": null' if more else "│ 3     │     — │") in said


def test_numbers_that_are_not_finite_count_as_wrong_and_are_told(trained, tmp_path, here):
    """As a broken conversion, or a run of before they were watched, leaves them."""
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


def mistake(done) -> tuple[str, str]:
    """The one line and its hint."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [ln for ln in done.stderr.splitlines() if ln.startswith(("error: ", "hint: "))]
    assert len(lines) == 2, done.stderr
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


FOUR = ["--dataset", "digits", "--devices", 4, "--accelerator", "cpu"]


@pytest.mark.parametrize(
    "arguments, error, hint",
    [
        (["train", "--depth", 111], "no network has 111 layers", "try 110 or 116"),
        (["train", "--unit", "preact"], "unknown unit 'preact'", "did you mean 'full-preact'?"),
        (["train", "--shortcut", "gate"], "unknown shortcut 'gate'", "exclusive-gate"),
        (["train", "--shortcut", "no_module:X"], "cannot import shortcut", "module:Class"),
        (["ablate", "--shortcut", "drop"], "unknown shortcut 'drop'", "did you mean 'dropout'?"),
        (["ablate"], "ablate what? give one of", "resnetv2 ablate --shortcut exclusive-gate"),
        (["ablate", "--table", 1, "--unit", "original"], "give only one of", "for instance"),
        (["ablate", "--table", 9], "there is no Table 9 to run", "1, 2, 3, 4, 5"),
        (["ablate", "--figure", 2], "there is no Figure 2 to run", "1, 3, 6"),
        (["train", "--config", "nothing.yaml"], "unknown config file", "known: "),
        (["train", "--dataset", "digits", "--batch-size", 5000], "larger than the 1437", "1437"),
        (["train", "--dataset", "digits", "--devices", 64, "--accelerator", "gpu"],
         "no such devices", "this machine has"),
        (["train", "--dataset", "digits", "--strategy", "dpp"],
         "no strategy is called 'dpp'", "auto or ddp"),
        (["train", "--dataset", "digits", "--devices", 9999], "9999 were asked for", "processors"),
        (["train", "--dataset", "folder", "--depth", 18, "--data-dir", "nowhere"],
         "there is no folder nowhere/train", "one folder for each class"),
        (["train", "--steps", 9, "--epochs", 2], "both given", "one of them"),
        (["train", "--dataset", "digits", "--epochs", 1, "--warmup", 99], "is longer than the 12",
         "--warmup"),
        (["train", "--batch-size", 4, "--accumulate", 8], "cannot be split into 8",
         "micro-batches"),
        (["train", *FOUR, "--batch-size", 2], "into 1 micro-batches on 4 devices", "--batch-size"),
        (["train", *FOUR, "--val", 3], "3 images cannot be shared among 4", "3 or fewer"),
        (["train", "--drops", "half"], "drops 'half' are no numbers", "0.5,0.75"),
        (["train", "--precision", "16-mixed", "--dataset", "digits"], "needs a GPU", "bf16-mixed"),
        (["train", "--seed", 2**40], "seed must be at most", "Seed"),
        (["train", "--time", "soon"], "is no duration", "25m"),
        (["train", "--resume", "nowhere"], "nowhere is not the folder of a run", "config.yaml"),
        (["eval", "nothing.ckpt"], "there is no checkpoint nothing.ckpt", "a run folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_a_hint(here, tmp_path, arguments, error, hint):
    said, hinted = mistake(here(*arguments, status=None, cwd=tmp_path))
    assert error in said and hint in hinted
    assert not list(tmp_path.iterdir())


def test_a_mistaken_flag_exits_with_2(here):
    done = here("train", "--dept", 20, status=2)
    assert "--depth" in done.stderr and "Traceback" not in done.stderr
    for flag in ("--lr", "--batch-size", "--accumulate"):  # no part of it
        assert f"No such option: {flag}" in here("eval", "x.ckpt", flag, 1, status=2).stderr


def test_cifar_that_is_not_there_and_no_network(resnetv2, tmp_path):
    done = resnetv2("train", "--data-dir", tmp_path / "none", status=None, cwd=tmp_path, env={
        "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9",
    })  # fmt: skip
    said, hint = mistake(done)
    assert "could not be downloaded" in said
    assert "--dataset digits" in hint and "cifar10/train/<class>/*.png" in hint
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_left_alone(here, trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    said, hint = mistake(here("train", *SMALL, "--output", trained, status=None))
    assert "is not empty" in said and "--resume" in hint
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "missing, way",
    [
        ("", "or continue it"),
        ("config.yaml", "or put the config.yaml back that this run had"),
        ("config.yaml metrics.csv checkpoints", ""),  # it may be anybody's
    ],
)
def test_a_used_folder_has_the_hint_that_helps(here, trained, tmp_path, missing, way):
    """A run whose config.yaml is not there any more was to be continued, which was refused too."""
    ignored = shutil.ignore_patterns(*missing.split())
    copy = shutil.copytree(trained, tmp_path / "run", ignore=ignored)
    for flags in ([], ["--continue"]) if missing else ([],):
        said, hint = mistake(here("train", *SMALL, *flags, "--output", copy, status=None))
        assert "is not empty" in said and "--output" in hint
        assert way in hint and ("--resume" in hint) is (not missing)
        assert bool(way) is (", or " in hint)


def test_a_folder_that_cannot_be_written(here, tmp_path):
    (tmp_path / "file").write_text("mine")
    flags = [*SMALL, "--steps", 2, "--output", tmp_path / "file" / "run"]
    said, hint = mistake(here("train", *flags, status=None))
    assert "cannot write" in said and "--output" in hint
    assert (tmp_path / "file").read_text() == "mine"


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def broken(kind: str, good, to) -> None:
    content = good.read_bytes()
    if kind == "cut short":
        to.write_bytes(content[: len(content) // 2])
    elif kind == "a bit flipped":
        middle = len(content) // 2
        to.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif kind == "text":
        to.write_text("not a checkpoint")
    elif kind == "foreign":
        torch.save({"state_dict": {}}, to)
    elif kind == "harmful":
        torch.save({"state_dict": {}, "experiment": Harmful()}, to)


@pytest.mark.parametrize(
    "kind, error",
    [
        ("cut short", "is no checkpoint, or is cut short"),
        ("a bit flipped", "fails its checksum"),
        ("text", "is no checkpoint"),
        ("foreign", "is not a checkpoint of resnetv2"),
        ("harmful", "holds more than tensors"),
    ],
)
def test_checkpoints_that_are_none(here, trained, tmp_path, kind, error):
    file = tmp_path / "bad.ckpt"
    broken(kind, trained / "checkpoints" / "last.ckpt", file)
    said, _ = mistake(here("eval", file, status=None, cwd=tmp_path))
    assert error in said
    assert not (tmp_path / "harmed").exists()


def test_a_checkpoint_of_another_architecture(here, trained):
    said, hint = mistake(here("eval", trained, "--depth", 14, status=None))
    assert said.endswith("is of another architecture: depth 8 there, depth 14 here")
    assert hint == "it is that of --depth 8"


def test_a_checkpoint_of_other_classes(here, trained, shared_data):
    flags = ["--dataset", "cifar10", "--data-dir", shared_data]
    said, _ = mistake(here("eval", trained, *flags, status=None))
    assert "knows other classes (0, 1, 2, ...) than the images have (airplane" in said


def test_a_run_folder_that_became_read_only(here, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "result.json").unlink()
    (copy / "metrics.csv").unlink()
    (copy / "metrics.csv").mkdir()  # no file can be written there, whoever one is
    done = here("train", "--resume", copy, status=2)
    assert "metrics.csv" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("where", [0, 1, 3])
def test_debug_shows_the_traceback(resnetv2, where):
    arguments = ["train", "--depth", 111]
    done = resnetv2(*arguments[:where], "--debug", *arguments[where:], status=1)
    assert "Traceback" in done.stderr and "no network has 111 layers" in done.stderr


def test_where_nothing_can_be_written_the_file_is_named(here):
    done = here("describe", "--depth", 8, "--picture", "/proc/q.svg", status=2)
    *_, what, hint = done.stderr.splitlines()
    assert what.startswith("error: cannot write /proc/q.svg: ") and "yours" in hint


def test_a_command_to_go_on_with_can_be_typed(resnetv2, tmp_path):
    folder = tmp_path / "with a blank"
    done = resnetv2("train", *SMALL, "--steps", 2, "--output", folder)
    assert done.stderr.splitlines()[-1] == f"evaluate: resnetv2 eval '{folder}'"
    again = resnetv2("train", *SMALL, "--steps", 2, "--output", folder, status=2)
    assert f"resnetv2 train --resume '{folder}'" in again.stderr
    said = json.loads((folder / "manifest.json").read_text())["command"]
    assert said.endswith(f"--output '{folder}'") and shlex.split(said)[-1] == str(folder)


def test_a_full_memory_is_one_line(resnetv2):
    done = resnetv2("bench", "step", "--depth", 8, "--batch-size", 2 * 10**9, status=2)
    *_, what, hint = done.stderr.splitlines()
    assert what == "error: the memory is full: 24,576 GB more were asked for"
    assert hint.startswith("hint: a smaller --batch-size")


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"),
            "2.50 GiB",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), ""),
        (RuntimeError("Triton Error [CUDA]: out of memory"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), ""),
        (MemoryError(), ""),
    ],
)
def test_so_it_is_on_a_gpu(error, words, monkeypatch, here):
    def full(given):
        raise error

    monkeypatch.setattr(cli, "app", full)
    said = f": {words} more were asked for" if words else ""
    done = here("list", status=2)
    assert done.stderr.startswith(f"error: the memory is full{said}\nhint: ")


def test_another_error_keeps_its_traceback(monkeypatch, here):
    monkeypatch.setattr(cli, "app", lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here("list")


@pytest.mark.parametrize("words", [["list"], ["train", "--depth", "9"]])
def test_a_reader_who_leaves_is_no_difference_that_verify_resume_found(words):
    """A table, as the message of a mistake; 1 is kept for that."""
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
    """As Ctrl-C, timeout and some queues send it: workers that decode images hear it as well."""
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
    slow = ["--dataset", "digits", "--depth", 110, "--batch-size", 512, "--log-every", 1]  # seconds
    command = [SCRIPT, "train", *slow, "--steps", 5000, "--output", folder]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **THREADS}, stderr=subprocess.PIPE, text=True
    )
    lines = folder / "metrics.csv"
    while process.poll() is None and not (lines.exists() and "\n1," in lines.read_text()):
        time.sleep(0.02)
    while process.poll() is None:  # two that come together are one
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
    """Rich takes :key: for a picture of one, and [v2] for a style."""
    said = here("describe", "--depth", 8, "--shortcut", "a:b:c", status=2).stderr
    assert "'a:b:c' is no module:Class" in said
    console.table("mine:Fire:ratio=4", ["mine:Key:a"], [["mine:Link:start=0"]])
    console.say("a:fire:[v2] in q[/b]")
    said = capsys.readouterr().out
    for text in ("mine:Fire:ratio=4", "mine:Key:a", "mine:Link:start=0", "a:fire:[v2] in q[/b]"):
        assert text in said


@pytest.mark.parametrize(
    "line",
    ["describe --depth 8 --picture .", "list --picture .", "predict RUN x.png --picture .",
     "export RUN --format safetensors --output .", "report RUN --output ."],
)  # fmt: skip
def test_a_file_that_is_a_folder_is_one_line(line, here, trained, tmp_path):
    words = [str(trained) if word == "RUN" else word for word in line.split()]
    error, hint = here(*words, status=2, cwd=tmp_path).stderr.splitlines()[-2:]
    assert error == "error: . is a folder" and "name" in hint


def test_an_output_below_a_file_asks_for_its_folder(here, trained, tmp_path):
    (tmp_path / "file").touch()
    done = here("plot", trained, "--output", tmp_path / "file", status=2)
    assert "is its folder there" in done.stderr


def test_debug_is_of_one_command(here, monkeypatch):
    monkeypatch.delenv(cli.DEBUG, raising=False)
    with pytest.raises(UserError):
        here("--debug", "show", "--depth", 7)
    here("show", "--depth", 7, status=2)
    assert cli.DEBUG not in os.environ


def test_allow_code_wants_a_name(here):
    assert "--allow-code names nothing" in here("list", "--allow-code", status=2).stderr


@pytest.mark.parametrize("place", ["/a/" + "with blanks " * 12 + "x", "a\nb", "steps: 3  # no"])
def test_what_show_prints_is_read_again(place, here, tmp_path):
    shown = here("show", "--data-dir", place, "--depth", 20).stdout
    assert "depth: 20  # flag\n" in shown
    (tmp_path / "mine.yaml").write_text(shown)
    e = Experiment.load(tmp_path / "mine.yaml")
    assert (e.data_dir, e.depth) == (place, 20)
