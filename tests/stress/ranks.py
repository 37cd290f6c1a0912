"""Evaluation by 1, 2 and 3 processes, on 10,000 images and on one more: every image counts once.

python tests/stress/ranks.py CIFAR [--output FILE]: CIFAR is a folder as ``--data-dir`` takes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from resnetv2_cli.data import images
from resnetv2_cli.data.catalog import CIFAR10

TOOL = [sys.executable, "-m", "resnetv2_cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def write(split: images.Split, root: Path, more: int) -> None:
    """Write a tree of classes, as dataset ``folder`` reads it; the first ``more`` images twice."""
    for i, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
        place = root / CIFAR10[label]
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(1 + (i < more)):
            Image.fromarray(pixels).save(place / f"{i:05}-{copy}.bmp")


def evaluated(checkpoint: Path, root: Path, devices: int) -> dict:
    command = [*TOOL, "eval", checkpoint, "--data-dir", root, "--devices", devices, "--json"]
    flags = ["--accelerator", "cpu", "--precision", "32-true", "--workers", 0]
    words = list(map(str, [*command, *flags, "--output", root]))
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    cifar = images.load("cifar10", given.cifar)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        few = images.Split(cifar.train.images[::25], cifar.train.labels[::25])
        for more in (0, 1):
            write(few, root / str(more) / "train", 0)
            write(cifar.test, root / str(more) / "test", more)
        network = ["--depth", "8", "--stem", "cifar", "--dataset", "folder", "--workers", "0"]
        length = ["--steps", "60", "--eval-every", "1000", "--data-dir", str(root / "0")]
        run = root / "run"
        command = [*TOOL, "train", *network, *length, "--output", str(run)]
        subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
        for more in (0, 1):
            for devices in (1, 2, 3):
                scores = evaluated(run, root / str(more), devices)
                row = {"processes": devices} | {k: scores[k] for k in ("images", "error", "loss")}
                rows.append(row)
                print(json.dumps(row), flush=True)
                first = rows[3 * more]
                assert row["images"] == 10_000 + more
                assert row["error"] == first["error"]
                assert abs(row["loss"] - first["loss"]) < 1e-6 * first["loss"]
    if given.output:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
