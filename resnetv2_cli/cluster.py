"""The processes of one run: those started from outside, by torchrun or a cluster's queue, which
begin together or not at all, and those that the first process launches itself."""

import atexit
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from datetime import timedelta
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any
from uuid import uuid4

import torch
from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from resnetv2_cli.errors import LAUNCHED, Gone, UserError, shown
from resnetv2_cli.signals import SIGNALS
from resnetv2_cli.telling import Tell, silent

# In the order of Lightning's Trainer: torchrun may itself run inside a queue's job.
OUTSIDE = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)

PARTS = "its processes each hold a part of the weights, and a checkpoint here is whole and exact"
COPIES = "its processes begin with a copy of the run, and files and locks cannot be copied"
UNFIT = {  # Lightning's strategies, by prefix of their names, and why a run cannot use them
    "fsdp": PARTS,
    "deepspeed": PARTS,
    "ddp_spawn": COPIES,
    "ddp_fork": COPIES,
    "ddp_notebook": "it is for notebooks",
    "xla": "sums over many images need float64, which XLA's devices lack",
    "single_": "it is for one device, which --strategy auto handles",
}


def refuse_unfit(strategy: str) -> None:
    """Refuse a strategy under which a run could not be saved, continued or counted correctly.

    Raises:
        UserError: it is such a strategy, or unknown; the message says why.
    """
    for name, why in UNFIT.items():
        if strategy.startswith(name):
            raise UserError(f"--strategy {strategy} cannot be used here: {why}", "use auto or ddp")
    if strategy not in ("auto", *StrategyRegistry.available_strategies()):
        raise UserError(f"no strategy is called {shown(strategy)}", "use auto or ddp")


def started_by() -> ClusterEnvironment | None:
    """The environment that started this process, perhaps as one of several; None if there is
    none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to use srun, wherever it is installed
        for kind in OUTSIDE:
            if kind.detect():
                try:
                    found = kind()
                    found.world_size()  # fails here if at all
                    return found
                except (RuntimeError, KeyError, ValueError):  # the Trainer says what is wrong
                    return None
    return None


def outside() -> ClusterEnvironment | None:
    """The environment that started this process as one of several; None if it is alone."""
    found = started_by()
    return found if found and found.world_size() > 1 else None


def know_rank() -> None:
    """Give a process that is alone rank 0, whatever rank its environment names: a job's script may
    pass on that of something else, and Lightning would believe it."""
    if LAUNCHED not in os.environ and outside() is None:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        if os.environ.get("LOCAL_RANK", "0") != "0":  # Lightning writes 0 when it launches
            del os.environ["LOCAL_RANK"]


def refuse_another_number(asked: int, nodes: int) -> None:
    """Refuse to train in a different number of processes than were started, on ``nodes`` machines.

    Raises:
        UserError: the numbers differ: each process would train alone, into the same folder, or
            wait for others that nobody starts.
    """
    found = started_by()
    started = found.world_size() if found else 1
    if started != asked and (found or nodes > 1):  # else Lightning starts the others
        many = f"{started} processes were started together" if started > 1 else "1 process is alone"
        raise UserError(
            f"{many}, and --devices and --nodes ask for {asked}",
            "--devices must be the number of processes that torchrun or srun starts on each "
            "machine, with --strategy ddp",
        )


def refuse_free_folder() -> None:
    """Refuse to choose a run's folder automatically where each process would choose its own.

    Raises:
        UserError: there are several processes, started from outside.
    """
    if found := outside():
        raise UserError(
            f"{found.world_size()} processes were started together, and each would choose a folder",
            "give all of them the same --output; with --continue its run may have begun already",
        )


class Meeting:
    """Where processes that were started from outside compare how each would begin, before they do.

    They meet in the process group that they will train in, once for each call of ``agree``; one
    that fails before the last meeting tells the others so. A process alone meets nobody. ``tell``:
    hears if the others are slow to arrive.
    """

    def __init__(self, tell: Tell = silent) -> None:
        self.kind, self.tell = outside(), tell
        self.over = self.kind is None

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not self.over:
            said = [str(error) or type(error).__name__, getattr(error, "hint", "")]
            self._said({"failed": said})

    def agree(self, state: Callable[[], dict[str, Any]], last: bool = True) -> None:
        """Return once all have come with the same ``state``: plain values, keyed by their names in
        messages, computed only if there are several processes. ``last``: they will not meet again.

        Raises:
            UserError: in every process, if one cannot begin, or if their states differ.
        """
        if self.over:
            return
        everyone = self._said({"state": state()})
        self.over = True  # also for those that differ
        for rank, one in enumerate(everyone):
            if "failed" in one:
                message, hint = one["failed"]
                raise UserError(f"process {rank} cannot begin: {message}", hint)
        refuse_apart([one["state"] for one in everyone])
        self.over = last

    def _said(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What each process says at this meeting, in the order of their ranks.

        Raises:
            UserError: one does not come.
        """
        assert self.kind is not None
        rank, size = self.kind.global_rank(), self.kind.world_size()
        place = f"{self.kind.main_address}:{self.kind.main_port}"
        everyone: list[Any] = [None] * size
        late = partial(self.tell, f"process {rank} of {size} waits for the others at {place}")
        try:
            if not distributed.is_initialized():  # Lightning then uses this one
                store = attended(partial(common, place, rank, size), late)
                distributed.init_process_group(store=store, rank=rank, world_size=size)
                if torch.cuda.is_available():
                    atexit.register(distributed.destroy_process_group)
            attended(partial(distributed.all_gather_object, everyone, mine), late)
        except RuntimeError as error:
            self.over = True
            line = str(error).splitlines()[0]
            raise UserError(f"the {size} processes do not meet at {place}: {line}") from None
        return everyone


