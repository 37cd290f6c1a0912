"""What is on disk: runs, ablations and analyses below some folders, and the state of each run."""

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from resnetv2_cli.ablation.arms import Ablation
from resnetv2_cli.ablation.record import read
from resnetv2_cli.errors import UserError, unknown
from resnetv2_cli.jsonfile import mapping
from resnetv2_cli.locks import taken
from resnetv2_cli.manifest import ORIGINS, READINGS, environment_in, own_code
from resnetv2_cli.paper import FAIL
from resnetv2_cli.recipes import read_yaml
from resnetv2_cli.runfolder import RUNS, RunFolder, read_metrics

FRESH = 1200.0  # seconds; a run that trains saves every ten minutes
SEED = re.compile(r"s\d+(/|$)")  # a seed's folder, inside that of its network
NAMED = "name runs, or folders that hold runs"
LIST = "resnetv2 runs ls shows what there is"


@dataclass(frozen=True)
class Run:
    """One run, as its folder was when first looked at: what is read is cached.

    ``name``: the path of its folder in the one that was searched; with folders above that, where
    another run has the same name or the name is only a seed's.
    """

    name: str
    folder: RunFolder

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of ``config.yaml``, unchecked: the run may be of another version."""
        try:
            return read_yaml(self.folder.config)
        except UserError:
            return {}

    @cached_property
    def result(self) -> dict[str, Any]:
        return self.folder.read_result()

    @cached_property
    def failure(self) -> dict[str, Any]:
        return self.folder.read_failure()

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Command, versions and hardware: at its end, or at its beginning if it has not ended."""
        return self.result.get("environment") or environment_in(mapping(self.folder.manifest.path))

    @cached_property
    def own_code(self) -> dict[str, str]:
        """Digests of the user's own code, by what it defines."""
        said = own_code(mapping(self.folder.manifest.path))
        return {f"code of the {what}": str(code.get("sha256"))[:12] for what, code in said.items()}

    @cached_property
    def series(self) -> dict[str, list[tuple[int, float]]]:
        """The columns of ``metrics.csv`` as (iteration, value) pairs; empty before the first."""
        return read_metrics(self.folder.metrics)

    @property
    def place(self) -> Path:
        return self.folder.path

    @property
    def step(self) -> int:
        """The last iteration in its metrics."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    @property
    def steps(self) -> int:
        """The planned number of iterations; 0 if its settings cannot be read."""
        steps = self.settings.get("steps", 0)
        return steps if isinstance(steps, int) else 0

    @property
    def scored(self) -> str:
        """What was evaluated during training: ``test``, or ``val``."""
        return "val" if "val_error" in self.series else "test"

    @cached_property
    def state(self) -> str:
        """``done``, ``fail`` (it diverged), ``crashed``, ``running``, ``stopped`` or ``waiting``
        (it has not begun)."""
        if self.result:
            return "done"
        if self.failure:
            return "fail" if self.failure["diverged"] else "crashed"
        if alive(self.folder):
            return "running"
        return "stopped" if self.folder.begun else "waiting"

    @property
    def ended(self) -> dict[str, Any]:
        """Its result, with the readings of the test set counted up to now."""
        read = mapping(self.folder.manifest.path).get(READINGS)
        return self.result | ({READINGS: read} if self.result and read is not None else {})

    @property
    def error(self) -> float | None:
        """Test error in percent if it is done, FAIL if it diverged."""
        if self.result:
            return float(self.result["test_error"])
        return FAIL if self.state == "fail" else None

    @property
    def changed(self) -> float:
        """When one of its files was last written, in seconds since 1970."""
        return newest(self.folder)


@dataclass(frozen=True)
class Analysis:
    """The output of ``analyze`` in a folder."""

    name: str
    folder: Path
    found: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what another version, or nobody, has left.

        Raises:
            UserError: it has no topics, or a network without a label.
        """
        topics, networks = (self.found.get(key) for key in ("topics", "networks"))
        labels = [n.get("label") if isinstance(n, dict) else None for n in networks or []]
        if not isinstance(topics, dict) or not labels or not all(labels):
            raise self.strange

    @property
    def strange(self) -> UserError:
        """The error for content that is not what it should be."""
        said = f"{self.folder / 'analysis.json'} is not what an analysis leaves"
        return UserError(said, "resnetv2 analyze writes it again")

    @property
    def place(self) -> Path:
        return self.folder


