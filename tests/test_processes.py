"""Two processes started together, as by torchrun: what they wait for, and what they agree upon."""

import os
import socket
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import multiprocessing
from torch.profiler import ProfilerActivity, profile

from resnetv2_cli import run
from resnetv2_cli.config import Experiment
from resnetv2_cli.runfolder import RunFolder

STEPS = 23  # an epoch of the digits, and an evaluation after it


class Collectives(Callback):
    """Counts what the backend was asked for in 20 iterations, after the two in which DDP settles
    itself; and keeps BN's moving averages as an iteration and as an evaluation leaves them."""

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


def work(rank: int, place: str, port: int) -> None:
    """One of two processes; what it saw is left in a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    rank_zero_only.rank = rank  # Lightning looks when it is imported
    seen = Collectives()
    experiment = Experiment(
        dataset="digits", depth=8, batch_size=64, steps=STEPS, log_every=100, devices="2",
        accelerator="cpu", strategy="ddp", precision="32-true",
    )  # fmt: skip
    run.train(experiment, RunFolder(Path(place) / "run"), display=[seen])
    torch.save({"counted": dict(seen.counted), "averages": seen.averages}, f"{place}/{rank}")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    place = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.spawn(work, args=(str(place), port), nprocs=2)
    return [torch.load(place / str(rank)) for rank in (0, 1)]


def test_an_iteration_waits_for_its_gradient_alone(seen):
    """And every ten of them twice for what the processes wish: to save, to leave."""
    for one in seen:
        assert one["counted"] == {"gloo:all_reduce": 20 + 4, "gloo:barrier": 4}


def test_moving_averages_are_the_first_process_s_where_they_are_used(seen):
    """Each has its own in training; an evaluation by both is of one network."""
    (training, evaluated), (others, same) = (one["averages"] for one in seen)
    assert not torch.equal(training, others)
    assert torch.equal(evaluated, same)
