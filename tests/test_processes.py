"""Two processes started together, as by torchrun: what they wait for, and what they agree on."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiled import conv3x3, distance
from iterations import Tapes
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed, multiprocessing
from torch.profiler import ProfilerActivity, profile

from resnetv2_cli import checkpoint as checkpoints
from resnetv2_cli import cli, cluster, graphs, native, run
from resnetv2_cli.cli import main, terminate
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import LAUNCHED, Diverged, Gone, NotSaved, Stopped
from resnetv2_cli.leaving import Leaver
from resnetv2_cli.runfolder import RunFolder
from resnetv2_cli.signals import SIGNALS

STEPS = 23  # one epoch of the digits, followed by an evaluation


class Collectives(Callback):
    """Counts the backend's operations in 20 iterations, after two in which DDP settles; and keeps
    BN's moving averages after an iteration and after an evaluation."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.averages: list[torch.Tensor] = []

    def keep(self, task) -> None:
        means = [b.clone() for name, b in task.net.named_buffers() if name.endswith("mean")]
        self.averages.append(torch.cat(means))

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            self.profile.__enter__()

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 22:
            self.profile.__exit__(None, None, None)
            names = [e.name for e in self.profile.events()]
            self.counted = Counter(n for n in names if n.startswith("gloo:"))
            self.keep(task)

    def on_validation_end(self, trainer, task) -> None:
        self.keep(task)


class Terminated(Callback):
    """Sends SIGTERM to the second process alone, in the evaluation after training."""

    def on_validation_batch_start(self, trainer, task, batch, batch_idx) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Gradients(Callback):
    """Keeps the first iteration's gradient over all processes, as DDP leaves it, and that of this
    process's part of the batch alone; then ends the run."""

    class Enough(Exception):
        pass

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer, task, optimizer) -> None:
        parameters = list(task.net.parameters())
        self.shared = flat(p.grad for p in parameters)
        self.sizes = [p.numel() for p in parameters]
        with trainer.precision_plugin.forward_context():
            self.own = flat(torch.autograd.grad(task.loss(self.batch), parameters))
        raise self.Enough


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def nothing_whole(folder: RunFolder) -> None:
    for file in folder.checkpoints.iterdir():
        content = file.read_bytes()[:5000]
        file.unlink()
        file.write_bytes(content)


def other_momentum(folder: RunFolder) -> None:
    held = checkpoints.read(folder.last)
    for state in held["optimizer_states"][0]["state"].values():
        state["momentum_buffer"] *= 2
    folder.last.unlink()
    checkpoints.write(held, folder.last)


def earlier(folder: RunFolder) -> None:
    folder.last.unlink()
    shutil.copy(folder.previous, folder.last)


def other_rate(folder: RunFolder) -> None:
    folder.config.write_text(folder.config.read_text().replace("lr: 0.1\n", "lr: 0.2\n"))


def not_begun(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)


APART = {  # a change to the second process's folder: messages of the first and the second process
    nothing_whole: ("process 1 cannot begin: ", "and there is no intact one beside it"),
    other_momentum: ("process 0 would begin with a checkpoint of SHA-256",) * 2,
    earlier: ("process 0 would begin with iteration 23, process 1 with 22",) * 2,
    other_rate: ("process 1 cannot begin: ", "its lr is 0.1, not 0.2"),
    not_begun: ("process 0 would begin with iteration 23, process 1 with 0",) * 2,
}  # fmt: skip
TRAIN = {
    "dataset": "digits", "depth": 8, "batch_size": 64, "log_every": 100, "save_every": 22,
    "devices": 2, "accelerator": "cpu", "strategy": "ddp", "precision": "32-true",
}  # fmt: skip


