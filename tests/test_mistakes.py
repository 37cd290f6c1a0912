"""Each mistake gets one clear line, a hint and exit status 2; nothing that existed is lost."""

import os
import shutil

import pytest
import torch
from conftest import SMALL

from resnetv2_cli import cli, evaluation


def mistake(done) -> tuple[str, str]:
    """The error line and its hint."""
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
    done = here(*arguments, status=None, cwd=tmp_path)
    said, hinted = mistake(done)
    assert error in said and hint in hinted and not done.stdout
    assert done.stderr.splitlines()[-2].startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, error, hint",
    [
        (["train", "--dpeth", "20"], "no such option", "train --help"),
        (["train", "--depth", "deep"], "invalid value for '--depth'", "train --help"),
        (["train", "--unit"], "option '--unit' requires an argument", "--help"),
        (["train", "20"], "unexpected extra argument", "train --help"),
        (["eval"], "missing argument", "eval --help"),
        (["trian"], "no such command 'trian'. Did you mean 'train'?", "--help"),
        (["runs", "sohw"], "no such command 'sohw'", "runs --help"),
    ],
)
def test_words_that_are_no_command_and_no_flag_are_a_line_and_a_hint_alone(
    here, arguments, error, hint
):
    done = here(*arguments, status=2)
    said, hinted = mistake(done)
    assert error in said and hinted.endswith(hint)
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 2)


def test_a_mistaken_flag_exits_with_2(here):
    done = here("train", "--dept", 20, status=2)
    assert "--depth" in done.stderr and "Traceback" not in done.stderr
    for flag in ("--lr", "--batch-size", "--accumulate"):  # not flags of eval
        said = here("eval", "x.ckpt", flag, 1, status=2).stderr
        assert "no such option" in said and flag in said


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
    done = here("train", *SMALL, "--output", trained, status=None)
    said, hint = mistake(done)
    assert "is not empty" in said and "--resume" in hint
    assert done.stderr.startswith("error: ")  # not with lines on the training and what it needs
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "missing, way",
    [
        ("", "or continue it"),
        ("config.yaml", "or restore this run's config.yaml"),
        ("config.yaml metrics.csv checkpoints", ""),  # it may not be a run at all
    ],
)
def test_a_used_folder_has_the_hint_that_helps(here, trained, tmp_path, missing, way):
    """A hint to continue a run whose config.yaml is missing would lead to another refusal."""
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
    assert "knows other classes (10: 0, 1, 2, ...) than the images have (10: airplane, " in said


@pytest.mark.parametrize(
    ("classes", "others", "said"),
    [
        (["a", "b", "c"], ["b", "a", "c"], "3: a, b, c"),
        (["a", "b", "c", "d", "e", "f"], ["a", "b", "C"], "6: ..., c, d, e, ..."),
        (["a", "b"], ["a", "b", "c"], "2: ..."),
        ([], ["a"], "0: "),
    ],
)
def test_classes_are_told_from_where_they_differ(classes, others, said):
    assert evaluation.excerpt(classes, others) == said


def test_a_run_folder_that_became_read_only(here, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "result.json").unlink()
    (copy / "metrics.csv").unlink()
    (copy / "metrics.csv").mkdir()  # not even root can write a file there
    done = here("train", "--resume", copy, status=2)
    assert "metrics.csv" in done.stderr and "Traceback" not in done.stderr


def test_where_nothing_can_be_written_the_file_is_named(here):
    done = here("describe", "--depth", 8, "--picture", "/proc/q.svg", status=2)
    *_, what, hint = done.stderr.splitlines()
    assert what.startswith("error: cannot write /proc/q.svg: ") and "yours" in hint


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
    def full(given, standalone_mode):
        raise error

    monkeypatch.setattr(cli, "app", full)
    said = f": {words} more were asked for" if words else ""
    done = here("list", status=2)
    assert done.stderr.startswith(f"error: the memory is full{said}\nhint: ")


def test_another_error_keeps_its_traceback(monkeypatch, here):
    monkeypatch.setattr(cli, "app", lambda given, standalone_mode: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here("list")


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


def test_allow_code_wants_a_name(here):
    assert "--allow-code names nothing" in here("list", "--allow-code", status=2).stderr