Named = TypeVar("Named", Run, Analysis)


@dataclass
class Found:
    """What was found below some folders; ``runs`` are those that belong to no ablation."""

    ablations: list[Ablation] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    analyses: list[Analysis] = field(default_factory=list)

    @cached_property
    def every(self) -> list[Run]:
        """All runs, each once: those of ablations first, in the order of their rows."""
        arms = {arm.folder: arm for a in self.ablations for line in a.lines for arm in line.arms}
        ours = [
            Run(str(folder.relative_to(folder.parent.parent)), arm.run)
            for folder, arm in arms.items()
        ]
        return told_apart([*ours, *self.runs])

    @property
    def open(self) -> bool:
        """Whether more is to come: a run is running, or runs are waiting and one has changed not
        long ago. If their ablation was stopped, waiting runs may never begin."""
        runs = self.every
        states = {run.state for run in runs}
        latest = max((run.changed for run in runs), default=0.0)
        return "running" in states or ("waiting" in states and time.time() - latest < FRESH)


def newest(folder: RunFolder) -> float:
    """When a file in a run's folder was last written, in seconds since 1970."""
    latest = 0.0
    for file in (folder.config, folder.metrics, folder.last, folder.result, folder.failed):
        with suppress(FileNotFoundError):  # it is not there, or was just removed
            latest = max(latest, file.stat().st_mtime)
    return latest


def alive(folder: RunFolder) -> bool:
    """Whether a run without a result is running: its folder is in use; or, where the filesystem has
    no locks, something in it was written not long ago."""
    held = locks(folder)
    return time.time() - newest(folder) < FRESH if None in held else any(held)


def locks(folder: RunFolder) -> list[bool | None]:
    """Whether a process works in a run's folder, and whether an ablation reserves it for one; None
    where the filesystem has no locks."""
    return [taken(lock) for lock in (folder.lock, folder.beside(".lock"))]


def look(paths: Iterable[Path]) -> Found:
    """Everything in and below some folders, each once.

    Raises:
        UserError: there is no such folder, or a file in it does not hold what its name says.
    """
    found = Found()
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise UserError(f"there is no folder {path}", NAMED)
        for folder in folders(path):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                add(found, folder, path)
    arms = {arm.folder.resolve() for a in found.ablations for line in a.lines for arm in line.arms}
    found.runs = [run for run in found.runs if run.folder.path.resolve() not in arms]
    found.runs, found.analyses = told_apart(found.runs), told_apart(found.analyses)
    return found


def told_apart(found: list[Named]) -> list[Named]:
    """The same, each with a unique name."""
    names = apart([one.name for one in found], [one.place for one in found], SEED.match)
    return [replace(one, name=name) for one, name in zip(found, names, strict=True)]


def apart(
    names: list[str], paths: list[Path], vague: Callable[[str], Any] = lambda name: False
) -> list[str]:
    """Make names unique, each of which is the end of its path: where several are equal, or one is
    ``vague``, like a seed that many networks have, put as many of its parent folders before it as
    that takes."""
    whole = [path.resolve().parts for path in paths]
    for _ in range(max(map(len, whole), default=0)):
        counted = Counter(names)
        names = [
            str(Path(*parts[-1 - len(Path(name).parts) :]))
            if counted[name] > 1 or vague(name)
            else name
            for name, parts in zip(names, whole, strict=True)
        ]
    return names


def folders(path: Path, seen: set[Path] | None = None) -> Iterable[Path]:
    """A folder and those below it, in order, each once; of those inside a run only its analyses.
    Symbolic links are followed last, after everything that is really here."""
    seen = set() if seen is None else seen
    links: list[Path] = []
    for here, below, _ in os.walk(path):
        place = Path(here)
        if place.resolve() in seen:
            below.clear()
            continue
        seen.add(place.resolve())
        if RunFolder(place).begun:
            below[:] = [name for name in below if name.startswith("analysis")]
        below.sort()
        links += [place / name for name in below if (place / name).is_symlink()]
        yield place
    for link in links:
        yield from folders(link, seen)


