"""Nothing lost, nothing different: damaged checkpoints, full disks, equal bits. The trainings here
run in this process; those in test_run.py are killed."""

import errno
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback
from trainings import At, same, trained_as

from resnetv2_cli import callbacks, evaluation, files, jsonfile, verify
from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import Damaged, NotSaved, Stopped, UserError
from resnetv2_cli.runfolder import RunFolder, read_metrics
from resnetv2_cli.telling import silent
from resnetv2_cli.verify import difference, differences

# Checkpoints.


def damage(good: bytes, n: int) -> bytes:
    moments = random.Random(n)
    if n % 3 == 0:
        return good[: moments.randrange(len(good))]
    at = len(good) - 1 - moments.randrange(82) if n % 3 == 1 else moments.randrange(len(good))
    return good[:at] + bytes([good[at] ^ 1 << moments.randrange(8)]) + good[at + 1 :]


def test_every_damage_is_known_before_a_checkpoint_is_used(whole, tmp_path):
    """Cut off anywhere; one bit flipped in the seal; one bit flipped anywhere, even in padding."""
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
    assert "is damaged" in said[2] or "cut short" in said[2]
    assert "continuing from" in said[2] and said[2].endswith("iteration 8")
    assert same(folder, whole)


def test_a_whole_last_is_continued_from_beside_one_of_more_iterations(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    shutil.copy(whole.last, folder.best)
    shutil.copy(whole.previous, folder.last)
    said = []
    path, held = checkpoints.newest(folder.checkpoints, folder.last, said.append)
    assert path == folder.last and held["global_step"] < 12 and not said
    folder.last.write_bytes(b"nothing")
    path, held = checkpoints.newest(folder.checkpoints, folder.last, said.append)
    assert path == folder.best and held["global_step"] == 12 and len(said) == 1


def test_where_none_is_whole_it_does_not_begin_again(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, folder.path)
    folder.result.unlink()
    for file in folder.checkpoints.glob("*.ckpt"):
        file.unlink()
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no intact one beside it") as refused:
        trained_as(folder.path, resume={})
    assert f"train --config {folder.config}" in refused.value.hint


def test_on_a_full_disk_it_trains_on_and_loses_nothing(whole, tmp_path, full):
    said = []
    events = [At(2, lambda: full(100)), At(9, full)]  # room for neither metrics nor checkpoint
    folder = trained_as(tmp_path / "run", said.append, events)
    assert "File too large" in said[2] and "training goes on" in said[2]
    assert same(folder, whole)


def test_on_a_full_disk_it_stops_if_it_is_asked_to(whole, tmp_path, full):
    with pytest.raises(NotSaved, match="File too large"):
        trained_as(tmp_path / "run", display=[At(5, lambda: full(9000))], save_failure="stop")
    full()
    folder = RunFolder(tmp_path / "run")
    assert checkpoints.read(folder.last)["global_step"] == 4
    assert same(trained_as(folder.path, resume={}), whole)


class Slow(Callback):
    """Makes each iteration take 40 seconds on a fake clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def on_train_batch_start(self, *_) -> None:
        self.now += 40


def test_it_saves_every_ten_minutes(tmp_path, monkeypatch):
    slow, saved, save = Slow(), [], callbacks.Keeper.save
    clock = SimpleNamespace(monotonic=lambda: slow.now, perf_counter=lambda: slow.now)
    monkeypatch.setattr(callbacks, "time", clock)

    def noted(keeper, trainer, *given, **more):
        saved.append(trainer.global_step)
        save(keeper, trainer, *given, **more)

    monkeypatch.setattr(callbacks.Keeper, "save", noted)
    trained_as(tmp_path / "run", display=[slow], steps=41, save_every=0, eval_every=1)
    assert saved == [20, 40, 41]  # checked every ten iterations: after 800 s, and 800 s later


def test_a_best_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    keeper = callbacks.Keeper(RunFolder(tmp_path), Experiment(val=100), [], silent)
    monkeypatch.setattr(keeper, "write", lambda *_: False)
    trainer = SimpleNamespace(state=SimpleNamespace(fn=None))
    keeper.on_validation_end(trainer, SimpleNamespace(scores={"error": 50.0}))
    assert keeper.best == math.inf


def test_where_a_file_has_one_name_alone_another_is_a_copy(tmp_path, monkeypatch):
    """As on filesystems without hard links."""
    path, other = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    other.write_text("older")
    path.write_text("old")

    def link(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    files.name_too(path, other)
    files.write_text(path, "new")
    assert (path.read_text(), other.read_text()) == ("new", "old")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_whose_other_name_cannot_be_taken_stays_whole(tmp_path):
    path, other = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    path.write_text("the only one")
    other.mkdir()
    with pytest.raises(OSError):
        files.name_too(path, other)
    assert path.read_text() == "the only one"


def test_a_copy_that_the_disk_is_too_full_for_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, full
):
    """The file itself is saved by then."""
    monkeypatch.setattr(os, "link", lambda *_: os.stat(tmp_path / "no hard links"))
    path, writer = tmp_path / "last.ckpt", checkpoints.WholeFiles()
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: Path("/dev/full").write_text("x"))
    writer.save_checkpoint({"a": 1}, path, {"also": [tmp_path / "step.ckpt"]})
    assert "cannot save" in str(writer.failure) and "step.ckpt: No space" in str(writer.failure)
    assert writer.failure.hint == "last.ckpt is saved"
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("size", [100, 9000])  # too small for a line of metrics; for a checkpoint
def test_where_no_checkpoint_could_be_saved_none_is_said_to_be_kept(tmp_path, full, size):
    said = []
    with pytest.raises(NotSaved) as caught:
        trained_as(tmp_path / "run", said.append, display=[At(1, lambda: full(size))])
    full()
    assert caught.value.hint == "none is saved yet: make room for the first"
    assert f"; {caught.value.hint}; training goes on" in said[-1]
    assert not RunFolder(tmp_path / "run").last.exists()


def test_what_cannot_be_saved_at_the_end_is_an_error(tmp_path, full):
    with pytest.raises(NotSaved) as caught:
        trained_as(tmp_path / "run", display=[At(5, lambda: full(9000))])
    assert caught.value.hint == "the checkpoint before it is kept"
    assert checkpoints.read(RunFolder(tmp_path / "run").last)["global_step"] == 4


def test_on_a_full_disk_a_new_run_names_its_place_and_leaves_nothing(tmp_path, full):
    """Not even the lock file fits, which says who holds the folder."""
    full(0)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/run: File too large"):
        trained_as(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_of_json_has_nothing_that_json_does_not_know(tmp_path):
    jsonfile.write(tmp_path / "x.json", {"loss": [math.nan, -math.inf, 0.5]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"loss": [None, None, 0.5]}


def test_the_last_checkpoint_is_hardly_older_than_it_may_be(tmp_path, monkeypatch):
    """However far off the next evaluation is."""
    monkeypatch.setattr(callbacks, "SAVE_SECONDS", 0.0)
    last, found = RunFolder(tmp_path / "run").last, []
    look = At(11, lambda: found.append(checkpoints.read(last)["global_step"]))
    trained_as(tmp_path / "run", display=[look], eval_every=1.0, save_every=0)
    assert found == [10]


# Continuing a run in its folder.


def test_a_signal_is_heard_where_each_iteration_is_evaluated(tmp_path):
    leave = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        trained_as(tmp_path / "run", display=[leave], eval_every=0.01)
    assert checkpoints.read(RunFolder(tmp_path / "run").last)["global_step"] == 3


def test_a_line_cut_by_a_power_failure_is_written_again(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        trained_as(folder.path, display=[At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    with folder.metrics.open("a") as file:
        file.write("1")  # the start of 12,...
    assert same(trained_as(folder.path, resume={}), whole)


def test_a_line_cut_after_the_last_iteration_is_written_again(whole, tmp_path):
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    folder.result.unlink()
    folder.metrics.write_bytes(whole.metrics.read_bytes()[:-8])
    trained_as(folder.path, resume={})
    assert folder.metrics.read_bytes() == whole.metrics.read_bytes() and folder.result.exists()


def test_what_is_read_of_metrics_is_whole_lines(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,epoch,lr\n1,0.5,0.1\n2,0.6\n3,1,0.1,4,2,0.1\n4,1.5,0.")
    assert read_metrics(file) == {"epoch": [(1, 0.5)], "lr": [(1, 0.1)]}
    file.write_text("")
    assert read_metrics(file) == {}


# Bits.


def test_deterministic_twice_has_the_same_bits(whole, tmp_path):
    try:
        runs = [trained_as(tmp_path / n, deterministic=True) for n in "ab"]
        scores = [evaluation.evaluate(r.last, deterministic=True)[0] for r in runs]
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
    other.last.unlink()  # in a run it may have a second name, as a hard link
    checkpoints.write(held, other.last)
    assert [part for part, said in differences(whole, other).items() if said] == ["optimizer"]


def test_what_differs_is_the_exit_status_of_verify_resume(here, monkeypatch):
    made = {"stopped by": "SIGKILL", "went on after": [3], "weights": "", "metrics": "step 4"}
    monkeypatch.setattr(verify, "verify", lambda *_: [made])
    done = here("verify-resume", *SMALL, status=1)
    assert "SIGKILL: metrics differs at step 4" in done.stderr and "same bits" not in done.stdout
    made["metrics"] = ""
    assert "every run ended with the same bits" in here("verify-resume", *SMALL).stdout


def test_verify_resume_shows_it_to_a_user(resnetv2, tmp_path):
    """Even with a config whose warm-up is longer than the few iterations of the trial."""
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 27\nwarmup: 1500\nschedule: one-cycle\n")
    flags = [*SMALL, "--steps", 6, "--kills", 1, "--json", "--precision", "32-true"]
    made = json.loads(resnetv2("verify-resume", "--config", config, *flags).stdout)
    assert made["exact"]
    assert [r["stopped by"] for r in made["runs"]] == ["nothing, run twice", "SIGKILL", "SIGTERM"]
    assert all(r["weights"] == r["metrics"] == "" for r in made["runs"])
    assert [len(r["went on after"]) for r in made["runs"]] == [0, 1, 1]  # each was stopped


def test_a_run_trains_until_it_has_its_result(tmp_path):
    """After that it only draws: signals must not be timed to arrive then."""
    child = verify.Child([], RunFolder(tmp_path))
    child.since = 100.0
    child.folder.result.write_text("{}")
    os.utime(child.folder.result, (0, 103.5))
    assert child.trained() == 3.5
