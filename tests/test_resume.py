"""A run continued with other settings, or for longer: when it is the same run, when it is another,
and what is reported."""

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, replace

import pytest
from lightning.pytorch import Callback
from trainings import TINY, At, trained_as

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import Stopped, UserError
from resnetv2_cli.resume import continued, extend, finished, same_run
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.verify import differences


def test_a_changed_flag_is_announced_with_its_effect_or_refused(whole):
    _, changes = continued(whole, {"workers": 1, "lr": 0.1})
    assert [str(c) for c in changes] == [
        "--workers: 2 -> 1: the images are the same, wherever they are and whoever reads them"
    ]
    for flags in ({"lr": 0.2}, {"seed": 1}, {"eval_every": 2.0}, {"non_finite": "skip"}):
        with pytest.raises(UserError, match="would make this another experiment"):
            continued(whole, flags)
    with pytest.raises(UserError, match="10 iterations are fewer than the 12 the run was begun"):
        continued(whole, {"steps": 10})


def test_the_length_that_a_run_was_begun_with_is_not_that_it_was_extended_to(whole, tmp_path):
    """As when a queue repeats the command that began the run."""
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    longer, changes = continued(folder, {"steps": 23})
    folder.go_on(longer, 12, {c.name: c.after for c in changes}, {})
    with pytest.raises(UserError, match="12 iterations are fewer than the 23 .* was extended to"):
        continued(folder, {"steps": 12})


def test_a_file_with_every_setting_begins_and_continues(whole):
    """A value that the file leaves open is not a change."""
    experiment, changes = continued(whole, asdict(Experiment(**TINY)))
    assert experiment == whole.experiment() and not changes


def test_every_setting_that_may_change_says_what_that_does():
    from dataclasses import fields

    free = {f.name: f.metadata["free"] for f in fields(Experiment) if f.metadata["free"]}
    assert {"devices", "data_dir", "tensorboard"} <= set(free)
    assert all(len(effect.split()) > 2 for effect in free.values())


@pytest.mark.parametrize("name, before, now", [("lr", 0.1, 0.2), ("steps", 12, 24)])
def test_a_config_edited_by_hand_is_noticed(whole, tmp_path, name, before, now):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    folder.result.unlink()
    text = folder.config.read_text()
    folder.config.write_text(text.replace(f"\n{name}: {before}\n", f"\n{name}: {now}\n"))
    with pytest.raises(UserError, match=f"its {name} is {before}, not {now}"):
        trained_as(folder.path, resume={})


def test_longer_training_is_one_run_where_the_rates_were_the_same(tmp_path):
    """With no drop or warm-up so far, it ends as if planned for that long, and says so."""
    flat = {"drops": "1,1", "warmup": 0}
    longer = trained_as(tmp_path / "long", **flat, steps=20)
    short, said = trained_as(tmp_path / "run", **flat), []
    short.curves.write_text("of 12 iterations")
    trained_as(short.path, said.append, resume={"steps": 20})
    assert short.curves.read_bytes().startswith(b"\x89PNG")
    assert "its learning rates so far are those of 20 iterations too: one run" in said
    assert not differences(longer, short)["weights"]
    assert json.loads(short.result.read_text())["extended"] == [
        {"from_steps": 12, "at": 12, "one_schedule": True}
    ]
    assert json.loads((short.path / "result-00000012.json").read_text())["steps"] == 12
    assert finished(short, short.experiment())  # config.yaml has the longer training now


def test_longer_training_with_other_rates_so_far_says_so(tmp_path):
    folder, said = trained_as(tmp_path / "run"), []
    trained_as(folder.path, said.append, resume={"steps": 20})
    line = "not one run of 20 iterations: 7 to 12 had learning rates of the schedule of 12"
    assert line in said[2]
    assert not json.loads(folder.result.read_text())["extended"][0]["one_schedule"]


class Scored(Callback):
    """Replaces the errors that evaluations find, by iteration."""

    def __init__(self, errors) -> None:
        self.errors = errors

    def on_validation_end(self, trainer, task) -> None:
        task.scores["error"] = self.errors[task.scores["step"]]