PATIENCE = timedelta(minutes=30)  # as long as processes wait for one another in training
AGAIN = 0.05  # seconds between two looks at a store
LONG = 10.0  # seconds after which a user may wonder what the process is waiting for


def attended(waits: Callable[[], Any], late: Callable[[], None]) -> Any:
    """The result of a function that waits where Python handles no signals. It runs in a thread, so
    that they are handled meanwhile. ``late`` is called once if the wait is long."""
    found: Future[Any] = Future()
    end = time.monotonic() + LONG

    def run() -> None:
        try:
            found.set_result(waits())
        except Exception as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    while not found.done():
        wait_for([found], timeout=1.0)
        if time.monotonic() > end:
            late()
            end = math.inf
    return found.result()


def common(place: str, rank: int, size: int) -> distributed.Store:
    """A store for the processes of this meeting, and of no other.

    Raises:
        RuntimeError: one does not come.
    """
    found = rendezvous(f"tcp://{place}?rank={rank}&world_size={size}", timeout=PATIENCE)
    store = next(found)[0]
    return distributed.PrefixStore(met(store, rank, size), store)


def met(store: distributed.Store, rank: int, size: int) -> str:
    """A name for this meeting, the same in each process, and used by no other meeting.

    torchrun keeps one store across its restarts, and a process that finds the addresses of dead
    processes in it tries to reach them, and fails or waits forever. So the first process calls, and
    accepts only answers to this call; the others answer until theirs is accepted.

    Raises:
        RuntimeError: one does not come.
    """
    end, mine = time.monotonic() + PATIENCE.total_seconds(), uuid4().hex
    if rank == 0:
        store.set("call", mine)
        came = [mine]
        for other in range(1, size):
            while True:
                call, answer = store.get(f"answer of {other}").decode().split()
                if call == mine:
                    break
                wait(end)
            came.append(answer)
        store.set("came", " ".join(came))
        return mine
    while True:
        call = store.get("call").decode()
        store.set(f"answer of {rank}", f"{call} {mine}")
        came = store.get("came").decode().split() if store.check(["came"]) else []
        if mine in came:
            return came[0]
        wait(end)


def wait(end: float) -> None:
    """
    Raises:
        RuntimeError: the time is up.
    """
    if time.monotonic() > end:
        raise RuntimeError(f"after {PATIENCE} one is still missing")
    time.sleep(AGAIN)


def refuse_apart(states: list[dict[str, Any]]) -> None:
    """
    Raises:
        UserError: they are not the same; the message names the first difference.
    """
    for rank, state in enumerate(states):
        for name, value in state.items():
            if value != states[0][name]:
                raise UserError(
                    f"process 0 would begin with {name} {shown(states[0][name])}, process {rank} "
                    f"with {shown(value)}",
                    "the run's folder must be the same for all, on a filesystem that they share; "
                    "the images may be copies",
                )


class Steps(_TrainingEpochLoop):
    """Lightning's loop over batches, without its broadcast at every batch.

    With that broadcast, every process asks the first before each batch whether SIGTERM came, and
    waits for the answer, which on a GPU waits for all queued work. Here ``leaving.Leaver`` handles
    that signal, and asks every ten iterations.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class NoHandlers(_SignalConnector):
    """Lightning's signal connector, without its handlers.

    Its SIGTERM handler broadcasts: another process takes that for its own next collective, and all
    of them hang. On SLURM, its USR1 handler saves a checkpoint of its own and requeues the job.
    """

    def register_signal_handlers(self) -> None:
        pass


GLOO = "gloo/transport"  # in the error's text when another process no longer answers


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher of the other processes on this machine. They start with the signals
    blocked that ``leaving.Leaver`` handles, and receive them once they have its handler: a signal
    to the whole group would otherwise kill them during startup, and Lightning would then kill the
    first process too.

    Raises:
        Gone: one of the others has died; on a GPU, where NCCL waits, Lightning kills this one too.
    """

    def launch(self, function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        try:
            return super().launch(function, *given, **more)
        except Exception as error:
            self.procs.clear()  # or Lightning, seeing that the others ended, kills this one too
            if GLOO not in str(error):
                raise
            hint = "start it again; with --resume, training continues from its last checkpoint"
            raise Gone("another process has died, or cannot be reached", hint) from error

    def _call_children_scripts(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.environ[LAUNCHED] = "1"
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[LAUNCHED]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
