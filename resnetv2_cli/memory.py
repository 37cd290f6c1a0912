"""Memory of this process and of its machine, in bytes; None where the system does not say."""

import ctypes
import os
from pathlib import Path

import torch

PROC = Path("/proc")
GROUP = Path("/sys/fs/cgroup")  # the limit of a container
TRIM, MAP = -1, -3  # parameters of glibc's mallopt
LARGE = 16_000_000  # bytes: a wide tensor of the first stage at batch 128 has 16.8 million


def _field(file: Path, name: str) -> int | None:
    """A line of /proc such as ``VmHWM:   123 kB``."""
    try:
        lines = file.read_text().splitlines()
        return 1024 * int(next(ln for ln in lines if ln.startswith(name + ":")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def available(device: torch.device) -> int | None:
    """What a process can still take on a device: free memory, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _field(PROC / "meminfo", "MemAvailable")
    limit, used = _number(GROUP / "memory.max"), _number(GROUP / "memory.current")
    within = None if limit is None or used is None else limit - used
    known = [n for n in (free, within) if n is not None]
    return min(known) if known else None


def swap() -> int:
    """What the system can put aside on its disk, slowly."""
    return _field(PROC / "meminfo", "SwapFree") or 0


def now() -> int | None:
    """What the process has in memory."""
    return _field(PROC / "self/status", "VmRSS")


def forget_peak() -> bool:
    """Let the peak begin again at what the process has now; whether the system can do that."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> dict[str, int | None]:
    """The most that was in memory at one time: ``host``, and ``device`` where that is a GPU."""
    # Reserved: what lies in the pool of CUDA graphs counts as free while it is not replayed.
    on_device = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"host": _field(PROC / "self/status", "VmHWM"), "device": on_device}


def map_large() -> None:
    """Have the C library give each large tensor a place of its own, which goes back to the system
    with it. In its heap they leave holes behind, between what lives longer: for ResNet-1001 a sixth
    of the peak. Nothing happens where the user has set this, or the library is not glibc.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MAP, LARGE)
    mallopt(TRIM, 4 * LARGE)  # what it would come to by itself, if the first had not been set


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
