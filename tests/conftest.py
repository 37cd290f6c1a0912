"""Shared by several test files: small real images, small experiments, and the console script."""

import io
import json
import math
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("RESNETV2_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
SCRIPT = Path(sys.executable).parent / "resnetv2"

# With small networks, or several processes on few cores, more threads only wait for one another.
THREADS = {"OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)


# The exit status of a command stopped by a signal, and the one line it prints.
STOPPED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


# Started by a shell in the background, the tests and their children would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no reason to fail.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Give the test an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def homeless(monkeypatch):
    """A user without a passwd entry, as in a container, and without a home in the environment."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; tests that need it are skipped with a reason if it is missing."""
    if not (SHARED / "cifar10").is_dir():
        pytest.skip(f"no real images: there is no {SHARED.name}/cifar10 beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def resnetv2(tmp_path_factory):
    """Run the console script: ``resnetv2("train", "--depth", 8)`` -> the finished process."""

    def call(*arguments, status: int | None = 0, cwd=None, env=None, timeout=300):
        command = [str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd or tmp_path_factory.mktemp("cwd"),
            env={**os.environ, **THREADS, "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if status is not None:
            assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def here(capsys, monkeypatch):
    """As ``resnetv2``, but in this process, where everything is already imported: for tests that do
    not depend on signals, the environment or the script itself."""
    from resnetv2_cli import console
    from resnetv2_cli.cli import main

    def call(*arguments, status: int | None = 0, cwd=None):
        command = [*map(str, arguments)]
        for side in (console.out, console.err):
            monkeypatch.setattr(side, "_width", 200)
        if cwd:
            monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            main(command)
            left = 0
        except SystemExit as exit:
            left = exit.code or 0
        done = subprocess.CompletedProcess(command, left, *capsys.readouterr())
        if status is not None:
            assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def refused(tmp_path, monkeypatch, here):
    """Have a user's own class ``Own`` that fails refused: ``refused("unit", module, text)`` -> the
    error and the hint, which are the same from ``train`` and ``describe``; no random number may be
    drawn for it."""
    monkeypatch.chdir(tmp_path)

    def call(kind: str, module: str, text: str) -> list[str]:
        (tmp_path / f"{module}.py").write_text(text)
        drawn = torch.get_rng_state()
        flags = [f"--{kind}", f"{module}:Own", "--dataset", "digits", "--depth", 8]
        said = [here(c, *flags, status=2).stderr.splitlines()[-2:] for c in ("train", "describe")]
        assert said[0] == said[1] and torch.equal(torch.get_rng_state(), drawn)
        assert [p.name for p in tmp_path.iterdir() if p.suffix] == [f"{module}.py"]
        return said[0]

    return call


SMALL = ["--dataset", "digits", "--depth", 8, "--batch-size", 64, "--log-every", 5]


@pytest.fixture(scope="session")
def trained(resnetv2, tmp_path_factory) -> Path:
    """The folder of a small finished run on the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    resnetv2("train", *SMALL, "--epochs", 4, "--output", folder)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The RunFolder of a finished run of ``trainings.TINY``; tests must not change it."""
    from trainings import trained_as

    return trained_as(tmp_path_factory.mktemp("whole") / "run")


LAB = {"dataset": "digits", "depth": 8, "batch_size": 128, "steps": 6, "log_every": 2}


def two_rows(root: Path, runs: int = 1, given: dict | None = None, **how):
    """An ablation of conv1x1 against identity, planned by ``planning.plan`` but not begun."""
    from resnetv2_cli.ablation import planning, studies

    [study] = studies.studies(shortcut="conv1x1")
    return planning.plan(study, runs, given or {}, root, **how)


def names(**given) -> list[str]:
    """The names of the rows of an ablation."""
    from resnetv2_cli.ablation import studies

    return [row.name for study in studies.studies(**given) for row in study.table.rows]


def ended(ablation, *errors: tuple[float, ...]) -> None:
    """Write results for the first rows: for each, the test errors of its first seeds; an infinite
    one stands for a run that diverged."""
    for line, row in zip(ablation.lines, errors, strict=False):
        for arm, error in zip(line.arms, row, strict=False):
            arm.folder.mkdir(parents=True)
            result = arm.folder / "result.json", {"test_error": error}
            failure = arm.folder / "failed.json", {"reason": "it diverged", "diverged": True}
            file, left = failure if math.isinf(error) else result
            file.write_text(json.dumps(left))


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """An ablation with one run done, one killed and the others not begun; and next to it a run that
    diverged."""
    from resnetv2_cli import run
    from resnetv2_cli.ablation import record
    from resnetv2_cli.runfolder import RunFolder

    root = tmp_path_factory.mktemp("runs")
    made = two_rows(root / "lab", 2, LAB)
    record.write(made)
    first, second = (line.arms[0] for line in made.lines)
    for arm in (first, second):
        run.train(arm.experiment, RunFolder(arm.folder))
        os.close(arm.claim())  # leaves the lock file, as an ablation does
    (second.folder / "result.json").unlink()
    shutil.copytree(first.folder, root / "alone")
    (root / "alone" / "result.json").unlink()
    (root / "alone" / "failed.json").write_text('{"reason": "the loss is not finite"}')
    return root


CUT_OFF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"  # EXIF whose first entry is incomplete


def encoded(width: int = 90, height: int = 70, mode: str = "RGB", **how) -> bytes:
    """An encoded smooth picture with some noise, as in photographs."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height)), np.int16) + rng.integers(
        -9, 10, (height, width, 3), dtype=np.int16
    )
    out = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    image.save(out, how.pop("format", "JPEG"), **how)
    return out.getvalue()


@pytest.fixture(scope="session")
def photographs(shared_data) -> dict[str, bytes]:
    """The bytes of a few real ImageNet photographs, unchanged, by name."""
    with zipfile.ZipFile(shared_data / "imagenet-sample.zip") as sample:
        names = sorted(n for n in sample.namelist() if n.endswith(".JPEG"))
        return {Path(n).name: sample.read(n) for n in names[::12]}


@pytest.fixture(scope="session")
def tree(photographs, tmp_path_factory) -> Path:
    """A folder of photographs in two classes: four for training and two for testing."""
    root = tmp_path_factory.mktemp("tree")
    content = list(photographs.values())
    for i, (split, label) in enumerate(
        [("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")]
    ):
        (root / split / label).mkdir(parents=True)
        for k in range(2 if split == "train" else 1):
            (root / split / label / f"{k}.JPEG").write_bytes(content[2 * i % 7 + k])
    return root


def prepared(tree: Path, to: Path, here, *more) -> Path:
    """Prepare photographs as shards of three, with the command."""
    here("data", "prepare", tree, "--output", to, "--shard", 3, *more)
    return to


@pytest.fixture
def full():
    """A function that limits the size of files, as on a full disk; without a size it lifts that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int = before[0]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit()


@pytest.fixture
def compiled_from(monkeypatch, tmp_path):
    """Have the operations recompiled: ``compiled_from(edits, flags)``, with edits (file, old text,
    new text) and further flags; they then run on three threads."""
    from resnetv2_cli import native

    def make(edits, flags):
        texts = {f.name: f.read_text() for f in (*native.HEADERS, *native.SOURCES)}
        for name, old, new in edits:
            assert old in texts[name]
            texts[name] = texts[name].replace(old, new)
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        for part in ("HEADERS", "SOURCES"):
            monkeypatch.setattr(native, part, [tmp_path / f.name for f in getattr(native, part)])
        monkeypatch.setattr(native, "FLAGS", ["-O1", *native.FLAGS[1:], *flags])
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        torch.set_num_threads(3)
        forget()

    def forget():
        for cached in (native._found, native.has, native.multiplies, native.lanes):
            cached.cache_clear()

    before = torch.get_num_threads()
    yield make
    forget()
    torch.set_num_threads(before)
