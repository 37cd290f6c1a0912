"""The model card: what a file is, how it was made, and how good it is, in Markdown."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from resnetv2_cli.ablation.studies import identity
from resnetv2_cli.config import Experiment
from resnetv2_cli.data.catalog import DATASETS
from resnetv2_cli.errors import UserError
from resnetv2_cli.inventory import Run
from resnetv2_cli.runfolder import OTHERS, RunFolder
from resnetv2_cli.stats import Summary


@dataclass(frozen=True)
class Facts:
    """What a card is made from."""

    experiment: Experiment
    classes: tuple[str, ...]
    parameters: int
    step: int
    precise: int  # training images that BN's statistics were recomputed from; 0: they were not
    imported: dict[str, str]  # where the weights come from, if ``import`` made them
    run: Path | None  # the run's folder, if the checkpoint is in one
    file: str
    bytes: int
    sha256: str
    check: str
    preprocessing: str
    use: str


def made_of(folder: RunFolder) -> tuple[Any, dict[str, str]]:
    """What identifies a run, apart from its seed: its settings and the user's own code."""
    return identity(folder.experiment()), Run("", folder).own_code


def seeds(run: Path) -> dict[int, float]:
    """Seed -> test error in percent, of the run and of the runs in the same folder that differ from
    it in their seed alone."""
    own = RunFolder(run).read_result()
    found = {int(own["seed"]): float(own["test_error"])} if own else {}
    try:
        wanted = made_of(RunFolder(run))
    except UserError:  # it is of another version, so no other can be compared
        return found
    for other in sorted(run.absolute().parent.iterdir()):
        folder = RunFolder(other)
        result = folder.read_result()
        if not result or not folder.begun:
            continue
        try:
            same = made_of(folder) == wanted
        except UserError:  # a run of another version
            continue
        if same:  # if another run has the same seed, this one counts
            found.setdefault(int(result["seed"]), float(result["test_error"]))
    return found


def card(facts: Facts) -> str:
    """The card as a Markdown page, with the header that hubs read."""
    e, run = facts.experiment, Run("", RunFolder(facts.run)) if facts.run else None
    result = run.result if run else {}
    header = {
        "library_name": "resnetv2-cli",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "pytorch"],
        "datasets": [e.dataset],
        "metrics": ["test error"],
    }
    network = (
        f"ResNet-{e.depth}: {e.block_} blocks of {e.unit} units with {e.shortcut} shortcuts "
        f"(He, Zhang, Ren, Sun 2016, arXiv:1603.05027), {facts.parameters:,} parameters."
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {e.name}",
        network,
        "## Result",
        outcome(facts, result),
        "## Data",
        data(facts, result),
        "## Recipe",
        origin(facts.imported) if facts.imported else recipe(e),
        "## File",
        f"`{facts.file}`, {facts.bytes:,} bytes, SHA-256 `{facts.sha256}`. Compared with the "
        f"network that was trained, in float32: {facts.check}.",
        "## Use",
        f"{facts.preprocessing} The output is a logit for each class.",
        f"```python\n{facts.use}\n```",
        "## Trained with",
        made_by(run.environment if run else {}),
    ]
    page = "\n\n".join(parts) + "\n"
    return page.encode(errors="backslashreplace").decode()  # class names may not be valid text


def outcome(facts: Facts, result: dict[str, Any]) -> str:
    """The test error, with the spread over seeds if there are several."""
    if facts.run is None:
        return "Not known: the checkpoint lay in no run's folder."
    if not result:
        whole = facts.experiment.steps
        return (
            f"Not measured: the run has not ended; this is iteration {facts.step:,} of {whole:,}."
        )
    error, n = float(result["test_error"]), int(result["test_images"])
    measured = int(result.get("test_step", result["steps"]))
    if facts.step != measured or facts.precise:
        averages = f", with BN's statistics from {facts.precise:,} images" if facts.precise else ""
        return (
            f"Of this file, iteration {facts.step:,}{averages}: not measured. Of the run's "
            "headline, after "
            f"{measured:,} iterations: test error {error:.2f} % of {n:,} images."
        )
    lines = [f"Test error {error:.2f} % of {n:,} test images, after {facts.step:,} iterations."]
    if others := result.get(OTHERS):
        each = [f"{float(scores['error']):.2f} % by {way}" for way, scores in others.items()]
        lines = [
            f"{lines[0]} That is by protocol {facts.experiment.protocols[0]}; {', '.join(each)}."
        ]
    errors = seeds(facts.run)
    summary = Summary(tuple(errors.values()))
    if summary.n > 1 and summary.mean is not None:
        named = ", ".join(f"{seed}: {error:.2f}" for seed, error in sorted(errors.items()))
        lines.append(
            f"Over seeds: {summary.median:.2f} ({summary.mean:.2f}±{summary.std:.2f}) %, median "
            f"(mean±std), n = {summary.n} ({named})."
        )
    else:
        lines.append("One seed, n = 1: there is no spread to tell.")
    return " ".join(lines)


def data(facts: Facts, result: dict[str, Any]) -> str:
    """The training data and the classes."""
    e, names = facts.experiment, facts.classes
    some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    lines = [f"{e.dataset}: {DATASETS[e.dataset].doc}."]
    if result:
        lines.append(f"{result['train_images']:,} training images.")
    if result.get("data"):
        what = "pixels" if DATASETS[e.dataset].decoded else "the files' names"
        lines.append(f"SHA-256 of {what} and labels `{result['data']}`.")
    if e.weights_sha256:
        lines.append(f"It began with weights whose file has the SHA-256 `{e.weights_sha256}`.")
    return " ".join([*lines, f"{len(names)} classes: {some}."])


def recipe(e: Experiment) -> str:
    """Every setting that affects what is learned, as a file that ``--config`` reads.

    Engine settings only where they are not the default, and not the path of initial weights, which
    means nothing elsewhere.
    """
    panels = ("Network", "Data", "Optimization", "Fine-tuning")
    given = {}
    for f in fields(e):
        panel, value = f.metadata["panel"], getattr(e, f.name)
        told = panel in panels or (panel == "Engine" and value != f.default)
        # Photographs are normalized by ImageNet's mean and std, whatever this says.
        fixed = f.name == "normalize" and not DATASETS[e.dataset].decoded
        if told and not fixed and not f.metadata["free"] and value not in (None, ""):
            given[f.name] = value
    text = f"```yaml\n{yaml.safe_dump(given, sort_keys=False)}```"
    if e.weights_sha256:
        text += "\n\nIt needs `--weights FILE` beside it: the file with this `weights_sha256`."
    return text


def origin(imported: dict[str, str]) -> str:
    """Where imported weights come from; how they were trained is not known here."""
    named = ", ".join(f"{what} `{value}`" for what, value in imported.items())
    return f"Not known: the weights were imported, {named}."


def made_by(environment: dict[str, Any]) -> str:
    """Hardware and software versions of the training."""
    if not environment:
        return "Not known."
    versions = [f"{name} {v}" for name, v in environment.get("versions", {}).items()]
    parts = [environment.get("hardware", ""), f"Python {environment.get('python', '')}", *versions]
    if environment.get("commit"):
        parts.append(f"commit {environment['commit']}")
    return ", ".join(part for part in parts if part) + "."
