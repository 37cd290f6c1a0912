"""Processes of one run that were started from outside: by torchrun, or by a cluster's queue."""

from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from resnetv2_cli.errors import UserError

# As Lightning's Trainer looks for them: torchrun may itself run inside of a queue's job.
OUTSIDE = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


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