def add(found: Found, folder: Path, root: Path) -> None:
    """Add what one folder itself is or holds."""
    name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
    found.ablations += [read(file) for file in sorted(folder.glob("ablation-*.json"))]
    if (run := RunFolder(folder)).begun:
        found.runs.append(Run(name, run))
    if made := mapping(folder / "analysis.json"):
        found.analyses.append(Analysis(name, folder, made))


def runs_in(root: Path) -> list[Run]:
    """All runs below a folder, by name.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", "--root names the one that holds runs")
    return [
        Run(str(folder.relative_to(root)), run)
        for folder in folders(root)
        if folder != root and (run := RunFolder(folder)).begun
    ]


def matching(word: str, runs: list[Run]) -> list[Run]:
    """The runs that ``word`` may name: the one of this name, or all whose names begin like that,
    perhaps without the folders that they are in; or for ``last`` the one begun, or continued with a
    change, most recently."""
    if word == "last" and runs:
        return [max(runs, key=lambda run: run.folder.config.stat().st_mtime)]
    exact = [run for run in runs if run.name == word]
    return exact or [run for run in runs if any(t.startswith(word) for t in tails(run.name))]


def choose(word: str, runs: list[Run]) -> Run:
    """The run that ``word`` names: by its folder, or as the only one ``matching``.

    Raises:
        UserError: there is none, or several names begin like that.
    """
    if not word:  # as from an unset shell variable; every name begins with it
        raise UserError("the name of the run is empty", LIST)
    if (named := RunFolder(Path(word))).begun:
        return Run(str(named.path), named)
    if not runs:
        raise UserError(f"there is no run {word!r}, nor any other", "--root names their folder")
    fitting = matching(word, runs)
    if not fitting:
        known = [tail for run in runs for tail in tails(run.name)]
        close = unknown("run", word, known).hint
        raise UserError(f"unknown run {word!r}", close if "mean" in close else LIST)
    if len(fitting) > 1:
        names = ", ".join(run.name for run in fitting[:4]) + (", ..." if len(fitting) > 4 else "")
        raise UserError(f"{len(fitting)} runs begin with {word!r}", f"one of {names}")
    return fitting[0]


def refuse_in_use(runs: Iterable[Run]) -> None:
    """
    Raises:
        UserError: a process works in the folder of one of them, whatever the run's state.
    """
    for run in runs:
        if run.state == "running" or any(locks(run.folder)):
            raise UserError(f"{run.name} is running", "let it save and exit first: kill -TERM")


def remove(run: Run) -> None:
    """Remove a run's folder, and what an ablation keeps beside it: request, log and lock. If it is
    a symbolic link, remove both the link and its target.

    Raises:
        UserError: some of it cannot be removed.
    """
    try:
        shutil.rmtree(run.folder.path.resolve())
        if run.folder.path.is_symlink():
            run.folder.path.unlink()
        if run.folder.beside(".lock").exists():
            for suffix in (".yaml", ORIGINS, ".log", ".lock"):
                run.folder.beside(suffix).unlink(missing_ok=True)
    except OSError as error:  # inside a folder, ``filename`` is a bare name
        raise UserError(
            f"cannot remove {run.folder.path}: {Path(error.filename or '').name}: {error.strerror}",
            "is it writable, and yours? some of it may be gone",
        ) from None


def tails(name: str) -> list[str]:
    """``a/b/c``, ``b/c``, ``c``."""
    parts = name.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def places(words: Iterable[str], root: Path = RUNS) -> list[Path]:
    """The folders that words on the command line name: as paths, or as runs below ``root``.

    Raises:
        UserError: one names neither.
    """
    chosen = []
    for word in words:
        if Path(word).is_dir():
            chosen.append(Path(word))
        elif runs := runs_in(root) if root.is_dir() else []:
            chosen.append(choose(word, runs).folder.path)
        else:
            raise UserError(f"there is no folder {word}, nor a run in {root}", NAMED)
    return chosen
