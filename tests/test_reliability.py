"""Nothing lost, nothing different: damaged checkpoints, full disks, changed settings, and where
every value came from. Trainings run in this process; test_run.py kills them."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import manifest, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import Damaged, NotSaved, Stopped, UserError
from resnetv2_cli.files import taken
from resnetv2_cli.manifest import ORIGINS, origins
from resnetv2_cli.resume import continued, extend, finished, same_run
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.verify import difference, differences

TINY = {
    "dataset": "digits", "depth": 8, "batch_size": 16, "steps": 12, "log_every": 3,
    "eval_every": 0.07, "save_every": 4, "precision": "32-true",
}  # fmt: skip


def trained_as(folder, tell=run.silent, display=(), resume=None, **settings) -> RunFolder:
    """Train in this process; ``resume``: flags with which a run is continued."""
    folder = RunFolder(folder)
    if resume is None:
        experiment = Experiment(**{**TINY, **settings})
    else:
        experiment, _ = continued(folder, resume)
    run.train(experiment, folder, resume=resume is not None, display=list(display), tell=tell)
    return folder


class At(Callback):
    """Does something once an iteration is done."""

    def __init__(self, step, do) -> None:
        self.step, self.do = step, do

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            self.do()


def same(one: RunFolder, other: RunFolder) -> bool:
    return not any(differences(one, other).values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    return trained_as(tmp_path_factory.mktemp("whole") / "run")


# Checkpoints.


def damage(good: bytes, n: int) -> bytes:
    moments = random.Random(n)
    if n % 3 == 0:
        return good[: moments.randrange(len(good))]
    at = len(good) - 1 - moments.randrange(82) if n % 3 == 1 else moments.randrange(len(good))
    return good[:at] + bytes([good[at] ^ 1 << moments.randrange(8)]) + good[at + 1 :]


def test_every_damage_is_known_before_a_checkpoint_is_used(whole, tmp_path):
    """Cut anywhere; one bit flipped in the seal; one bit flipped anywhere, in padding too."""
    file, good = tmp_path / "bad.ckpt", whole.last.read_bytes()
    for n in range(60):
        file.write_bytes(damage(good, n))
        with pytest.raises(Damaged):
            checkpoints.read(file)


def test_any_zip_reader_and_torch_itself_open_a_sealed_one(whole):
    assert torch.load(whole.last, weights_only=True)["global_step"] == 12


def test_one_without_a_seal_is_of_an_earlier_version(whole, tmp_path):
    old = checkpoints.read(whole.last)
    del old[checkpoints.SEALED]
    torch.save(old, tmp_path / "old.ckpt")
    assert checkpoints.read(tmp_path / "old.ckpt")["global_step"] == 12
    torch.save(checkpoints.read(whole.last), tmp_path / "lost.ckpt")
    with pytest.raises(Damaged, match="checksum at its end"):
        checkpoints.read(tmp_path / "lost.ckpt")


def test_the_newest_whole_one_is_continued_from_and_ends_the_same(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    folder.result.unlink()
    folder.last.unlink()
    folder.last.write_bytes(whole.last.read_bytes()[:-100])
    (folder.checkpoints / "step-00000012.ckpt").write_bytes(b"nothing")
    said = []
    trained_as(folder.path, said.append, resume={})
    assert "is damaged" in said[0] or "cut short" in said[0]
    assert "continuing from" in said[0] and said[0].endswith("iteration 8")
    assert same(folder, whole)


def test_where_none_is_whole_it_does_not_begin_again(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    folder.result.unlink()
    for file in folder.checkpoints.glob("*.ckpt"):
        file.unlink()
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no whole one beside it"):
        trained_as(folder.path, resume={})


def test_on_a_full_disk_it_trains_on_and_loses_nothing(whole, tmp_path, full):
    said = []
    events = [At(2, lambda: full(100)), At(9, full)]  # no line of metrics, no checkpoint
    folder = trained_as(tmp_path / "run", said.append, events)
    assert "File too large" in said[0] and "training goes on" in said[0]
    assert same(folder, whole)


def test_on_a_full_disk_it_stops_if_it_is_asked_to(whole, tmp_path, full):
    with pytest.raises(NotSaved, match="File too large"):
        trained_as(tmp_path / "run", display=[At(5, lambda: full(9000))], save_failure="stop")
    full()
    folder = RunFolder(tmp_path / "run")
    assert checkpoints.read(folder.last)["global_step"] == 4
    assert same(trained_as(folder.path, resume={}), whole)


def test_what_cannot_be_saved_at_the_end_is_an_error(tmp_path, full):
    with pytest.raises(NotSaved):
        trained_as(tmp_path / "run", display=[At(5, lambda: full(9000))])
    assert checkpoints.read(RunFolder(tmp_path / "run").last)["global_step"] == 4


# Continuing.


def test_a_run_in_use_says_by_whom(tmp_path):
    with RunFolder(tmp_path).claimed():
        message = f"is in use by process {os.getpid()} on"
        with pytest.raises(UserError, match=message), RunFolder(tmp_path).claimed():
            pass
    with RunFolder(tmp_path).claimed():
        pass


def test_who_is_refused_in_a_folder_leaves_what_was_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("new/run", "mine"):
        with pytest.raises(UserError, match="precision"), RunFolder(tmp_path / folder).claimed():
            raise UserError("no such precision")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(UserError), RunFolder(tmp_path / "new" / "run").claimed():
        (tmp_path / "new" / "other").touch()
        raise UserError("and meanwhile another came")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "new", "other"]


def test_the_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    """They live on for some seconds, until they see that it has gone."""

    def hold() -> None:
        with RunFolder(tmp_path / "run").claimed():
            batches = iter(DataLoader(range(9), num_workers=1))
            next(batches)
            says.send(batches._workers[0].pid)
            time.sleep(60)

    forking = multiprocessing.get_context("fork")
    hears, says = forking.Pipe(duplex=False)
    holder = forking.Process(target=hold)
    holder.start()
    worker = hears.recv()
    assert taken(RunFolder(tmp_path / "run").lock)
    holder.kill()
    holder.join()
    os.kill(worker, 0)  # is there
    assert not taken(RunFolder(tmp_path / "run").lock)
    with RunFolder(tmp_path / "run").claimed():
        pass


def test_a_lock_that_goes_with_its_holder_holds(tmp_path):
    """Who opened it just before it went does not hold what is no longer there."""
    folder, inside, most = RunFolder(tmp_path / "run"), [], []

    def work(n: int) -> int:
        held = 0
        while held < 50:
            with suppress(UserError), folder.claimed():
                inside.append(n)
                most.append(len(inside))
                time.sleep(0)
                inside.remove(n)
                held += 1
        return held

    with ThreadPool(3) as pool:
        assert pool.map(work, range(3)) == [50] * 3
    assert set(most) == {1} and not folder.lock.exists()


def test_a_changed_flag_is_announced_with_its_effect_or_refused(whole):
    _, changes = continued(whole, {"workers": 1, "lr": 0.1})
    assert [str(c) for c in changes] == [
        "--workers: 2 -> 1: the images are the same, wherever they are and whoever reads them"
    ]
    for flags in ({"lr": 0.2}, {"seed": 1}, {"eval_every": 2.0}, {"non_finite": "skip"}):
        with pytest.raises(UserError, match="would make this another experiment"):
            continued(whole, flags)
    with pytest.raises(UserError, match="10 iterations are fewer than the 12"):
        continued(whole, {"steps": 10})


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
    """With no drop and no warm-up yet, it ends as if it had been planned so, and says so."""
    flat = {"drops": "1,1", "warmup": 0}
    longer = trained_as(tmp_path / "long", **flat, steps=20)
    short, said = trained_as(tmp_path / "run", **flat), []
    trained_as(short.path, said.append, resume={"steps": 20})
    assert "its rates so far are those of 20 iterations too: one run" in said
    assert not differences(longer, short)["weights"]
    assert json.loads(short.result.read_text())["extended"] == [
        {"from_steps": 12, "at": 12, "one_schedule": True}
    ]
    assert json.loads((short.path / "result-00000012.json").read_text())["steps"] == 12
    assert finished(short, short.experiment())  # config.yaml has the longer training now


def test_longer_training_with_other_rates_so_far_says_so(tmp_path):
    folder, said = trained_as(tmp_path / "run"), []
    trained_as(folder.path, said.append, resume={"steps": 20})
    assert "not one run of 20 iterations: 7 to 12 had rates of the schedule of 12" in said[0]
    assert not json.loads(folder.result.read_text())["extended"][0]["one_schedule"]


class Killed(Exception):
    """As SIGKILL: nothing is saved."""


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
    """It took 36 s, of which every past iteration had its part."""
    said, e = [], Experiment()
    began = time.process_time()
    made = extend(e, replace(e, steps=66_000), e.steps, [], said.append)
    assert time.process_time() - began < 8 and not made["one_schedule"]


def test_every_schedule_that_a_longer_training_had_is_named(tmp_path):
    folder, said = trained_as(tmp_path / "run", warmup=0), []
    trained_as(folder.path, said.append, resume={"steps": 16})
    trained_as(folder.path, said.append, resume={"steps": 20})
    [first, second] = [line for line in said if "not one run" in line]
    assert "of 16 iterations: 7 to 12 had rates of the schedule of 12;" in first
    assert "of 20 iterations: 7 to 15 had rates of the schedules of 12, 16;" in second
    made = json.loads(folder.result.read_text())["extended"]
    assert [e["one_schedule"] for e in made] == [False, False]
    assert [(e["from_steps"], e["at"]) for e in made] == [(12, 12), (16, 16)]


def test_the_speed_after_a_resume_is_of_the_time_since_then(tmp_path):
    with pytest.raises(Stopped):
        leave = At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trained_as(tmp_path / "run", display=[leave])
    began = time.perf_counter()
    folder = trained_as(tmp_path / "run", resume={})
    least = 2 * TINY["batch_size"] / (time.perf_counter() - began)  # 8 and 9 took less than that
    speeds = dict(read_metrics(folder.speed)["images_per_second"])
    assert list(speeds) == [3, 6, 9, 12] and speeds[9] > least


def test_a_line_cut_by_a_power_failure_is_written_again(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        trained_as(folder.path, display=[At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    with folder.metrics.open("a") as file:
        file.write("1")  # of 12,...
    assert same(trained_as(folder.path, resume={}), whole)


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


def test_longer_training_counts_epochs_of_the_images_where_they_are_now(tree, tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    photographs = {"dataset": "folder", "depth": 18, "batch_size": 2, "steps": 4}
    folder.create(Experiment(**photographs, data_dir=str(tmp_path / "gone")), {})
    experiment, changes = continued(folder, {"epochs": 3, "data_dir": str(tree)})
    assert experiment.steps == 6 and experiment.data_dir == str(tree)
    assert [c.name for c in changes] == ["steps", "data_dir"]


# The manifest.


def test_the_manifest_knows_where_values_came_from(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("depth: 8\nlr: 0.05\nepochs: 1\n")
    assert origins(config, {"lr": 0.1, "steps": 3}) == {
        "depth": f"file {config}", "lr": "flag", "steps": "flag"
    }  # fmt: skip
    config.write_text("layout: timm\ntest_size: 320\nweights_sha256: ab\n")
    keys = ["stride_on", "option", "first_act", "protocol"]
    assert origins(config, {"weights": "mine.ckpt", "pad": "raw"}) == {
        **dict.fromkeys(keys, f"file {config}"), "weights": "flag", "pad": "flag"
    }  # fmt: skip
    config.with_suffix(ORIGINS).write_text('{"depth": "row \'a\' of table1"}')
    assert origins(config, {}) == {"depth": "row 'a' of table1"}


def test_the_manifest_counts_how_often_the_test_set_was_read(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    said = folder.manifest.read()
    lines = folder.metrics.read_text().splitlines()[1:]
    assert said["test_set_readings"] == sum(not line.endswith(",") for line in lines) == 2
    run.evaluate(folder.last)
    assert folder.manifest.read()["test_set_readings"] == 3
    assert said["data"]["digest"] == checkpoints.read(whole.last)["data"] != ""
    assert said["settings"]["lr"] == {"value": 0.1, "from": "default"}
    assert said["settings"]["block"] == {"value": "basic", "from": "follows from the others"}
    assert len(said["code"]["source_sha256"]) == 64 and said["resumes"] == []


OTHERS = '{"name": "web app", "icons": []}'


@pytest.mark.parametrize("place", ["weights", "checkpoints"])
@pytest.mark.parametrize("text", [OTHERS, "[1]", "no JSON"])
def test_a_manifest_of_something_else_is_left_alone(whole, tmp_path, place, text):
    (tmp_path / place).mkdir()
    file = shutil.copy(whole.last, tmp_path / place / "net.ckpt")
    (tmp_path / "manifest.json").write_text(text)
    assert run.manifest_of(file) is None
    if text == OTHERS:
        run.evaluate(file)
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize("text", ["[1]", "no JSON"])
def test_a_manifest_that_a_run_cannot_read_any_more_is_named(whole, tmp_path, text):
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    folder.manifest.path.write_text(text)
    with pytest.raises(UserError, match="manifest.json is not the manifest of a run"):
        run.evaluate(folder.last)
    folder.result.unlink()
    with pytest.raises(UserError, match="manifest.json is not the manifest of a run"):
        trained_as(folder.path, resume={})


def test_a_checkout_that_was_changed_says_so_and_how(monkeypatch):
    says = {"ls-files": "__init__.py", "status": " M a.py", "rev-parse": "abc1234\n"}
    diffs = {("diff", "HEAD", "--", "."): "+ one line"}  # what is staged too
    monkeypatch.setattr(manifest, "git", lambda *words: diffs.get(words, says.get(words[0], "")))
    code = manifest.code(Experiment())
    assert code["commit"] == "abc1234+" and code["diff"] == "+ one line"


def test_the_digest_of_the_source_is_of_its_kernels_too(monkeypatch, tmp_path):
    package = shutil.copytree(manifest.PACKAGE, tmp_path / "package")
    monkeypatch.setattr(manifest, "PACKAGE", package)
    digests = {manifest.code(Experiment())["source_sha256"]}
    for name in ("run.py", "kernels.c", "vectors.h"):
        with (package / name).open("a") as file:
            file.write("\n")
        digests.add(manifest.code(Experiment())["source_sha256"])
    assert len(digests) == 4


def test_a_validation_split_leaves_the_test_set_unread_until_the_end(tmp_path):
    folder = trained_as(tmp_path / "run", val=1000, eval_every=0.2)
    assert folder.manifest.read()["test_set_readings"] == 1


class Ruin(Callback):
    """Takes from the network what it has learned, shortly before its last iteration."""

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 48:
            torch.nn.init.zeros_(task.net.head.fc.weight)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_was_chosen_is_what_is_tested(tmp_path, stopped):
    """Also where it was chosen before the run was stopped, and all that came later is worse."""
    long = {"batch_size": 64, "steps": 50, "eval_every": 1.0, "warmup": 0, "val": 200}
    if stopped:
        leave = At(41, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            trained_as(tmp_path / "run", display=[leave], **long)
    resume = {} if stopped else None
    folder = trained_as(tmp_path / "run", display=[Ruin()], resume=resume, **long)
    errors = dict(read_metrics(folder.metrics)["val_error"])
    assert list(errors) == [20, 40, 50]  # the last iteration too, amid an epoch
    result = json.loads(folder.result.read_text())
    assert result["test_step"] == min(errors, key=errors.__getitem__) < 50
    for what in (folder.path, folder.best):
        scores, _ = run.evaluate(checkpoints.find(what))
        assert scores["error"] == result["test_error"]


# Bits.


def test_deterministic_twice_has_the_same_bits(whole, tmp_path):
    try:
        runs = [trained_as(tmp_path / n, deterministic=True) for n in "ab"]
        scores = [run.evaluate(r.last, deterministic=True)[0] for r in runs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*runs) and scores[0] == scores[1]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_a_difference_of_one_bit_is_seen_and_nan_is_itself():
    a = torch.tensor([1.0, float("nan")])
    b = a.clone()
    assert not difference({"x": [a, 2]}, {"x": [b, 2]})
    b.view(torch.int32)[0] ^= 1
    assert difference({"x": [a, 2]}, {"x": [b, 2]}) == ".x.0: other bits"
    assert difference({"x": 1}, {"y": 1}) and difference([1], [1, 2]) and difference(-0.0, 0.5)


def test_the_part_that_differs_is_named(whole, tmp_path):
    other = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    held = checkpoints.read(other.last)
    held["optimizer_states"][0]["state"][0]["momentum_buffer"] += 1
    other.last.unlink()  # it has a second name
    checkpoints.write(held, other.last)
    assert [part for part, said in differences(whole, other).items() if said] == ["optimizer"]


def test_verify_resume_shows_it_to_a_user(resnetv2, tmp_path):
    """Of a config too whose warm-up is longer than the few iterations that are tried."""
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 27\nwarmup: 1500\nschedule: one-cycle\n")
    flags = [*SMALL, "--steps", 6, "--kills", 1, "--json", "--precision", "32-true"]
    made = json.loads(resnetv2("verify-resume", "--config", config, *flags).stdout)
    assert made["exact"]
    assert [r["stopped by"] for r in made["runs"]] == ["nothing, run twice", "SIGKILL", "SIGTERM"]
    assert all(r["weights"] == r["metrics"] == "" for r in made["runs"])
    assert [len(r["went on after"]) for r in made["runs"]] == [0, 1, 1]  # each was stopped
