"""Processes of one run: those started from outside, by torchrun or a cluster's queue, what they may
share, what they do not wait for, and that they begin together or not at all; and those launched."""

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

# As Lightning's Trainer looks for them: torchrun may itself run inside of a queue's job.
OUTSIDE = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)

PARTS = "its processes hold parts of the weights, and a checkpoint here is whole, and exact"
COPIES = "its processes begin with a copy of the run, whose files and locks have none"
UNFIT = {  # strategies of Lightning's by how their names begin, and why a run cannot use them
    "fsdp": PARTS,
    "deepspeed": PARTS,
    "ddp_spawn": COPIES,
    "ddp_fork": COPIES,
    "ddp_notebook": "it is for notebooks",
    "xla": "sums over many images need float64, which such devices lack",
    "single_": "it is for one device, which --strategy auto sees to",
}


def refuse_unfit(strategy: str) -> None:
    """Refuse a strategy with which a run could not be saved, continued or counted as it should be.

    Raises:
        UserError: says why.
    """
    for name, why in UNFIT.items():
        if strategy.startswith(name):
            raise UserError(f"--strategy {strategy} is of no use here: {why}", "use auto or ddp")
    if strategy not in ("auto", *StrategyRegistry.available_strategies()):
        raise UserError(f"no strategy is called {shown(strategy)}", "use auto or ddp")


def outside() -> ClusterEnvironment | None:
    """What started this process as one of many; None where it is the only one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to use srun, wherever there is one
        for kind in OUTSIDE:
            if kind.detect():
                try:
                    found = kind()
                    return found if found.world_size() > 1 else None
                except (RuntimeError, KeyError, ValueError):  # the Trainer says what is wrong
                    return None
    return None


def know_rank() -> None:
    """Have a process that is the only one be the first, whatever rank its environment has: a job's
    script may hand one on that is of something else, and Lightning would believe it."""
    if LAUNCHED not in os.environ and outside() is None:
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        if os.environ.get("LOCAL_RANK", "0") != "0":  # 0 is what Lightning writes as it launches
            del os.environ["LOCAL_RANK"]


def refuse_another_number(asked: int) -> None:
    """Refuse to train in another number of processes than were started.

    Raises:
        UserError: each would train by itself, into the same folder.
    """
    found = outside()
    if found and found.world_size() != asked:
        raise UserError(
            f"{found.world_size()} processes were started together, and --devices and --nodes ask "
            f"for {asked}",
            "--devices is as many as there are on a machine, with --strategy ddp",
        )


def refuse_free_folder() -> None:
    """Refuse a folder that each process would look for by itself, and find another one.

    Raises:
        UserError: there are several, started from outside.
    """
    if found := outside():
        raise UserError(
            f"{found.world_size()} processes were started together, and each would choose a folder",
            "give --output, the same for all; with --continue it may have been begun",
        )


class Meeting:
    """Where processes that were started from outside say how each would begin, before they do.

    They meet in the process group in which they will train, as often as ``agree`` is called; who
    fails before the last time says so there. One process alone meets nobody. ``tell``: hears if
    another one is long in coming.
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
        """Go on if all are here with the same ``state``, plain values by what a message calls them,
        which is made only where there are several. ``last``: they will not meet again.

        Raises:
            UserError: in each of them, one cannot begin, or they would begin from different states.
        """
        if self.over:
            return
        everyone = self._said({"state": state()})
        self.over = True  # for those who differ, too
        for rank, one in enumerate(everyone):
            if "failed" in one:
                message, hint = one["failed"]
                raise UserError(f"process {rank} cannot begin: {message}", hint)
        refuse_apart([one["state"] for one in everyone])
        self.over = last

    def _said(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """What each says this time, in the order of their ranks.

        Raises:
            UserError: one does not come.
        """
        assert self.kind is not None
        rank, size = self.kind.global_rank(), self.kind.world_size()
        place = f"{self.kind.main_address}:{self.kind.main_port}"
        everyone: list[Any] = [None] * size
        late = partial(self.tell, f"process {rank} of {size} waits for the others at {place}")
        try:
            if not distributed.is_initialized():  # Lightning takes it as it is
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
LONG = 10.0  # seconds after which somebody may wonder what is waited for


def attended(waits: Callable[[], Any], late: Callable[[], None]) -> Any:
    """What a function gives that waits where Python hears no signal: here it hears them. ``late``
    is called if that is long."""
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
    """Where the processes of this meeting, and of no other, leave word for one another.

    Raises:
        RuntimeError: one does not come.
    """
    found = rendezvous(f"tcp://{place}?rank={rank}&world_size={size}", timeout=PATIENCE)
    store = next(found)[0]
    return distributed.PrefixStore(met(store, rank, size), store)


def met(store: distributed.Store, rank: int, size: int) -> str:
    """A name of this meeting, the same in each process and in no other meeting.

    torchrun keeps one store through its restarts, and who finds in it where those that are gone
    could be reached tries that, and fails or waits for ever. So the first process calls, and takes
    no answer but to this call; the others answer until they are taken.

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
        RuntimeError: the time is over.
    """
    if time.monotonic() > end:
        raise RuntimeError(f"after {PATIENCE} one has not come")
    time.sleep(AGAIN)


def refuse_apart(states: list[dict[str, Any]]) -> None:
    """
    Raises:
        UserError: they are not the same; names the first difference.
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
    """Lightning's loop over batches, without its broadcast in each of them.

    There every process asks the first before each batch whether SIGTERM came, and waits for the
    answer, which on a GPU waits for all that was queued. ``leaving.Leaver`` has that signal, and
    asks every ten iterations.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class NoHandlers(_SignalConnector):
    """Lightning's handlers of signals, which are not installed.

    Theirs of SIGTERM broadcasts from within: another process takes that for its own next exchange,
    and all of them hang. On SLURM theirs of USR1 saves a checkpoint of its own and requeues.
    """

    def register_signal_handlers(self) -> None:
        pass


GLOO = "gloo/transport"  # in what is said where another process does not answer any more


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher of the other processes on this machine, which are born with the signals
    blocked that ``leaving.Leaver`` handles, and hear of what came once they have its handler: one
    to the whole group would end them while they start, and Lightning the first one with them.

    Raises:
        Gone: one of the others has died; on a GPU NCCL waits, and Lightning ends this one too.
    """

    def launch(self, function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        try:
            return super().launch(function, *given, **more)
        except Exception as error:
            self.procs.clear()  # or Lightning, once it sees that they left, kills this one too
            if GLOO not in str(error):
                raise
            hint = "start it again; a training goes on from what it saved, with --resume"
            raise Gone("another process has died, or is out of reach", hint) from error

    def _call_children_scripts(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.environ[LAUNCHED] = "1"
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[LAUNCHED]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