def command(folder: RunFolder, steps: int) -> tuple[int, str]:
    """Continue or begin the run in a folder, up to ``steps``; its exit status and messages."""
    flags = [w for k, v in TRAIN.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words = ["train", *flags, "--steps", str(steps), "--continue", "--output", str(folder.path)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
        main(words)
    return left.value.code, said.getvalue()


def terminated(folder: RunFolder) -> tuple[int, int, bool]:
    """Terminate a run in its last evaluation, and continue it: its exit status, the iteration that
    was saved, and whether it has a result in the end."""
    experiment = Experiment(**{**TRAIN, "devices": "2"}, steps=3, eval_every=0.1)
    with pytest.raises(Stopped) as left:
        run.train(experiment, folder, display=[Terminated()])
    saved = checkpoints.read(folder.last)["global_step"]
    run.train(experiment, folder, resume=True)
    return left.value.status, saved, folder.result.exists()


def counting(ran: Counter, call):
    """Count calls, except those on meta tensors, which only estimate memory."""

    def counted(name, tensors, *numbers):
        ran.update([name] * (not tensors[0].is_meta))
        call(name, tensors, *numbers)

    return counted


def gradients(place: Path) -> dict[str, dict]:
    """For each of KERNELS: gradients of a bottleneck network, and library functions that ran."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        call = native.call
        for name, settings in KERNELS.items():
            ran, seen = Counter(), Gradients()
            patch.setattr(native, "call", counting(ran, call))
            of = {
                "depth": 20,
                "block": "bottleneck",
                "stride_on": "3x3",
                "devices": "2",
                "steps": 1,
                **settings,
            }
            with pytest.raises(Gradients.Enough):
                run.train(Experiment(**TRAIN | of), RunFolder(place / name), display=[seen])
            made[name] = {"shared": seen.shared, "own": seen.own, "sizes": seen.sizes, "ran": ran}
    return made


def replayed(place: Path) -> tuple[list[str], dict[str, int], int, list[bool]]:
    """The same training with the network on tape and call by call: messages, collective operations,
    how often the tape ran, and whether weights, momentum and moving averages are equal."""
    told, seen, ends = [], Collectives(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "why_not", lambda device, **parts: "")
        patch.setattr(torch.cuda, "make_graphed_callables", Tapes)
        for on in (True, False):
            folder = RunFolder(place / f"graphs-{on}")
            of = TRAIN | {"devices": "2", "kernels": "eager", "steps": STEPS, "graphs": on}
            run.train(Experiment(**of), folder, display=[seen] if on else [], tell=told.append)
            held = checkpoints.read(folder.last)
            momentum = held["optimizer_states"][0]["state"].values()
            ends.append([*held["state_dict"].values(), *(s["momentum_buffer"] for s in momentum)])
    return told, dict(seen.counted), Tapes.ran, list(map(torch.equal, *ends))


KERNELS = {
    "exact": {"kernels": "eager"},
    "eager": {"kernels": "eager", "precision": "bf16-mixed"},
    "joined": {"precision": "bf16-mixed"},
    "again": {"precision": "bf16-mixed", "recompute_bn": True},
}


def work(rank: int, place: Path, port: int) -> None:
    """One of two processes: trains, tries to continue in a folder of its own, and saves what it saw
    to a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test", "COLUMNS": "400",
    }  # fmt: skip
    rank_zero_only.rank = rank  # Lightning sets it only when imported
    seen, both = Collectives(), RunFolder(place / "run")
    experiment = Experiment(**{**TRAIN, "devices": "2"}, steps=STEPS)
    run.train(experiment, both, display=[seen])
    made = {"counted": dict(seen.counted), "averages": seen.averages, "apart": {}}
    for change in APART:
        own = RunFolder(place / f"{change.__name__}-{rank}")
        shutil.copytree(both.path, own.path)
        before = own.manifest.path.read_bytes()
        if rank == 1:
            change(own)
        status, said = command(own, 2 * STEPS)
        kept = rank == 1 or own.manifest.path.read_bytes() == before
        made["apart"][change.__name__] = (status, said, kept)
    made["new"] = command(RunFolder(place / "new" / "run"), STEPS + rank)
    made["left"] = terminated(RunFolder(place / "ended"))
    made["replayed"] = replayed(place)
    made["gradients"] = gradients(place) if native.multiplies() else {}
    torch.save(made, place / str(rank))


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    place = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.spawn(work, args=(place, port), nprocs=2)
    assert not (place / "new").exists()  # its run was refused
    return [torch.load(place / str(rank)) for rank in (0, 1)]


def test_an_iteration_waits_for_its_gradient_alone(seen):
    """And, every ten iterations, twice for what the processes agree on: to save, and to leave."""
    for one in seen:
        assert one["counted"] == {"gloo:all_reduce": 20 + 4, "gloo:barrier": 4}


def test_replays_of_the_network_under_ddp_are_bit_for_bit_its_calls(seen):
    for rank, one in enumerate(seen):
        told, counted, ran, equal = one["replayed"]
        says = "the network is replayed as CUDA graphs; the whole iteration is not: the processes"
        assert sum(line.startswith(says) for line in told) == (rank == 0), told
        assert counted == one["counted"]
        assert ran == 1 + STEPS - 1  # once to compare; not on the last batch, which is smaller
        assert len(equal) > 50 and all(equal)


def test_moving_averages_are_the_first_process_s_where_they_are_used(seen):
    """In training each process has its own; an evaluation by both must be of one network."""
    (training, evaluated), (others, same) = (one["averages"] for one in seen)
    assert not torch.equal(training, others)
    assert torch.equal(evaluated, same)


@pytest.mark.parametrize("change", APART, ids=lambda change: change.__name__)
def test_processes_that_would_begin_apart_all_say_so_and_change_nothing(seen, change):
    for one, expected in zip(seen, APART[change], strict=True):
        status, said, kept = one["apart"][change.__name__]
        assert status == 2 and expected in said and kept
        assert said.count("error: ") == 1 and "Traceback" not in said


def test_each_may_have_its_images_and_weights_elsewhere(tmp_path):
    weights = [tmp_path / name for name in "ab"]
    for file in weights:
        file.write_bytes(b"of the same bytes")
    of = [{"weights": str(f), "data_dir": str(f), "workers": i} for i, f in enumerate(weights)]
    data = SimpleNamespace(digest="0")
    one, other = (run.state(Experiment(dataset="digits", **e), data, None, 0) for e in of)
    assert one == other


def test_a_new_run_that_would_begin_apart_is_refused(seen):
    for one in seen:
        status, said = one["new"]
        assert status == 2 and "process 0 would begin with steps 23, process 1 with 24" in said


def test_a_signal_to_one_in_the_last_evaluation_ends_both_and_what_is_saved_goes_on(seen):
    statuses, saved, _ = zip(*(one["left"] for one in seen), strict=True)
    assert statuses == (143, 143) and saved == (3, 3)
    assert seen[0]["left"][2]


def test_who_is_started_again_meets_those_of_now_in_the_store_of_before(monkeypatch):
    """torchrun keeps the store across restarts: what earlier processes wrote is still in it."""
    monkeypatch.setattr(cluster, "PATIENCE", timedelta(seconds=9))
    store, size = distributed.HashStore(), 3

    def meet(rank: int) -> str:
        time.sleep(0.1 if rank == 0 else 0)  # so that the others see old entries
        return cluster.met(store, rank, size)

    with ThreadPool(size) as pool:
        names = [pool.map(meet, range(size), chunksize=1) for _ in range(3)]
    assert all(len(set(of_one)) == 1 for of_one in names)
    assert len({of_one[0] for of_one in names}) == 3


def test_who_waits_for_others_hears_signals(monkeypatch):
    """While PyTorch's stores wait, no signal is handled."""
    told = []
    late = partial(told.append, "late")
    assert cluster.attended(lambda: 3, late) == 3
    with pytest.raises(RuntimeError, match="one is still missing"):
        cluster.attended(partial(cluster.wait, 0.0), late)
    monkeypatch.setattr(cluster, "LONG", 0.5)
    assert cluster.attended(partial(time.sleep, 0.1), late) is None and not told
    monkeypatch.setattr(cluster, "PATIENCE", timedelta(seconds=5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    began, before = time.monotonic(), signal.signal(signal.SIGTERM, terminate)
    others = set(threading.enumerate())
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(cli.Terminated):
            cluster.attended(partial(cluster.common, place, 0, 2), late)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 4 and told == ["late"]
    for thread in set(threading.enumerate()) - others:  # or it may abort this process as it exits
        thread.join()


@pytest.fixture
def launcher(monkeypatch) -> cluster.Launcher:
    for name in ("NODE_RANK", "LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # restored after the launcher sets them
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return cluster.Launcher(LightningEnvironment(), num_processes=2, num_nodes=1)


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140)],
)
def test_a_signal_to_a_process_that_is_being_launched_waits_for_its_handler(
    launcher, monkeypatch, number, status
):
    born = f"import os; os.kill(os.getpid(), {number}); os._exit(7)"
    monkeypatch.setattr(
        subprocess_script, "_basic_subprocess_cmd", lambda: [sys.executable, "-c", born]
    )
    launcher._call_children_scripts()
    assert launcher.procs[0].wait(60) == 7
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [number]) & set(SIGNALS)  # unblocked here
    signal.pthread_kill(threading.get_ident(), number)
    with Leaver() as leaver:
        assert leaver.signal == number and SIGNALS[number] == status


