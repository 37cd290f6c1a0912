"""Processes that decode images while the network computes."""

import os
import sys
from typing import Any


def decoded_by(processes: int) -> dict[str, Any]:
    """DataLoader arguments for this many worker processes; with 0 it decodes images itself.

    On Linux workers are forked, as was always the default there. From Python 3.14 on the default
    is to start each afresh, which takes a second or two, and to send it the list of files.
    """
    if not processes:
        return {}
    context = "fork" if sys.platform == "linux" else None
    return {
        "num_workers": processes,
        "worker_init_fn": stand_apart,
        "multiprocessing_context": context,
    }


def stand_apart(worker: int) -> None:
    """Take a worker out of its process group. Ctrl-C and signals from ``timeout`` or a queue reach
    the whole group, but the training process needs its workers until it has saved."""
    os.setpgid(0, 0)
