"""``bench`` reports what its arms did: ratios within a round, floors of the network it timed."""

import json
import mmap
import re
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from resnetv2_cli.bench import data, floor, turns
from resnetv2_cli.bench import train as whole
from resnetv2_cli.bench.data import PATHS
from resnetv2_cli.bench.floor import bytes_moved, convolutions
from resnetv2_cli.bench.step import OPTIONS, PLAIN, bench_step
from resnetv2_cli.bench.turns import Turn, in_turns, ratios, rows
from resnetv2_cli.commands.bench import row
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.prepare import Form, prepare
from resnetv2_cli.describe import describe
from resnetv2_cli.run import build
from resnetv2_cli.telling import silent

CPU = torch.device("cpu")
CROPS = ("scale", "scale-aspect")


def test_ratios_are_taken_within_a_round():
    turns = {"slow": [Turn(2.0, 5), Turn(40.0, 7)], "fast": [Turn(1.0, 3), Turn(10.0, 3)]}
    assert ratios(turns, "fast", "slow") == [2.0, 4.0]
    made = rows(turns, "slow", images=10)
    assert made["fast"]["ratio"] == 3.0 and made["slow"]["ratio"] == 1.0
    assert made["slow"]["images_per_second"] == pytest.approx(10 / 21)
    assert made["slow"]["peak_bytes"] == 7


def test_an_arm_tells_the_seconds_of_an_iteration_without_those_before_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    took = iter([50.0, 50.0, 1.0, 2.0, 3.0])
    assert turns.timed(lambda: now.append(now.pop() + next(took)), CPU)(3) == 2


def test_a_line_of_a_bench():
    arm = {"images_per_second": 1234.4, "ratio": 1.5, "least": 1.25, "most": 2.0}
    assert row("a", arm | {"peak_bytes": None}) == ["a", "1,234", "1.50", "1.25-2.00", "—"]


def test_the_floor_is_the_time_of_the_bytes_at_the_rate_of_a_copy(monkeypatch):
    """A copy reads and writes each number: here 1 KiB in half a second."""
    times = iter([0.0, 9.0, *(t for i in range(10, 15) for t in (i, i + 0.5))])
    monkeypatch.setattr(floor, "COPY", 256)
    monkeypatch.setattr(floor, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    made = floor.floor(Experiment(depth=8, batch_size=4), torch.bfloat16, CPU)
    assert made["copy_bytes_per_second"] == 2 * 1024 / 0.5
    assert made["seconds"] == made["bytes"] / made["copy_bytes_per_second"]


def test_arms_take_turns_and_their_peaks_are_their_own():
    ran, size = [], 2**28

    def arm(name, numbers):
        def run(steps):
            ran.append(name)
            # Not from the heap, which may reuse memory that others freed.
            torch.frombuffer(mmap.mmap(-1, numbers), dtype=torch.uint8).fill_(1)
            return 1.0

        return run

    turns = in_turns({"big": arm("big", size), "small": arm("small", 1)}, 2, 1, CPU)
    assert ran == ["big", "small"] * 2
    if turns["small"][0].peak is not None:  # the system reports it
        assert min(t.peak for t in turns["big"]) - turns["small"][1].peak > 0.9 * size


@pytest.mark.parametrize("depth, stem", [(20, "cifar"), (29, "cifar"), (18, "imagenet")])
def test_the_floor_has_the_convolutions_of_the_network(depth, stem):
    experiment = Experiment(depth=depth, stem=stem)
    found = convolutions(experiment)
    assert found[0].read == (3, 32, 32)
    macs = sum(w.c_out * w.read[0] * w.kernel**2 * w.written[1] * w.written[2] for w in found)
    made = describe(experiment)
    classifier = made["parts"][-1]["macs"]
    assert macs == made["macs"] - classifier
    assert [w.first for w in found] == [True] + [False] * (len(found) - 1)


def test_bytes_that_must_move():
    """ResNet-8 by hand, in numbers per image: each input three times (the first twice), each output
    twice."""
    big, middle, small = 16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8
    read = 2 * 3 * 32 * 32 + 3 * (2 * big + big + middle + middle + small)
    written = 2 * (3 * big + 2 * middle + 2 * small)
    e = Experiment(depth=8, batch_size=4)
    assert bytes_moved(e, torch.bfloat16) == (read + written) * 2 * 4


def test_each_option_is_timed_beside_plain_and_its_own_floor():
    e = Experiment(depth=8, batch_size=2)
    names = [name for name, option in OPTIONS.items() if "cpu" in option.usual]
    made = bench_step(e, names, rounds=1, steps=1, tell=silent)
    assert list(made["arms"])[: len(names)] == names
    for name in names:
        row = made["arms"][name]
        floor = made["arms"][OPTIONS[name].floor]
        assert row["of_floor"] == pytest.approx(floor["seconds"] / row["seconds"])
        assert row["ratio"] == pytest.approx(made["arms"][PLAIN]["seconds"] / row["seconds"])


def test_the_share_of_the_floor_is_the_median_of_an_even_number_of_turns(monkeypatch):
    """Two turns of 10 seconds, whose floors took 1 and 3."""

    def turns(arms, *_):
        floors = [Turn(1.0, None), Turn(3.0, None)]
        return {name: [Turn(10.0, None)] * 2 if name == PLAIN else floors for name in arms}

    monkeypatch.setattr("resnetv2_cli.bench.step.in_turns", turns)
    made = bench_step(Experiment(depth=8, batch_size=2), [PLAIN], 2, 1, tell=silent)
    assert made["arms"][PLAIN]["of_floor"] == pytest.approx(0.2)


def test_what_the_trainer_costs_and_waits_is_counted_by_iterations(monkeypatch):
    """2 seconds per iteration, 1.5 of them the bare step's; 1 second of waiting in 4 iterations."""

    def in_turns(arms, *_):
        for arm in (whole.PLAIN, whole.TRAIN):
            arms[arm].waited = 1.0
        return {name: [Turn(1.5 if name == whole.BARE else 2.0, None)] for name in arms}

    monkeypatch.setattr(whole, "in_turns", in_turns)
    monkeypatch.setattr(whole, "first_step_seconds", lambda *_: 7.0)
    e = Experiment(dataset="digits", depth=8, batch_size=64, accelerator="cpu")
    made = whole.bench_train(e, 1, 4, silent)
    assert made["trainer_overhead"] == pytest.approx(1 / 3)
    assert made["arms"][whole.TRAIN]["waiting"] == made["arms"][whole.PLAIN]["waiting"] == 1 / 8


@pytest.mark.parametrize("augment", [True, False])
def test_the_bare_step_augments_where_training_does(augment, monkeypatch):
    e = Experiment(dataset="digits", depth=8, batch_size=64, accelerator="cpu", augment=augment)
    task, images = build(e)
    seen = []
    real = task.augmented
    monkeypatch.setattr(task, "augmented", lambda *given: seen.append(given) or real(*given))
    whole.bare_arm(task, images, images.train, CPU)(1)
    assert bool(seen) == augment


def test_the_command_leaves_a_picture_and_the_json_it_prints(here, tmp_path):
    began = time.time()
    small = ["--dataset", "digits", "--depth", 8, "--batch-size", 64]
    few = ["--rounds", 1, "--stretch", 1]
    done = here("bench", "train", *small, *few, "--output", tmp_path, "--json")
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "train.json").read_text())
    assert (tmp_path / "train.png").stat().st_mtime > began
    assert set(made["arms"]) == {"plain loop", "bare step", "resnetv2 train"}
    assert 0 < made["first_step_seconds"] < 300
    assert 0 <= made["arms"]["resnetv2 train"]["waiting"] < 1


