"""Two nodes of one process under torchrun, one worker killed: the run ends as if it had not been.

python tests/stress/nodes.py [--output FILE]: both nodes are this machine, and meet at a local port.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STEPS, KILL_AT, PATIENCE = 120, 45, 600.0
TRAIN = ["train", "--dataset", "digits", "--depth", "8", "--batch-size", "64", "--steps", STEPS]
TRAIN += ["--eval-every", "1", "--save-every", "20", "--log-every", "5", "--precision", "32-true"]
TRAIN += ["--nodes", "2", "--strategy", "ddp", "--accelerator", "cpu", "--continue", "--output"]


def nodes(folder: Path) -> list[subprocess.Popen]:
    """Start a torchrun agent for each node; they meet at a free port and start the workers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=nodes"]
    agent += ["--max-restarts=3", "--local-addr=127.0.0.1", "-m", "resnetv2_cli"]
    words = list(map(str, [*agent, *TRAIN, folder]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder.with_suffix(".log"), "w") as log:
        return [subprocess.Popen(words, env=environment, stdout=log, stderr=log) for _ in range(2)]


def worker(agent: subprocess.Popen) -> int | None:
    """The ID of the process that trains for an agent; None if there is none."""
    found = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in map(int, found):
        if b"resnetv2_cli" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def iteration(folder: Path) -> int:
    """The last iteration in the metrics, 0 if there is none."""
    file = folder / "metrics.csv"
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    return int(lines[-1].split(",")[0]) if lines else 0


def train(folder: Path, kill: bool) -> int:
    """Train on two nodes; return the iteration when the second node's worker was killed, or 0."""
    agents, killed, began = nodes(folder), 0, time.monotonic()
    try:
        while any(agent.poll() is None for agent in agents):
            if time.monotonic() - began > PATIENCE:
                raise SystemExit(f"no end after {PATIENCE:.0f} s:\n{log(folder)}")
            if kill and not killed and iteration(folder) >= KILL_AT and (pid := worker(agents[1])):
                killed = iteration(folder)
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        for agent in agents:
            agent.kill()
    if any(agent.returncode for agent in agents):
        raise SystemExit(log(folder))
    return killed


def log(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()[-3000:]


def left(folder: Path) -> tuple[dict, str, dict]:
    """Everything in which two runs must agree."""
    held = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    kept = {k: v for k, v in result.items() if k not in ("environment", "name")}
    state = {k: held[k] for k in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    return state, (folder / "metrics.csv").read_text(), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        train(whole, kill=False)
        killed = train(broken, kill=True)
        resumed = json.loads((broken / "manifest.json").read_text())["resumes"]
        (a, metrics_a, result_a), (b, metrics_b, result_b) = left(whole), left(broken)
        try:
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            same = True
        except AssertionError as error:
            print(error, file=sys.stderr)
            same = False
        readings = [r.pop("test_set_readings") for r in (result_a, result_b)]
    made = {
        "killed_at_iteration": killed,
        "of": STEPS,
        "continued_from": [r.get("step") for r in resumed],
        "same_weights_and_optimizer": same,
        "same_metrics": metrics_a == metrics_b,
        "same_result": result_a == result_b,
        "test_set_readings": readings,
    }
    print(json.dumps(made, indent=1))
    if given.output:
        given.output.write_text(json.dumps(made, indent=1))
    sys.exit(not (killed and resumed and same and metrics_a == metrics_b and result_a == result_b))


if __name__ == "__main__":
    main()
