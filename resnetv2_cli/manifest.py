"""A run's provenance: code, versions, hardware, settings and where each came from, data, seeds, how
often the test set was read, and every time it was continued."""

import hashlib
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resnetv2_cli import __version__, jsonfile
from resnetv2_cli.config import Experiment
from resnetv2_cli.errors import UserError
from resnetv2_cli.locks import in_turn
from resnetv2_cli.plans import OWN

if TYPE_CHECKING:  # code that only reads manifests does not wait for its import
    import torch

PACKAGES = ["resnetv2-cli", "torch", "torchvision", "lightning", "torchmetrics", "numpy"]
ENVIRONMENT = ("command", "python", "versions", "commit", "hardware", "cpu_threads", "system")
LONGEST_DIFF = 2**16  # characters; a longer diff is not kept
PACKAGE = Path(__file__).parent
SOURCE = (".py", ".c", ".h")  # what affects the numbers: on a CPU, also kernels in C
READINGS = "test_set_readings"  # how often the test set was read
ORIGINS = ".origins.json"  # suffix of the file of origins beside a config that an ablation wrote


class Manifest:
    """``manifest.json`` of a run's folder; it is only ever added to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Its content; empty if there is none.

        Raises:
            UserError: the file is no longer a manifest.
        """
        said = jsonfile.mapping(self.path)
        if not said and self.path.exists():
            hint = "restore what the run wrote, or remove it and do without its record"
            raise UserError(f"{self.path} is not the manifest of a run", hint)
        return said

    def extensions(self) -> list[dict[str, Any]]:
        """What ``resume.extend`` returned each time the run was trained longer."""
        return [r["extended"] for r in self.read().get("resumes", []) if r.get("extended")]

    def lengths(self) -> list[int]:
        """The number of iterations that the run was extended to, each time."""
        changes = [r.get("changed", {}) for r in self.read().get("resumes", [])]
        return [changed["steps"] for changed in changes if "steps" in changed]

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """Its content, to be changed in place; it is then written back. Another process, such as an
        evaluation while the run trains, waits for its turn.

        Raises:
            OSError: it cannot be written.
        """
        with in_turn(self.path.parent):
            said = self.read()
            yield said
            jsonfile.write(self.path, said)

    def count_reading(self) -> None:
        """Count one more reading of the test set.

        Raises:
            OSError: it cannot be written.
        """
        with self.change() as said:
            said[READINGS] = said.get(READINGS, 0) + 1

    def add_resume(self, step: int, changed: dict[str, Any], extended: dict[str, Any]) -> None:
        """Record that the run continues after iteration ``step``, with these settings changed.
        ``extended``: as ``resume.extend`` returns it.

        Raises:
            OSError: it cannot be written.
        """
        entry = {"time": now(), "step": step, "host": socket.gethostname(), "command": command()}
        with self.change() as said:
            resumes = said.setdefault("resumes", [])
            resumes.append(entry | {"changed": changed, "extended": extended})


def environment_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest that ``environment`` made, of where its run began."""
    return {key: manifest[key] for key in ENVIRONMENT if key in manifest}


def origins(path: Path | str | None, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Where each setting that is not a default came from, given the arguments of
    ``Experiment.load``.

    An ablation saves the origins of a config's settings beside the config.
    """
    asked = Experiment.asked(path, overrides)
    given = dict.fromkeys(asked, f"file {path}")
    beside = Path(path).with_suffix(ORIGINS) if path else None
    if beside and beside.is_file():
        given = {k: str(origin) for k, origin in jsonfile.mapping(beside).items()} or given
        for one, other in (("epochs", "steps"), ("steps", "epochs")):
            if one in overrides:
                given.pop(other, None)
    found = given | dict.fromkeys(overrides, "flag")
    return ({"weights_sha256": "the file of weights"} if "weights" in found else {}) | found


def annotated(experiment: Experiment, origins: Mapping[str, str]) -> str:
    """The experiment as YAML, with a comment after each value that is not a default: its origin."""
    notes = {name: f"  # {origin}" for name, origin in origins.items()}
    if experiment.epochs is not None:
        notes["steps"] = "  # not used: epochs say how long"
    made = []
    for name, value in asdict(experiment).items():
        text = yaml.safe_dump({name: value}, width=math.inf).removesuffix("\n")
        made.append(text if "\n" in text else text + notes.get(name, ""))
    return "\n".join(made) + "\n"