def test_who_loses_another_process_says_so_in_a_line(launcher):
    def lose():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    launcher.procs.append(None)  # a dead one: Lightning's thread would kill this process too
    with pytest.raises(Gone, match="another process has died"):
        launcher.launch(lose)
    assert not launcher.procs


@pytest.mark.parametrize("rank, status, said", [(0, 2, True), (1, 0, False)])
@pytest.mark.parametrize("kind", [Diverged, Gone, NotSaved])
def test_what_ends_all_processes_is_said_by_the_first(
    monkeypatch, capsys, rank, status, said, kind
):
    def app(given, standalone_mode):
        raise kind("as all of them", "", *([1, "stem"] if kind is Diverged else []))

    if rank:
        monkeypatch.setenv(LAUNCHED, "1")
    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == status and ("as all of them" in capsys.readouterr().err) == said


LEAVES = """
import atexit, os, sys
from torch import distributed
from resnetv2_cli import cli
distributed.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
atexit.register(print, "taken apart")
def app(given, standalone_mode):
    print("done", end="")
    return 143
cli.app = app
cli.main([])
"""


@pytest.mark.parametrize("launched, said", [(True, "done"), (False, "donetaken apart\n")])
def test_a_launched_process_is_not_taken_apart_at_its_end(tmp_path, launched, said):
    environment = {**os.environ, **({LAUNCHED: "1"} if launched else {})}
    command = [sys.executable, "-c", LEAVES, tmp_path / "meet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (143, said), done.stderr


@pytest.mark.skipif(not native.multiplies(), reason="no products of bf16")
def test_joined_operations_learn_under_ddp_what_eager_ones_do(seen):
    """The gradient is bit for bit the mean of those of the parts of the batch, for every parameter;
    in bf16 no farther from float32 than eager bf16, with a margin for chance."""
    one, other = (of["gradients"] for of in seen)
    for name in KERNELS:
        shared = one[name]["shared"]
        assert torch.equal(shared, other[name]["shared"])
        assert torch.equal(shared, (one[name]["own"] + other[name]["own"]) / 2)
        assert not torch.equal(shared, one[name]["own"])
        assert all(part.any() for part in shared.split(one[name]["sizes"]))
    exact, eager, joined, again = (one[name]["shared"] for name in KERNELS)
    assert distance(joined, exact) < 1.3 * distance(eager, exact)
    assert torch.equal(joined, again)
    layers = {"pointwise": 13, conv3x3("bf16"): 4, "patches": 2}  # those of stride 1, and 3x3 of 2
    for kind, count in layers.items():
        for way in ("forward", "backward"):  # of the step, and of this process's part alone
            assert one["joined"]["ran"][f"{kind}_{way}_bf16"] == 2 * count
    assert not one["eager"]["ran"]
