"""The predicted memory is the memory used, and micro-batches are sized to fit."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from resnetv2_cli import footprint, machine, memory, native, run
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import skeleton
from resnetv2_cli.errors import LAUNCHED, UserError
from resnetv2_cli.footprint import activation_bytes, along_depth, split, step_bytes
from resnetv2_cli.fused import made_again
from resnetv2_cli.plans import UNITS
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS


@pytest.mark.parametrize("mode", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("depth, block, mixed", [(14, "basic", False), (20, "bottleneck", True)])
@pytest.mark.parametrize("unit", UNITS)
def test_what_is_foretold_is_kept(unit, depth, block, mixed, mode):
    """The storages that autograd holds after a forward pass match the count."""
    kernels = "auto" if mode[0] else "eager"
    e = Experiment(depth=depth, block=block, unit=unit, kernels=kernels, recompute_bn=mode[1])
    net, held = ResNet(**e.architecture).to(memory_format=torch.channels_last), {}
    net.activate(*mode)
    net.forget = False  # this test sets the hooks itself
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own and not (mode[1] and made_again(t)):
            held[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        net(x).sum()
    weights = sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    found = sum(t.untyped_storage().nbytes() for t in held.values()) / 4
    foretold = activation_bytes(e, "bf16-mixed" if mixed else "32-true")
    least, most = 0.97 * foretold, 1.02 * foretold
    assert least < found < most + mixed * 2 * weights / 4  # plus 16-bit weights, once a batch


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("unit, block", [("original", "basic"), ("full-preact", "bottleneck")])
def test_the_count_grows_with_depth_as_the_networks_do(unit, block, shortcut):
    per_n = 6 if block == "basic" else 9
    e = Experiment(depth=5 * per_n + 2, block=block, unit=unit, shortcut=shortcut)
    counted = footprint._whole(e, "32-true", "cpu")
    found = along_depth(e, lambda e: footprint._whole(e, "32-true", "cpu"))
    assert found == pytest.approx(counted, abs=100)  # stochastic depth keeps each unit's draw


@pytest.mark.parametrize("n, off", [(18, 0.001), (22, 0.05)])
def test_the_count_grows_where_most_sums_are_made_again(n, off):
    e = Experiment(depth=9 * n + 2, block="bottleneck", recompute_bn=True)
    counted = footprint._whole(e, "bf16-mixed", "cpu")
    found = along_depth(e, lambda e: footprint._whole(e, "bf16-mixed", "cpu"))
    assert found == pytest.approx(counted, rel=off)
    if native.multiplies():
        plain = activation_bytes(replace(e, recompute_bn=False), "bf16-mixed")
        assert 0.38 < counted / plain < 0.46


def test_half_is_kept_where_bn_and_relu_are_made_again():
    def kept(**settings):
        return activation_bytes(Experiment(depth=110, **settings), "bf16-mixed")

    plain, again = kept(kernels="eager"), kept(kernels="eager", recompute_bn=True)
    assert 0.45 < again / plain < 0.55
    if native.multiplies():  # as one operation with the next convolution, they are never kept
        assert kept() < 1.06 * again


STEP = """
import sys, torch
from resnetv2_cli import memory
from resnetv2_cli.resnet import ResNet
mixed = "mixed" in sys.argv
net = ResNet(83 if mixed else 56).to(memory_format=torch.channels_last)
net.activate(True, "bn" in sys.argv)
net.segments = 9 * ("segments" in sys.argv)
x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
def step(x):
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed, cache_enabled=False):
        y = net(x)
    y.sum().backward()
step(x[:2])
before = memory.now()
memory.forget_peak()
step(x)
print(memory.peak(x.device)["host"] - before)
"""


@pytest.mark.skipif(not memory.forget_peak(), reason="the system does not report the peak")
@pytest.mark.parametrize("again", ["", "bn", "segments", "bn mixed"])
def test_a_step_takes_what_was_foretold(again):
    command = [sys.executable, "-c", STEP, *again.split()]
    mixed = "mixed" in again
    e = Experiment(
        depth=83 if mixed else 56, recompute_bn="bn" in again, recompute=9 * (again == "segments")
    )
    foretold = step_bytes(e, "bf16-mixed" if mixed else "32-true", 128)

    def taken() -> int:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # Convolutions have buffers of their own, which matter more where little else is kept; and the C
    # library's heap layout makes tries differ by a quarter.
    assert any(0.7 * foretold < taken() < 1.6 * foretold + 64e6 for _ in range(3))


@pytest.mark.parametrize(
    "given, widest",
    [
        ({"depth": 20}, 16 * 32**2),
        ({"depth": 164}, 64 * 32**2),
        ({"depth": 50, "dataset": "imagenet"}, 64 * 112**2),  # before pooling
        ({"depth": 50, "stem": "imagenet"}, 64 * 16**2),  # CIFAR's images stay 32x32
    ],
)
def test_what_lives_beside_what_is_kept_goes_with_the_widest_tensor(given, widest):
    e = Experiment(**given)
    one, two = (step_bytes(e, "32-true", n) for n in (1, 2))
    beside = two - one - activation_bytes(e, "32-true")
    assert beside == footprint.LIVE * 4 * widest
    weights = sum(p.numel() for p in skeleton(e).parameters())
    assert 2 * one - two == footprint.COPIES * weights  # however few the images


HOLES = """
import sys, torch
from resnetv2_cli import memory
if "apart" in sys.argv:
    memory.map_large()
