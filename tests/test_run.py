"""Runs of the console script: their folder, how they end, and that nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import SCRIPT, SMALL, THREADS

from resnetv2_cli import checkpoint, leaving, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.data import images
from resnetv2_cli.describe import refuse_one_value
from resnetv2_cli.errors import Stopped
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.task import Classification

STEPS = 46  # two epochs of 23


def metrics(folder) -> str:
    return (folder / "metrics.csv").read_text()


def last(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same_state(a, b) -> None:
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"], rtol=0, atol=0
    )
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert a["global_step"] == b["global_step"]


def test_a_run_folder_holds_what_scripts_rely_on(trained):
    of_eval_and_analyze = ("confusion", "analysis")
    names = sorted(p.name for p in trained.iterdir() if not p.name.startswith(of_eval_and_analyze))
    assert names == [
        "checkpoints", "config.yaml", "curves.png", "manifest.json", "metrics.csv",
        "result.json", "speed.csv",
    ]  # fmt: skip
    result = json.loads((trained / "result.json").read_text())
    assert 0 <= result["test_error"] <= 100
    assert (result["train_images"], result["test_images"], result["epochs"]) == (1437, 360, 4)
    assert yaml.safe_load((trained / "config.yaml").read_text())["steps"] == result["steps"] == 92
    assert result["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    saved = last(trained)
    assert saved["global_step"] == 92 and saved["experiment"]["depth"] == 8
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_it_learned_the_digits(trained):
    assert json.loads((trained / "result.json").read_text())["test_error"] < 40  # chance is 90


def test_the_metrics_file(trained):
    header, *lines = metrics(trained).splitlines()
    assert header == "step,epoch,lr,train_loss,train_error,test_loss,test_error"
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    tested = [int(r["step"]) for r in rows if r["test_error"]]
    assert tested == [23, 46, 69, 92]
    logged = [int(r["step"]) for r in rows if r["train_loss"]]
    assert logged == [*range(5, 92, 5), 92]
    wrong = 320 * float(rows[0]["train_error"]) / 100  # in 5 iterations
    assert wrong == pytest.approx(round(wrong), abs=1e-3) and 100 < wrong <= 320
    result = json.loads((trained / "result.json").read_text())
    for name in ("train_loss", "train_error", "test_error"):
        [*_, end] = [float(r[name]) for r in rows if r[name]]
        assert end == pytest.approx(result[name], rel=1e-5)


FLAGS = ["--shortcut", "dropout", "--unit", "original", "--accumulate", 2, "--steps", STEPS]


@pytest.fixture(scope="module")
def never_stopped(resnetv2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    resnetv2("train", *SMALL, *FLAGS, "--log-every", 7, "--output", folder)
    return folder


def stopped_by(number: int, folder, at: int, flags=FLAGS) -> int:
    """Start the same run, and send it the signal once its metrics reach iteration ``at``; return
    its exit status."""
    command = [SCRIPT, "train", *SMALL, *flags, "--log-every", 7, "--output", folder]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, **THREADS}, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        file = folder / "metrics.csv"
        if file.exists() and f"\n{at}," in file.read_text():
            process.send_signal(number)
            break
        time.sleep(0.01)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    "number, at, status",
    [
        (signal.SIGTERM, 7, 143),
        (signal.SIGINT, 28, 130),
        (signal.SIGKILL, 35, -9),
        (signal.SIGUSR1, 23, 138),
    ],
)
def test_a_stopped_run_continues_as_if_it_had_not(
    resnetv2, never_stopped, tmp_path, number, at, status
):
    """Weights, optimizer and metrics bit for bit, with random draws and accumulation in play."""
    folder = tmp_path / "run"
    assert stopped_by(number, folder, at) == status
    before = last(folder)["global_step"]
    assert 0 < before < STEPS and not (folder / "result.json").exists()
    if number == signal.SIGTERM:
        assert before % 23 != 0  # in the middle of an epoch
    resnetv2("train", "--resume", folder)
    same_state(last(folder), last(never_stopped))
    assert metrics(folder) == metrics(never_stopped)
    a, b = (json.loads((f / "result.json").read_text()) for f in (folder, never_stopped))
    for key in ("environment", "test_set_readings"):
        assert a.pop(key) != b.pop(key) or key == "test_set_readings"
    assert a == b


def test_a_time_budget_saves_and_leaves_cleanly(here, tmp_path):
    folder = tmp_path / "run"
    done = here("train", *SMALL, "--steps", 5000, "--time", "1s", "--output", folder)
    assert "continue with: resnetv2 train --resume" in done.stderr
    assert 0 < last(folder)["global_step"] < 5000


def test_leaving_after_an_evaluation_saves_once(tmp_path, monkeypatch):
    """Else ``previous.ckpt`` would be a copy of ``last.ckpt``."""
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=46, eval_every=0.5)
    folder = RunFolder(tmp_path / "run")
    wishes = iter([0, 1])  # at the first evaluation, and at the second
    monkeypatch.setattr(leaving.Leaver, "on_train_batch_end", lambda *_: None)
    monkeypatch.setattr(leaving.Leaver, "wish", lambda *_: next(wishes) and leaving.TIME_OVER)
    with pytest.raises(Stopped):
        run.train(e, folder)
    steps = [checkpoint.read(file)["global_step"] for file in (folder.previous, folder.last)]
    assert steps == [12, 24]


def test_resuming_a_finished_run_changes_nothing(here, trained):
    before = {p: p.read_bytes() for p in (trained / "metrics.csv", trained / "config.yaml")}
    here("train", "--resume", trained)
    for path, content in before.items():
        assert path.read_bytes() == content


def test_resume_refuses_what_would_make_it_another_experiment(here, trained):
    done = here("train", "--resume", trained, "--lr", 0.2, status=2)
    assert "--lr 0.2 would make this another experiment" in done.stderr


def test_resume_says_what_it_changes(here, never_stopped):
    done = here("train", "--resume", never_stopped, "--workers", 1)
    assert "--workers: 2 -> 1" in done.stderr


# One command that begins a run or continues it.

AGAIN = ["train", *SMALL, *"--steps 12 --save-every 6 --shortcut dropout --precision auto".split()]


def test_one_command_begins_continues_and_finds_nothing_left_to_do(tmp_path, here):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    again = [*AGAIN, "--continue", "--output"]
    here(*again, whole)
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    saved = folder / "checkpoints"
    (saved / "step-00000006.ckpt").rename(saved / "last.ckpt")
    here(*again, folder)
    assert json.loads((folder / "manifest.json").read_text())["resumes"][0]["step"] == 6
    same_state(last(folder), last(whole))
    assert metrics(folder) == metrics(whole)
    before = metrics(folder)
    done = here(*again, folder)
    assert "nothing is left to do" in done.stderr
    assert metrics(folder) == before

    # A setting that was not given then is reported as a change, or refused, as with --resume.
    done = here(*again, folder, "--workers", 1)
    assert "--workers: 2 -> 1" in done.stderr
    (tmp_path / "other.yaml").write_text("lr: 0.2")
    done = here(*again, folder, "--config", tmp_path / "other.yaml", status=2)
    assert "--lr 0.2 would make this another experiment" in done.stderr
    done = here(*AGAIN, "--continue", status=2)
    assert "--continue needs --output" in done.stderr


@pytest.mark.parametrize("command", [["train", *SMALL], ["ablate", "--table", 1]])
def test_an_empty_budget_of_time_is_none_that_was_forgotten(here, command):
    assert "time" in here(*command, "--time", "", status=2).stderr


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_one_image_of_which_bn_has_one_value_is_refused(here, tmp_path, kernels):
    """With the ImageNet stem, 32x32 pixels end as one; with CIFAR's, as 8x8."""
    flags = ["--dataset", "digits", "--batch-size", 2, "--accumulate", 2, "--kernels", kernels]
    imagenet = ["--stem", "imagenet", "--depth", 18, "--output", tmp_path / "run"]
    done = here("train", *flags, *imagenet, status=2)
    assert "error: iteration 1 trains on one image at a time, of which BN has one" in done.stderr
    assert "hint: use another --batch-size, or larger micro-batches" in done.stderr
    assert not (tmp_path / "run").exists()
    refuse_one_value(Experiment(dataset="digits", depth=8), 1)