def test_longer_training_keeps_what_was_chosen_after_the_last_iteration(tmp_path):
    """Even if a later evaluation finds the same error."""
    scored = Scored({5: 80.0, 10: 70.0, 12: 60.0, 14: 60.0})
    folder = trained_as(tmp_path / "run", display=[scored], val=100, eval_every=0.06)
    assert checkpoints.read(folder.best)["global_step"] == 12
    trained_as(folder.path, display=[scored], resume={"steps": 14})
    assert checkpoints.read(folder.best)["global_step"] == 12
    assert json.loads(folder.result.read_text())["test_step"] == 12


class Killed(Exception):
    """Like SIGKILL: nothing is saved."""


def test_longer_training_that_was_killed_before_its_first_checkpoint_goes_on(tmp_path):
    def die():
        raise Killed

    folder, said = trained_as(tmp_path / "run"), []
    with pytest.raises(Killed):
        trained_as(folder.path, display=[At(13, die)], resume={"steps": 20})
    assert checkpoints.read(folder.last)["experiment"]["steps"] == 12
    trained_as(folder.path, said.append, resume={})
    assert json.loads(folder.result.read_text())["steps"] == 20


def test_what_longer_training_makes_of_a_long_run_is_said_at_once():
    """It once took 36 s, growing with every past iteration."""
    said, e = [], Experiment()
    began = time.process_time()
    made = extend(e, replace(e, steps=66_000), e.steps, [], said.append)
    assert time.process_time() - began < 8 and not made["one_schedule"]


def test_every_schedule_that_a_longer_training_had_is_named(tmp_path):
    folder, said = trained_as(tmp_path / "run", warmup=0), []
    trained_as(folder.path, said.append, resume={"steps": 16})
    trained_as(folder.path, said.append, resume={"steps": 20})
    [first, second] = [line for line in said if "not one run" in line]
    assert "of 16 iterations: 7 to 12 had learning rates of the schedule of 12;" in first
    assert "of 20 iterations: 7 to 15 had learning rates of the schedules of 12, 16;" in second
    made = json.loads(folder.result.read_text())["extended"]
    assert [e["one_schedule"] for e in made] == [False, False]
    assert [(e["from_steps"], e["at"]) for e in made] == [(12, 12), (16, 16)]


def test_the_speed_after_a_resume_is_of_the_time_since_then(tmp_path):
    with pytest.raises(Stopped):
        leave = At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trained_as(tmp_path / "run", display=[leave])
    began = time.perf_counter()
    folder = trained_as(tmp_path / "run", resume={})
    least = 2 * TINY["batch_size"] / (time.perf_counter() - began)  # iterations 8 and 9 took less
    speeds = dict(read_metrics(folder.speed)["images_per_second"])
    assert list(speeds) == [3, 6, 9, 12] and speeds[9] > least


def test_a_checkpoint_of_a_longer_run_is_refused_that_of_a_shorter_one_extended(whole):
    held, e = checkpoints.read(whole.last), whole.experiment()
    same_run(whole.last, held, replace(e, steps=13), held["data"], [13])
    for steps, lengths in ((11, []), (11, [11]), (13, []), (13, [14])):
        with pytest.raises(UserError, match=f"its steps is 12, not {steps}"):
            same_run(whole.last, held, replace(e, steps=steps), held["data"], lengths)


def test_a_run_is_continued_with_the_images_it_learned_from(whole):
    held = checkpoints.read(whole.last)
    with pytest.raises(UserError, match="the images are not those"):
        same_run(whole.last, held, whole.experiment(), "0" * 64, [])


def test_epochs_are_counted_as_so_many_processes_share_them(tmp_path):
    """The digits fill 4 batches and leave one image, which two processes add to the fourth."""
    few = {"dataset": "digits", "depth": 8, "batch_size": 359, "accelerator": "cpu"}
    task, data = run.build(Experiment(**few, devices="2", epochs=2))
    assert task.experiment.steps == 8 and data.facts["steps_per_epoch"] == 4
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    folder.create(task.experiment, {})
    assert continued(folder, {"epochs": 3})[0].steps == 12
    assert continued(folder, {"epochs": 3, "devices": "1"})[0].steps == 15


def test_longer_training_counts_epochs_of_the_images_where_they_are_now(tree, tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    photographs = {"dataset": "folder", "depth": 18, "batch_size": 2, "steps": 4}
    folder.create(Experiment(**photographs, data_dir=str(tmp_path / "gone")), {})
    experiment, changes = continued(folder, {"epochs": 3, "data_dir": str(tree)})
    assert experiment.steps == 6 and experiment.data_dir == str(tree)
    assert [c.name for c in changes] == ["steps", "data_dir"]