kept = []
for _ in range(8):  # what is freed lies between what is kept
    freed = torch.ones(17_000_000, dtype=torch.uint8)
    kept.append(torch.ones(17_000_000, dtype=torch.uint8))
    whole = memory.now()
    del freed
print(whole - memory.now())
"""


@pytest.mark.skipif(memory.now() is None, reason="the system does not report what is in memory")
def test_what_is_large_goes_back_when_it_is_freed():
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    returned = [
        int(subprocess.check_output([sys.executable, "-c", HOLES, how], env=environ))
        for how in ("apart", "")
    ]
    assert returned[0] > 16_000_000 > returned[1]


@pytest.mark.parametrize(
    "limit, left", [("max", 8_192_000), (5_000_000, 4_000_000), (99_000_000, 8_192_000)]
)
def test_a_container_has_no_more_than_its_limit(tmp_path, monkeypatch, limit, left):
    for place in ("PROC", "GROUP"):
        monkeypatch.setattr(memory, place, tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert memory.available(torch.device("cpu")) == left


STAT = "anon 400\n{0}inactive_file 300000\n{0}active_file 200000\nslab_reclaimable 7\n"


@pytest.mark.parametrize(
    "limit, used, stat, prefix",
    [
        ("memory.max", "memory.current", "memory.stat", ""),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_",
        ),
    ],
)
def test_files_that_a_container_has_read_take_none_of_its_memory(
    tmp_path, monkeypatch, limit, used, stat, prefix
):
    """In cgroup v2 and v1. After a dataset is read, its pages are nearly all the memory in use."""
    for place in ("PROC", "GROUP"):
        monkeypatch.setattr(memory, place, tmp_path)
    (tmp_path / "meminfo").write_text("MemAvailable:   8000 kB\n")
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("950000\n")
    assert memory.available(torch.device("cpu")) == 50_000
    (tmp_path / stat).write_text(STAT.format(prefix))
    assert memory.available(torch.device("cpu")) == 550_000


@pytest.mark.parametrize(
    "asked, parts", [("128", 1), ("64", 2), ("63", 3), ("50", 3), ("1", 128), ("999", 1)]
)
def test_a_number_is_the_most_images_at_a_time(asked, parts):
    assert split(Experiment(), asked, "32-true", None).accumulate == parts
    uneven = split(Experiment(batch_size=127), asked, "32-true", None, devices=2)  # 64 and 63
    assert footprint.part_size(uneven, 2) <= int(asked)


@pytest.mark.parametrize(
    "devices, number, least",
    [("1", 1, 6), ("2", 2, 6), ("0,1", 2, 6), ("1,", 1, 9), ("3,", 1, 7), ("2, 1", 2, 8),
     ("auto", 4, 6), ("-1", 4, 6), ("1,9", 1, 9), ("9,", 1, 6), ("many", 1, 6)],
)  # fmt: skip
def test_each_gpu_has_its_part_and_its_own_memory(devices, number, least, monkeypatch):
    """Only the first is asked: that takes memory on it. The Trainer refuses missing ones later."""
    free = [6, 9, 8, 7]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked = set()

    def told(device):
        asked.add(device.index)
        return free[device.index] * 10**9, 10**10

    monkeypatch.setattr(torch.cuda, "mem_get_info", told)
    e = Experiment(devices=devices, nodes=2, batch_size=128, precision="32-true")
    assert machine.in_parts(e, "16").accumulate == 128 // (16 * 2 * number)
    line = machine.memory_line(e)
    assert f"({64 // number} images); {least}.0 GB are free" in line
    assert ("for each of" in line) == (number > 1) and len(asked) == 1


def test_processes_on_one_cpu_share_its_memory(monkeypatch):
    needed = step_bytes(Experiment(), "32-true", 64)
    monkeypatch.setattr(memory, "available", lambda device: round(1.5 * needed))
    monkeypatch.setattr(memory, "swap", lambda: 0)
    e = Experiment(accelerator="cpu", precision="32-true", devices="2")
    assert "are free for each of 2 processes: --micro-batch" in machine.memory_line(e)
    made = machine.in_parts(e, "auto")
    assert 2 * step_bytes(e, "32-true", footprint.part_size(made, 2)) <= 1.5 * needed


@pytest.mark.parametrize(
    "accelerator, devices, ends",
    [("cpu", 1, nullcontext()), ("cpu", 2, pytest.raises(UserError)),
     ("cuda", 1, pytest.raises(UserError))],
)  # fmt: skip
def test_what_the_disk_takes_is_shared_too_and_is_no_memory_of_a_gpu(
    monkeypatch, accelerator, devices, ends
):
    """Each process has half of what a step needs free; all share swap space for 0.3 of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on = {"accelerator": accelerator, "devices": str(devices), "precision": "32-true"}
    e = Experiment(depth=8, **on)
    needed = step_bytes(e, "32-true", 128 // devices, accelerator)
    monkeypatch.setattr(memory, "available", lambda device: needed * devices // 2)
    monkeypatch.setattr(memory, "swap", lambda: round(0.3 * needed))
    with ends:
        machine.memory_line(e)


def test_more_processes_than_there_can_be_are_refused_for_that(here):
    words = "train --dataset digits --depth 8 --accelerator cpu --devices 100000"
    done = here(*words.split(), status=2)
    assert "error: no such devices: 100000 were asked for" in done.stderr


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 3.0])
def test_auto_takes_the_most_that_fits(share):
    e = Experiment(depth=56)
    free = int(share * step_bytes(e, "32-true", e.batch_size))
    made = split(e, "auto", "32-true", free)
    assert step_bytes(e, "32-true", footprint.part_size(made)) <= free
    if made.accumulate > 1:
        larger = footprint.part_size(replace(made, accumulate=made.accumulate - 1))
        assert step_bytes(e, "32-true", larger) > footprint.SPARE * free