def test_a_training_reads_its_images_once(monkeypatch, tmp_path):
    """Lightning asks every process for them again, before each training and evaluation."""
    read, load = [], images.load
    monkeypatch.setattr(images, "load", lambda name, *rest: read.append(name) or load(name, *rest))
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=2, accelerator="cpu")
    run.train(e, RunFolder(tmp_path / "run"))
    assert read == ["digits"]


def test_time_that_goes_by_before_a_training_is_a_part_of_what_it_has(monkeypatch, tmp_path):
    """However long the images take: here ten seconds, when three iterations may follow."""
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(run, "time", clock)
    monkeypatch.setattr(leaving, "time", clock)
    build, step = run.build, Classification.training_step

    def later(seconds, then):
        def call(*given, **more):
            now[0] += seconds
            return then(*given, **more)

        return call

    monkeypatch.setattr(run, "build", later(10, build))
    monkeypatch.setattr(Classification, "training_step", later(1, step))
    folder = RunFolder(tmp_path / "run")
    e = Experiment(dataset="digits", depth=8, batch_size=64, steps=20, accelerator="cpu")
    with pytest.raises(Stopped):
        run.train(e, folder, seconds=12.5)
    assert checkpoint.read(folder.last)["global_step"] == 3


def test_a_run_without_a_folder_takes_none_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    e = Experiment(dataset="digits", depth=8)
    for number in ("", ".2", ".3"):
        place = RunFolder.free(e).path
        assert str(place) == f"runs/{e.name}{number}"
        place.mkdir(parents=True)


