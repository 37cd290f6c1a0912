"""How PyTorch's threads wait for one another.

By default they spin for some 20 ms, which is fastest while each has a processor. If other work
occupies processors too, the thread that the others wait for does not get one, and an iteration
takes 2 to 17 times as long; then they had better sleep, or be fewer. Their number changes the bits
of a run, and is for the user to set.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median_low

LOADAVG = Path("/proc/loadavg")  # its fourth field: how many threads run, of how many
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LOOKS, PAUSE = 3, 0.002  # readings of the load, and seconds between them
begun_with: int | None = None  # other threads, if the command began on a crowded machine


def settle() -> None:
    """Have threads sleep if the machine is crowded, unless the user has set how they wait. Call it
    before torch is imported, which reads the setting."""
    global begun_with
    if "torch" in sys.modules or not crowded(others := running()):
        return
    begun_with = others
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = "passive"


def advice() -> str:
    """What may be faster, if the machine was crowded when the command began; else empty."""
    if begun_with is None or ours() == 1:
        return ""
    left = max(1, processors() - begun_with)
    return (
        f"other work uses processors, and each of {ours()} threads waits for the slowest: "
        f"OMP_NUM_THREADS={left} may be faster, but rounds differently"
    )


def crowded(others: int | None) -> bool:
    """Whether the threads of others and our own are more than the processors."""
    return others is not None and others + ours() > processors()


def processors() -> int:
    """The number of processors of the machine."""
    return os.cpu_count() or 1


def ours() -> int:
    """How many threads an operation will use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else processors()


def running() -> int | None:
    """How many threads of others run at this moment; None if the system does not say."""
    seen = []
    for _ in range(LOOKS):
        try:
            seen.append(int(LOADAVG.read_text(encoding="utf-8").split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(PAUSE)
    return median_low(seen)
