"""How the process of one run is started: on this machine, or through a cluster's queue."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from resnetv2_cli import jsonfile, trust
from resnetv2_cli.ablation.arms import Arm
from resnetv2_cli.errors import UserError
from resnetv2_cli.files import write_text
from resnetv2_cli.manifest import ORIGINS


class Started(Protocol):
    """A run that was started."""

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and exit."""


class Launcher(Protocol):
    """Starts runs."""

    def start(self, arm: Arm, slot: int, lock: int) -> Started:
        """Start a run in one of the slots for concurrent runs."""


def requested(arm: Arm) -> list[str]:
    """Write the config that a run begins with, and return its command: an ordinary ``train``."""
    # -P: a file in the current folder must not shadow a package.
    tool = [
        sys.executable,
        "-P",
        "-m",
        "resnetv2_cli",
        "train",
        *trust.flags(arm.experiment.own.values()),
    ]
    if arm.begun:
        return [*tool, "--resume", str(arm.folder)]
    arm.config.parent.mkdir(parents=True, exist_ok=True)
    write_text(arm.config, arm.experiment.dump())
    jsonfile.write(arm.config.with_suffix(ORIGINS), arm.origins)
    return [*tool, "--config", str(arm.config), "--output", str(arm.folder)]


class Process:
    """A child of this process, which holds the run's lock for as long as it lives."""

    def __init__(self, arm: Arm, environment: dict[str, str], lock: int) -> None:
        command = requested(arm)
        with arm.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches it only once, through ``stop``
                preexec_fn=leave_with_parent,
            )

    def status(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def leave_with_parent() -> None:
    """In the child: get SIGTERM, so save and exit, when the parent is killed (Linux only)."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Processes:
    """Runs as children on this machine, each with its share of the CPU cores, or with a GPU."""

    def __init__(self, jobs: int) -> None:
        import torch

        self.jobs, self.gpus = jobs, torch.cuda.device_count()

    def start(self, arm: Arm, slot: int, lock: int) -> Process:
        environment = dict(os.environ)
        if self.jobs > 1:
            share = max(1, (os.cpu_count() or 1) // self.jobs)
            environment.setdefault("OMP_NUM_THREADS", str(share))
            if self.gpus > 1 and arm.experiment.devices == "1":
                given = environment.get("CUDA_VISIBLE_DEVICES")
                seen = given.split(",") if given else list(map(str, range(self.gpus)))
                environment["CUDA_VISIBLE_DEVICES"] = seen[slot % self.gpus]
        return Process(arm, environment, lock)


class Job:
    """A submitit job; its result is the exit status of its run."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log = job, log

    def status(self) -> int | None:
        if not self.job.done():
            return None
        error = self.job.exception()
        if error is None:
            return int(self.job.result())
        with self.log.open("a", encoding="utf-8") as log:  # or it would not say what ended the job
            log.write(f"{error}\n")
        return 1

    def stop(self) -> None:
        self.job.cancel()


class LocalJob(Job):
    """A job of submitit's local executor. ``cancel`` would kill it a second later. The job's ID is
    that of the process that supervises it, which passes SIGTERM on."""

    def stop(self) -> None:
        if not self.job.done():
            os.kill(int(self.job.job_id), signal.SIGTERM)


class Queue:
    """Runs as jobs of a SLURM cluster, or of submitit's local substitute for one (``local``)."""

    def __init__(self, cluster: str, root: Path, hours: float) -> None:
        try:
            import submitit
        except ModuleNotFoundError:
            hint = "pip install 'resnetv2-cli[slurm]'"
            raise UserError(f"--launcher {cluster} needs submitit", hint) from None
        try:
            self.executor = submitit.AutoExecutor(folder=root / "jobs", cluster=cluster)
        except RuntimeError as error:
            hint = "is this a machine that submits jobs? --launcher process needs no queue"
            raise UserError(f"no queue: {str(error).splitlines()[0]}", hint) from None
        self.executor.update_parameters(timeout_min=round(60 * hours), name="resnetv2")
        self.job = LocalJob if cluster == "local" else Job

    def start(self, arm: Arm, slot: int, lock: int) -> Job:
        # Blocked: Ctrl-C reaches what the local executor starts only once, through ``stop``.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self.job(self.executor.submit(logged, requested(arm), arm.log), arm.log)
        except RuntimeError as error:  # about a partition, an account or a limit
            hint = "the same command continues where this one ends"
            raise UserError(f"no job: {str(error).strip().splitlines()[-1]}", hint) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def logged(command: list[str], log: Path) -> int:
    """In a job: run a command with its output in a file; return its exit status. Whatever ends the
    job early, the command gets SIGTERM, so that it can save and exit."""
    run: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def leave(number: int, frame: object) -> None:
        asked.append(number)  # the signal may come while the command is being started
        if run:
            run.terminate()

    before = signal.signal(signal.SIGTERM, leave)  # submitit ignores it
    try:
        with log.open("ab") as to:
            run = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=to,
                preexec_fn=leave_with_parent,
            )
        if asked:
            run.terminate()
        return run.wait()
    finally:
        if run:
            run.terminate()
            run.wait()
        signal.signal(signal.SIGTERM, before)


LAUNCHERS: dict[str, Callable[[int, Path, float], Launcher]] = {
    "process": lambda jobs, root, hours: Processes(jobs),
    "local": lambda jobs, root, hours: Queue("local", root, hours),
    "slurm": lambda jobs, root, hours: Queue("slurm", root, hours),
}  # by their --launcher names: run ``jobs`` at a time, in ``root``, each for at most ``hours``
