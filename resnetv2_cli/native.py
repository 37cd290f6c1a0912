"""``kernels.c``, compiled once for the processor it runs on, and kept in the user's cache folder.

It needs gcc, whose threads are PyTorch's own; where there is none, ``library()`` is None and
``why_not()`` says why. Whoever uses it then does the same with PyTorch's operations.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).parent / "kernels.c"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
PATIENCE = 120.0  # seconds that compiling may take; it takes two
KINDS = ("bf16", "float")
POINTERS = {"forward": 8, "again": 3, "backward": 7}  # arguments of each function, then numbers
NUMBERS: dict[str, list[Any]] = {
    "forward": [ctypes.c_int64] * 2 + [ctypes.c_double] * 2 + [ctypes.c_int] * 2,
    "again": [ctypes.c_int64] * 2 + [ctypes.c_int] * 2,
    "backward": [ctypes.c_int64] * 2 + [ctypes.c_int] * 2,
}


class _Unfit(Exception):
    """Why there is no library."""


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def _compiler() -> tuple[str, str]:
    """gcc, and its version."""
    found = shutil.which(os.environ.get("CC") or "gcc")
    if platform.system() != "Linux" or not found:
        raise _Unfit("no gcc")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    if "Free Software Foundation" not in told.stdout:  # another's threads would fight PyTorch's
        raise _Unfit(f"{found} is not gcc")
    return found, told.stdout.splitlines()[0]


def _built() -> Path:
    """The library's file, compiled unless it is there."""
    compiler, version = _compiler()
    parts = [SOURCE.read_text(), *FLAGS, version, _processor()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnetv2"
    file = folder / f"kernels-{name}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["gcc failed"]
            raise _Unfit(next((ln for ln in lines if "error" in ln), lines[0]))
        partial.replace(file)
    return file


@cache
def _found() -> ctypes.CDLL | str:
    try:
        made = ctypes.CDLL(str(_built()))
    except (_Unfit, OSError, subprocess.SubprocessError) as error:
        return str(error)
    for name, pointers in POINTERS.items():
        for kind in KINDS:
            function = getattr(made, f"{name}_{kind}")
            function.argtypes = [ctypes.c_void_p] * pointers + NUMBERS[name]
            function.restype = None
    return made


def library() -> ctypes.CDLL | None:
    """The compiled functions, or None."""
    found = _found()
    return None if isinstance(found, str) else found


def why_not() -> str:
    """Why there is no library; empty where there is one."""
    found = _found()
    return found if isinstance(found, str) else ""


def kind_of(dtype: torch.dtype) -> str | None:
    """The suffix of the functions for numbers of this type."""
    return {torch.bfloat16: "bf16", torch.float32: "float"}.get(dtype)
