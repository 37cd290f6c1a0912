"""``kernels.c`` and the other C files, compiled once for the processor they run on, and kept in the
user's cache folder.

This needs gcc, whose threads are PyTorch's own. Without it ``library()`` is None, ``why_not()``
says why, and callers use PyTorch's operations instead.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from resnetv2_cli import files

HERE = Path(__file__).parent
HEADERS = [
    HERE / f"{name}.h" for name in ("vectors", "products", "bf16", "floats", "amx", "registers")
]
NAMES = ["kernels", "conv3x3", "pointwise", "pointwise_float", "winograd", "winograd_float"]
NAMES += ["patches", "patches_float"]
SOURCES = [HERE / f"{name}.c" for name in NAMES]
CPUS = Path("/proc/cpuinfo")
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
PATIENCE = 120.0  # seconds that compiling may take; it takes three to eight
KINDS = ("bf16", "float")
INT64, DOUBLE, INT = ctypes.c_int64, ctypes.c_double, ctypes.c_int
ARGUMENTS: dict[str, tuple[int, list[Any]]] = {  # of each function: pointers, then numbers
    "forward": (9, [INT64] * 2 + [DOUBLE] * 2 + [INT] * 2),
    "again": (3, [INT64] * 2 + [INT] * 2),
    "backward": (9, [INT64] * 2 + [INT] * 2),
}
ARGUMENTS = {f"{name}_{kind}": row for name, row in ARGUMENTS.items() for kind in KINDS}
SIZES = {"pointwise": 5, "conv3x3": 5, "winograd": 5, "patches": 7}  # numbers
# The same for products.h, which some processors have not; the first of their numbers are SIZES.
PRODUCTS: dict[str, tuple[int, list[Any]]] = {
    "forward": (11, [DOUBLE] * 2 + [INT] * 2),
    "backward": (12, [INT] * 2),
}
PRODUCTS = {
    f"{part}_{name}_{kind}": (pointers, [INT64] * sizes + numbers)
    for name, (pointers, numbers) in PRODUCTS.items()
    for part, sizes in SIZES.items()
    for kind in KINDS
}


class _Unfit(Exception):
    """Why there is no library."""


def _processor() -> str:
    """What ``-march=native`` depends on: different machines may share a home folder."""
    try:
        lines = CPUS.read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))  # x86, ARM
    except (OSError, StopIteration):
        return platform.machine()


def _compiler() -> tuple[list[str], str]:
    """The command that runs gcc, and its version."""
    name, *words = os.environ.get("CC", "").split() or ["gcc"]
    found = shutil.which(name)
    if platform.system() != "Linux" or not found:
        raise _Unfit("no gcc")
    command = [found, *words]
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    if "Free Software Foundation" not in told.stdout:  # another's threads compete with PyTorch's
        raise _Unfit(f"{' '.join(command)} is not gcc")
    return command, told.stdout.splitlines()[0]


def _loaded() -> ctypes.CDLL:
    """The library, compiled unless its file exists and is intact."""
    if (folder := files.cache()) is None:
        raise _Unfit("no home folder and no XDG_CACHE_HOME to keep them in")
    compiler, version = _compiler()
    texts = [file.read_text(encoding="utf-8") for file in (*HEADERS, *SOURCES)]
    parts = [*texts, *compiler[1:], *FLAGS, version, _processor()]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    file = folder / f"kernels-{name}.so"
    if files.whole(file):  # damaged code crashes the process, or computes something else
        with suppress(OSError):
            return ctypes.CDLL(str(file))
    _build(compiler, file)
    return ctypes.CDLL(str(file))


def _build(compiler: list[str], file: Path) -> None:
    """Compile the library in a folder of its own, as other processes may do the same. The folder is
    removed whatever happens."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(files.PARTIAL, dir=file.parent) as beside:
        made = Path(beside) / file.name
        command = [*compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["gcc failed"]
            raise _Unfit(next((ln for ln in lines if "error" in ln), lines[0]))
        files.seal(made)
        made.replace(file)


@cache
def _found() -> ctypes.CDLL | str:
    try:
        made = _loaded()
    except (_Unfit, OSError, subprocess.SubprocessError) as error:
        return str(error)
    for name, (pointers, numbers) in (ARGUMENTS | PRODUCTS).items():
        if hasattr(made, name):
            function = getattr(made, name)
            function.argtypes = [ctypes.c_void_p] * pointers + numbers
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


@cache
def has(name: str) -> bool:
    """Whether the library has this function: some are only for some processors."""
    return hasattr(library(), name)


@cache
def multiplies(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether to use the functions of ``products.h`` for numbers of this type: the processor
    multiplies such numbers fast, and for bf16 ``products_allowed`` agrees."""
    found, kind = library(), kind_of(dtype)
    if not has(f"pointwise_forward_{kind}"):
        return False
    return kind != "bf16" or bool(found.products_allowed())  # type: ignore[union-attr]


@cache
def lanes() -> int:
    """Floats per vector of the processor, as the library uses them; 0 without a library."""
    found = library()
    return int(found.lanes()) if found else 0


def call(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a function of the library; do nothing if the first tensor is on the meta device.

    The caller keeps the tensors alive meanwhile. None is passed as a null pointer.
    """
    if not tensors[0].is_meta:  # type: ignore[union-attr]
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        getattr(library(), name)(*pointers, *numbers)


def kind_of(dtype: torch.dtype) -> str | None:
    """The suffix of the functions for numbers of this type."""
    return {torch.bfloat16: "bf16", torch.float32: "float"}.get(dtype)
