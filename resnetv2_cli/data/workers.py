"""Processes that decode images while the network computes."""

import os
import sys
from typing import Any


def decoded_by(processes: int) -> dict[str, Any]:
    """What a DataLoader takes so that this many decode its images; with 0 it does so itself.

    On Linux each is a copy of the process that begins it, as it always was there: from 3.14 on
    Python would start it anew, which takes a second or two, and hand it the list of files.
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
    """Take a worker out of its process group: Ctrl-C, and what ``timeout`` or a queue sends, reach
    all of a group; the process that trains needs its workers until it has saved."""
    os.setpgid(0, 0)
