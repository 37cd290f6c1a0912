"""Memory of this process and of its machine, in bytes; None where the system does not say."""

import ctypes
import os
from pathlib import Path

import torch

PROC = Path("/proc")
GROUP = Path("/sys/fs/cgroup")  # the limit of a container
GROUPS = (  # of cgroup v2, and v1: files of the limit, use and statistics; rows of file pages
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)
TRIM, MAP = -1, -3  # parameters of glibc's mallopt
LARGE = 16_000_000  # bytes: a wide tensor of the first stage at batch 128 has 16.8 million


def _field(file: Path, name: str) -> int | None:
    """The bytes in a line of /proc such as ``VmHWM:   123 kB``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(ln for ln in lines if ln.startswith(name + ":")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _reclaimable(stat: Path, names: tuple[str, str]) -> int:
    """How much of a container's memory holds pages of files, read once or often: the system
    reclaims both when memory is needed. Pages of tmpfs, which it cannot reclaim, are counted
    elsewhere."""
    try:
        rows = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
        return sum(int(rows.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0


def _within() -> int | None:
    """What is left of a container's limit."""
    for limit, used, stat, names in GROUPS:
        most, taken = _number(GROUP / limit), _number(GROUP / used)
        if most is not None and taken is not None:
            return most - taken + _reclaimable(GROUP / stat, names)
    return None


def available(device: torch.device) -> int | None:
    """What a process can still take on a device: free memory, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _field(PROC / "meminfo", "MemAvailable")
    known = [n for n in (free, _within()) if n is not None]
    return min(known) if known else None


def swap() -> int:
    """How much the system can still swap out to its disk, slowly."""
    return _field(PROC / "meminfo", "SwapFree") or 0


def now() -> int | None:
    """The resident memory of the process."""
    return _field(PROC / "self/status", "VmRSS")


def forget_peak() -> bool:
    """Reset the peak to what the process has now; return whether the system can do that."""
    try:
        (PROC / "self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> dict[str, int | None]:
    """The peak of the memory in use: ``host``, and ``device`` if that is a GPU."""
    # Reserved, not allocated: the memory of CUDA graphs counts as free between replays.
    on_device = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {"host": _field(PROC / "self/status", "VmHWM"), "device": on_device}


def map_large() -> None:
    """Have the C library map each large tensor separately, so that its memory returns to the system
    when it is freed. In the heap they would leave holes between longer-lived blocks: for
    ResNet-1001 a sixth of the peak. Does nothing if the user has set this, or without glibc.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(MAP, LARGE)
    mallopt(TRIM, 4 * LARGE)  # as glibc itself would set it, had MAP not been set
