"""How PyTorch's threads wait for one another.

By themselves they spin for some 20 ms. That is quickest while each has a processor. Where other
work has one too, the thread that is waited for does not get to it, and an iteration takes twice to
seventeen times as long; then they had better sleep.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

LOADAVG = Path("/proc/loadavg")  # its fourth field: how many threads run, of how many
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOOKS, PAUSE = 3, 0.002  # looks at the machine, and seconds between them


def settle() -> None:
    """Have them sleep if the machine is crowded, and the user has not said how they wait. It is
    read when torch is imported, and so would be too late behind that."""
    said = any(name in os.environ for name in SETTINGS)
    if not said and "torch" not in sys.modules and crowded():
        os.environ[SETTINGS[0]] = "passive"


def crowded() -> bool:
    """Whether other work, and a thread for each processor that is ours, are more than there are."""
    others = running()
    return others is not None and others + ours() > (os.cpu_count() or 1)


def ours() -> int:
    """How many threads an operation will have."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def running() -> float | None:
    """How many threads of others run at this moment; None where the system does not say."""
    seen = []
    for _ in range(LOOKS):
        try:
            seen.append(int(LOADAVG.read_text(encoding="utf-8").split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(PAUSE)
    return median(seen)
