"""Processes of one run: those started from outside, by torchrun or a cluster's queue, what they may
share, and what they do not wait for."""

from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from resnetv2_cli.errors import UserError

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


def started() -> int:
    """How many processes of this run were started from outside; 1 where this is the only one."""
    for kind in OUTSIDE:
        if kind.detect():
            try:
                return kind().world_size()
            except (RuntimeError, KeyError, ValueError):  # the Trainer says what is wrong with it
                return 1
    return 1


def refuse_free_folder() -> None:
    """Refuse a folder that each process would look for by itself, and find another one.

    Raises:
        UserError: there are several, started from outside.
    """
    if (processes := started()) > 1:
        raise UserError(
            f"{processes} processes were started together, and each would choose a folder",
            "give --output, the same for all; with --continue it may have been begun",
        )


class Steps(_TrainingEpochLoop):
    """Lightning's loop over batches, without its broadcast in each of them.

    There every process asks the first before each batch whether SIGTERM came, and waits for the
    answer, which on a GPU waits for all that was queued. ``callbacks.Leaver`` has that signal, and
    asks every ten iterations.
    """

    def _broadcast_sigterm_tensor(self) -> None:
        pass