def test_same_seed_same_run(resnetv2, tmp_path):
    for name in ("a", "b"):
        resnetv2("train", *SMALL, "--steps", 12, "--seed", 4, "--output", tmp_path / name)
    same_state(last(tmp_path / "a"), last(tmp_path / "b"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_validation_split_chooses_the_best(here, tmp_path):
    flags = ["--val", 200, "--epochs", 3, "--save-every", 10, "--output", tmp_path / "run"]
    said = here("train", *SMALL, *flags).stdout
    header, *lines = metrics(tmp_path / "run").splitlines()
    assert header.endswith("val_loss,val_error")
    errors = [float(line.split(",")[-1]) for line in lines if line.split(",")[-1]]
    saved = tmp_path / "run" / "checkpoints"
    best = torch.load(saved / "best.ckpt", weights_only=True)
    assert best["global_step"] == (errors.index(min(errors)) + 1) * 20
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["train_images"] == 1237 and result["test_step"] == best["global_step"]
    assert f"after {best['global_step']} iterations, chosen by --val, of 60" in said
    assert sorted(p.name for p in saved.iterdir()) == [
        "best.ckpt", "last.ckpt", "previous.ckpt",
        *(f"step-{step:08d}.ckpt" for step in range(10, 61, 10)),
    ]  # fmt: skip


def test_a_checkpoint_is_never_replaced_by_one_that_is_not_finite(here, tmp_path):
    """The evaluation at iteration 23 would save it: the loss is checked only every 1000."""
    flags = ["--lr", 1e30, "--warmup", 0, "--precision", "32-true", "--steps", 40]
    folder = tmp_path / "run"
    here("train", *SMALL, *flags, "--log-every", 1000, "--output", folder, status=2)
    assert not (folder / "checkpoints" / "last.ckpt").exists()


def test_a_diverging_run_says_so_and_keeps_its_last_checkpoint(here, tmp_path):
    flags = ["--lr", 1e30, "--warmup", 0, "--precision", "32-true", "--steps", 40]
    folder = tmp_path / "run"
    done = here("train", *SMALL, *flags, "--output", folder, status=2)
    assert "error: the loss is not finite at iteration" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "failed.json").exists() and not (folder / "result.json").exists()


# Two processes.

DDP = ["--devices", 2, "--accelerator", "cpu", "--precision", "32-true"]


def test_two_processes_train_and_evaluate(resnetv2, trained, tmp_path):
    folder = tmp_path / "run"
    resnetv2("train", *SMALL, *DDP, "--epochs", 3, "--output", folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["test_images"] == 360 and result["test_error"] < 60
    scores = [
        json.loads(resnetv2("eval", folder, "--json", *flags).stdout)
        for flags in (DDP, ["--devices", 1, "--precision", "32-true"])
    ]
    assert scores[0]["images"] == scores[1]["images"] == 360
    assert scores[0]["confusion"] == scores[1]["confusion"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-6)


def test_two_processes_leave_together_and_continue_as_if_they_had_not(resnetv2, tmp_path):
    flags = [*FLAGS, *DDP]
    resnetv2("train", *SMALL, *flags, "--log-every", 7, "--output", tmp_path / "whole")
    assert stopped_by(signal.SIGTERM, tmp_path / "run", 14, flags) == 143
    assert 14 <= last(tmp_path / "run")["global_step"] < STEPS
    resnetv2("train", "--resume", tmp_path / "run")
    same_state(last(tmp_path / "run"), last(tmp_path / "whole"))
    rows = [
        [float(cell or "nan") for line in metrics(f).splitlines()[1:] for cell in line.split(",")]
        for f in (tmp_path / "run", tmp_path / "whole")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5, nan_ok=True)


def test_two_processes_with_shared_bn_learn_what_one_learns(resnetv2, tmp_path):
    """1 x 128 and 2 x 64 images, 50 iterations: the same losses up to rounding, which grows."""
    flags = ["--steps", 50, "--warmup", 50, "--batch-size", 128, "--precision", "32-true"]
    resnetv2("train", *SMALL, *flags, "--output", tmp_path / "one")
    two = [*DDP, "--sync-bn", "--output", tmp_path / "two"]
    said = resnetv2("train", *SMALL, *flags, *two).stderr
    assert "128 images an iteration: 64 on each of 2 devices" in said
    losses = [read_metrics(tmp_path / run / "metrics.csv")["train_loss"] for run in ("one", "two")]
    assert [step for step, _ in losses[0]] == list(range(5, 51, 5))
    for rel, among in ((1e-4, slice(2)), (2e-3, slice(None))):
        expected = [(step, pytest.approx(loss, rel=rel)) for step, loss in losses[0][among]]
        assert losses[1][among] == expected