@pytest.mark.parametrize("asked, free, said", [
    ("many", 10**9, "'many' is not a micro"), ("0", 10**9, "'0' is not a micro"),
    ("auto", 10**5, "not even one image"), ("auto", None, "does not report"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(asked, free, said):
    with pytest.raises(UserError, match=said):
        split(Experiment(), asked, "32-true", free)


def test_train_says_what_it_needs_and_splits(tmp_path, here):
    small = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--steps", 2]
    often = ["--log-every", 1, "--eval-every", 0.05]
    done = here("train", *small, *often, "--micro-batch", 32, "--output", tmp_path / "run")
    told = " ".join(done.stderr.split())
    assert re.search(
        r"a step needs about [\d.]+ MB \(32 images, 2 parts\); [\d.,]+ GB are free", told
    )
    assert "64 images an iteration: 32, 2 times" in told
    [last] = re.findall(r"step 2/2 .*? lr", told)
    assert "loss" in last and "test" not in last  # the test error is of iteration 1
    assert "accumulate: 2" in (tmp_path / "run/config.yaml").read_text()
    assert run.FOLDER not in os.environ


def test_who_is_launched_splits_the_batch_as_the_first_did(whole, here, monkeypatch):
    """Less memory is free by then: each process would split the batch otherwise, and take other
    images."""
    given = {}
    monkeypatch.setenv(run.FOLDER, str(whole.path))
    monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setattr(memory, "available", lambda _: 10**8)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(run, "train", lambda e, folder, **_: given.update({folder.path: e}) or {})
    here("train", "--dataset", "digits", "--batch-size", 1000, "--micro-batch", "auto")
    assert given == {whole.path: whole.experiment()}


def test_a_batch_that_the_system_would_die_of_is_refused_with_the_size_that_fits(monkeypatch):
    e = Experiment(depth=110)
    needed = step_bytes(e, "32-true", e.batch_size)
    monkeypatch.setattr(memory, "swap", lambda: 0)
    for share, refused in ((1.1, False), (0.8, False), (0.6, True)):
        monkeypatch.setattr(memory, "available", lambda _, free=int(share * needed): free)
        try:
            line = machine.memory_line(replace(e, precision="32-true"))
        except UserError as error:
            assert refused and "a step needs about" in str(error)
            size = int(error.hint.split()[1])
            assert 0 < size < 128 and step_bytes(e, "32-true", size) <= share * needed
        else:
            assert not refused and ("--micro-batch" in line) == (share < 1)
    monkeypatch.setattr(memory, "available", lambda _: 10**5)
    with pytest.raises(UserError) as caught:
        machine.memory_line(e)
    assert "--recompute" in caught.value.hint


@pytest.mark.skipif(memory.available(torch.device("cpu")) is None, reason="free memory unknown")
def test_what_no_machine_has_is_refused_here(tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    words = "train --depth 1001 --batch-size 100000 --accelerator cpu --recompute-bn"
    _, error, hint = here(*words.split(), status=2).stderr.splitlines()
    assert not list(tmp_path.iterdir())
    assert run.FOLDER not in os.environ
    free = re.search(r"needs about [\d,.]+ GB \(100,000 images\); ([\d,.]+) GB are free", error)
    size = re.fullmatch("hint: --micro-batch (.+) would fit, which --micro-batch auto finds", hint)
    e = Experiment(depth=1001, batch_size=100_000, recompute_bn=True)
    needed = step_bytes(e, machine.precision(e), int(size[1])) / 1e9
    assert 0.8 * needed < float(free[1].replace(",", "")) < 1.3 * needed