def test_the_network_of_weights_is_timed(here, trained):
    few = ["--rounds", 1, "--stretch", 1, "--arm", "bf16", "--batch-size", 16, "--json"]
    made = json.loads(here("bench", "step", "--weights", trained, *few).stdout)
    assert made["network"].startswith("cifar10-resnet8")


def test_data_paths_are_timed_beside_torchvisions(here):
    small = ["--dataset", "digits", "--batch-size", 16, "--rounds", 1, "--stretch", 1]
    made = json.loads(here("bench", "data", *small, "--json").stdout)
    paths = [name for name, path in PATHS.items() if path.decoded]
    assert list(made["arms"]) == paths and made["arms"][paths[0]]["ratio"] == 1


def test_photographs_are_read_beside_pil_and_torchvision(here, tmp_path):
    for split in ("train", "val"):
        for i in range(2):
            (tmp_path / "own" / split / "a").mkdir(parents=True, exist_ok=True)
            file = tmp_path / "own" / split / "a" / f"{i}.jpg"
            Image.new("RGB", (300, 280), (i, 9, 99)).save(file)
    prepare(tmp_path / "own", tmp_path / "raw", Form(raw=True), 1, lambda done, of: None)
    again = shutil.copytree(tmp_path / "raw", tmp_path / "again" / "raw")
    small = ["--dataset", "folder", "--data-dir", tmp_path / "own"]
    small += ["--batch-size", 2, "--prepared", tmp_path / "raw", "--prepared", again]
    small += ["--rounds", 1, "--stretch", 1]
    made = json.loads(here("bench", "data", *small, "--json").stdout)
    usual = [name for name, path in PATHS.items() if not path.decoded]
    prepared = [f"{where}/raw, {crop}" for where in (tmp_path.name, "again") for crop in CROPS]
    assert list(made["arms"]) == [*usual, *prepared]


def test_what_was_prepared_is_read_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "images_of", lambda experiment: experiment.data_dir)
    monkeypatch.setattr(data, "ours", lambda crop: lambda place, device: (crop, place))
    e = Experiment(dataset="folder", data_dir="loose", depth=18)
    arms = data.prepared_arms(e, [tmp_path / "s512"], CPU)  # not a seed, unlike in names of runs
    assert arms == {f"s512, {crop}": (crop, str(tmp_path / "s512")) for crop in CROPS}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["step", "--arm", "bf16-chanels-last"], "bf16-channels-last"),
        (["step", "--depth", 8, "--arm", "graphs", "--accelerator", "cpu"], "no CUDA graphs"),
        (["step", "--recompute-bn"], "no such option.*--recompute-bn"),  # its arms set these
        (["step", "--kernels", "eager"], "no such option.*--kernels"),
        (["step", "--graphs"], "no such option.*--graphs"),
        (["train", "--dataset", "digits", "--accumulate", 2], "whole batches"),
        (["data", "--dataset", "digits", "--prepared", "x"], "only photographs"),
        (["data", "--recompute-bn"], "no such option.*--recompute-bn"),  # it runs no network
        (["data", "--kernels", "eager"], "no such option.*--kernels"),
        (["step", "--devices", 2], "no such option.*--devices"),  # it runs on one
        (["data", "--depth", 8], "no such option.*--depth"),
        (["data", "--graphs"], "no such option.*--graphs"),
    ],
)
def test_what_bench_cannot_time_is_refused(arguments, said, here):
    assert re.search(said, here("bench", *arguments, status=2).stderr)