def begun(
    given: Experiment,
    settled: Experiment,
    devices: "Sequence[torch.device]",
    origins: dict[str, str],
    data: dict[str, Any],
) -> dict[str, Any]:
    """The content of a manifest when its run begins.

    ``given``: the experiment that ``settled`` was made from. ``devices``: those it trains on.
    ``origins``: where settings that are not defaults came from. ``data``: facts about the images.
    """
    origins = dict(origins)
    if given.epochs is not None:
        origins["steps"] = f"{given.epochs:g} epochs, {origins.pop('epochs', 'default')}"
    if given.precision == "auto":
        origins["precision"] = "auto, by the hardware"
    made = {"block": settled.block_, "stem": settled.stem_, "warmup": settled.warmup_}
    follows = {k: v for k, v in made.items() if getattr(settled, k) is None}
    origins |= dict.fromkeys(follows, "follows from the others")
    values = asdict(settled) | follows
    return {
        "begun": now(),
        "host": socket.gethostname(),
        **environment(devices),
        "code": code(settled),
        "settings": {k: {"value": v, "from": origins.get(k, "default")} for k, v in values.items()},
        "data": data,
        "seeds": {
            "weights": settled.seed,
            "order, crops and flips": "(seed, epoch)",
            "draws of an iteration": "(seed, iteration, micro-batch, process)",
        },
        READINGS: 0,
        "resumes": [],
    }


def now() -> str:
    """The time, with its zone."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def command() -> str:
    """The command line, quoted so that it can be typed again."""
    name = Path(sys.argv[0]).name
    started = ["python", "-m", "resnetv2_cli"] if name == "__main__.py" else [name]
    return shlex.join([*started, *sys.argv[1:]])


def code(experiment: Experiment) -> dict[str, Any]:
    """The version; for a checkout, its commit and the changes since; digests of the source that
    ran, and of the files of the user's own code."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in SOURCE):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    at = commit()
    diff = git("diff", "HEAD", "--", ".") if at else ""
    made: dict[str, Any] = {
        "version": __version__,
        "commit": at,
        "source_sha256": digest.hexdigest(),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "diff": diff if len(diff) <= LONGEST_DIFF else f"{len(diff)} characters, not kept",
    }
    for what, files in own_files(experiment).items():
        with tokenize.open(files[0]) as source:
            text = source.read()
        made[what] = {"file": str(files[0]), "sha256": digest_of(files), "source": text}
        made[what] |= {"with": [str(file) for file in files[1:]]} if files[1:] else {}
    return made


def own_files(experiment: Experiment) -> dict[str, list[Path]]:
    """The files of the unit and of the shortcut, where they are the user's own: the file of the
    class, and those beside it that it imports.

    Raises:
        UserError: there is no such class, or it cannot be used.
    """
    if not experiment.own:
        return {}
    from resnetv2_cli.own import files
    from resnetv2_cli.shortcuts import shortcut_class
    from resnetv2_cli.units import refuse_broken, unit_class

    refuse_broken(experiment.unit, experiment.block_, experiment.stem_)
    classes = {"unit": unit_class, "shortcut": shortcut_class}
    return {what: files(classes[what](name)) for what, name in experiment.own.items()}


def content(files: list[Path]) -> bytes:
    """The concatenated contents of files."""
    return b"".join(file.read_bytes() for file in files)


def digest_of(files: list[Path]) -> str:
    """The SHA-256 of the concatenated contents of files."""
    return hashlib.sha256(content(files)).hexdigest()


def own_code(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest on the user's own code: of the unit, of the shortcut."""
    said = manifest.get("code")
    code = said if isinstance(said, dict) else {}
    return {what: code[what] for what in OWN if isinstance(code.get(what), dict)}


def rewritten(experiment: Experiment, manifest: Mapping[str, Any]) -> list[str]:
    """The user's own code, ``module:Class``, that has changed since a run began."""
    before, changed = own_code(manifest), []
    for what, files in own_files(experiment).items():
        if said := before.get(what):
            now = digest_of(files if "with" in said else files[:1])
            changed += [experiment.own[what]] if said.get("sha256") != now else []
    return changed


def environment(devices: "Sequence[torch.device]" = ()) -> dict[str, Any]:
    """Command, versions, hardware and commit: the provenance reported with a number.

    ``devices``: those it was computed on; without any, the CPU.
    """
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": command(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "hardware": hardware(devices),
        "cpu_threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def hardware(devices: "Sequence[torch.device]") -> str:
    """``1 x NVIDIA H100``, or the processor and its cores where none of them is a GPU."""
    import torch

    gpus = Counter(torch.cuda.get_device_name(d) for d in devices if d.type == "cuda")
    if gpus:
        return ", ".join(f"{number} x {name}" for name, number in gpus.items())
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores, {name}"


def git(*arguments: str) -> str:
    """The output of git in this package's own checkout; empty if it is in none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments],
            capture_output=True, text=True, errors="replace", timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def commit() -> str:
    """The commit of this package's own checkout, ``+`` if changed since; empty outside of one."""
    if not git("ls-files", "__init__.py"):  # installed inside a checkout of something else
        return ""
    changed = git("status", "--porcelain", "-uno", ".").strip()
    return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
