"""How PyTorch's threads wait for one another.

By themselves they spin for some 20 ms. That is quickest while each has a processor. Where other
work has one too, the thread that is waited for does not get to it, and an iteration takes twice to
seventeen times as long; then they had better sleep, or be fewer. How many they are changes the bits
of a run, and is the user's to say.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median_low

LOADAVG = Path("/proc/loadavg")  # its fourth field: how many threads run, of how many
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOOKS, PAUSE = 3, 0.002  # looks at the machine, and seconds between them
begun_with: int | None = None  # threads of others, where a command began on a crowded machine


def settle() -> None:
    """Have them sleep if the machine is crowded, and the user has not said how they wait. It is
    read when torch is imported, and so would be too late behind that."""
    global begun_with
    if "torch" in sys.modules or not crowded(others := running()):
        return
    begun_with = others
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = "passive"


def advice() -> str:
    """What may be faster on a machine that was crowded as the command began; empty elsewhere."""
    if begun_with is None or ours() == 1:
        return ""
    left = max(1, processors() - begun_with)
    return (
        f"other work has processors, and each of {ours()} threads waits for the last: "
        f"OMP_NUM_THREADS={left} may be faster, and rounds otherwise"
    )


def crowded(others: int | None) -> bool:
    """Whether threads of others, and one for each processor that is ours, are more than there
    are."""
    return others is not None and others + ours() > processors()


def processors() -> int:
    """Of the machine."""
    return os.cpu_count() or 1


def ours() -> int:
    """How many threads an operation will have."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processors()


def running() -> int | None:
    """How many threads of others run at this moment; None where the system does not say."""
    seen = []
    for _ in range(LOOKS):
        try:
            seen.append(int(LOADAVG.read_text(encoding="utf-8").split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(PAUSE)
    return median_low(seen)
