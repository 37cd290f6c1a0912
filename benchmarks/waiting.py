"""Milliseconds of a training step, by how PyTorch's threads wait for one another: alone, and beside
as many busy processes as there are processors.

    python benchmarks/waiting.py [DEPTH ...]

Each policy has a process of its own, as it is read when torch is imported; they take turns.
"""

import os
import subprocess
import sys
from statistics import median

POLICIES = {
    "spinning, as by itself": {},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
ROUNDS, TIMES, STRETCH = 3, 4, 2  # processes of each, measurements in one, iterations in one

STEP = f"""
import sys
import torch
from resnetv2_cli.bench.step import OPTIONS, step_arm
from resnetv2_cli.config import Experiment

arm = step_arm(Experiment(depth=int(sys.argv[1])), OPTIONS["fused"], torch.device("cpu"))
print(*[1000 * arm({STRETCH}) for _ in range({TIMES})])
"""


def measured(depth: str, policy: dict[str, str]) -> list[float]:
    command = [sys.executable, "-c", STEP, depth]
    done = subprocess.run(command, env=os.environ | policy, stdout=subprocess.PIPE, check=True)
    return [float(word) for word in done.stdout.split()]


def rounds(depth: str, where: str) -> None:
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for _ in range(ROUNDS):
        for name, policy in POLICIES.items():
            found[name] += measured(depth, policy)
    for name, times in found.items():
        said = f"{median(times):.0f} ms ({min(times):.0f}-{max(times):.0f}, n = {len(times)})"
        print(f"ResNet-{depth}, {where}, {name}: {said}", flush=True)


if __name__ == "__main__":
    for depth in sys.argv[1:] or ["20", "110"]:
        rounds(depth, "alone")
        spin = [sys.executable, "-c", "while True: pass"]
        busy = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
        try:
            rounds(depth, "beside other work")
        finally:
            for process in busy:
                process.kill()
