"""What a continued run may change, to what effect, and what is refused: nothing is ignored."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from resnetv2_cli.config import Experiment
from resnetv2_cli.data.module import ImageData
from resnetv2_cli.errors import UserError
from resnetv2_cli.machine import processes
from resnetv2_cli.optim import lr_factor
from resnetv2_cli.runfolder import OTHERS, RunFolder
from resnetv2_cli.settings import checked, flag_name
from resnetv2_cli.telling import Tell


@dataclass(frozen=True)
class Change:
    """One setting whose value changes when a run is continued, and the effect of that."""

    name: str
    before: Any
    after: Any
    effect: str

    def __str__(self) -> str:
        return f"{flag_name(self.name)}: {self.before} -> {self.after}: {self.effect}"


def continued(folder: RunFolder, given: dict[str, Any]) -> tuple[Experiment, list[Change]]:
    """The saved experiment with the ``given`` settings that may change, and a list of the changes.

    Raises:
        UserError: a flag would make it another experiment, the run diverged and no setting
            changes, or the folder is not that of a run.
    """
    saved = folder.experiment()
    known = {f.name: f for f in fields(Experiment)}
    wished = {name: checked(known[name], value) for name, value in given.items()}
    if wished.get("precision") == "auto":
        del wished["precision"]  # it was settled when the run began
    for name in ("epochs", "weights_sha256"):  # null in a config file that has every setting
        if wished.get(name) is None:
            wished.pop(name, None)
    changes = []
    for name, value in wished.items():
        if name in ("steps", "epochs") or value == getattr(saved, name):
            continue
        effect = known[name].metadata["free"]
        if not effect or (name == "weights" and not same_weights(saved, value)):
            flag = flag_name(name)
            raise UserError(
                f"{flag} {value} would make this another experiment: "
                f"it was begun with {getattr(saved, name)}",
                f"leave {flag} out, or start a new run",
            )
        changes.append(Change(name, getattr(saved, name), value, effect))
    changed = replace(saved, **{c.name: c.after for c in changes})
    if "steps" in wished or "epochs" in wished:
        steps = longer(folder, changed, wished)  # of ``changed``: its images may have moved
        if steps != saved.steps:
            effect = f"the schedule is that of {steps:,} iterations from here on"
            changes.insert(0, Change("steps", saved.steps, steps, effect))
            changed = replace(changed, steps=steps)
    if folder.diverged and not changes:
        raise UserError(
            f"{folder.path} diverged: {folder.diverged}",
            "it would again: start a new run with another setting; to try the same once more, "
            f"remove {folder.failed.name}",
        )
    return changed, changes


def same_weights(saved: Experiment, weights: str | None) -> bool:
    """Whether a file of weights has the same bytes as the one that a run was begun with."""
    other = replace(saved, weights=weights, weights_sha256=None, freeze="")
    return other.weights_sha256 == saved.weights_sha256


def longer(folder: RunFolder, saved: Experiment, wished: dict[str, Any]) -> int:
    """The number of iterations asked for.

    Raises:
        UserError: it is smaller than the run's.
    """
    steps = wished.get("steps", saved.steps)
    if "epochs" in wished:
        data = ImageData(saved, processes=processes(saved))
        data.setup()
        steps = replace(saved, epochs=wished["epochs"]).settle(data.steps_per_epoch).steps
    if steps < saved.steps:
        since = "was extended to" if folder.manifest.lengths() else "was begun with"
        raise UserError(
            f"{steps:,} iterations are fewer than the {saved.steps:,} the run {since}",
            "leave --steps and --epochs out: the run has followed the schedule of the longer "
            "training; to end it early, use --time",
        )
    return steps


def finished(folder: RunFolder, experiment: Experiment) -> dict[str, Any] | None:
    """The result of a run that has nothing left to train or to test, else None."""
    result = folder.read_result()
    tested = {*experiment.protocols[1:]} <= {*result.get(OTHERS, {})}
    return result if tested and result.get("steps", -1) >= experiment.steps else None


def same_run(
    path: Path, held: dict[str, Any], experiment: Experiment, digest: str, lengths: list[int]
) -> None:
    """Refuse a checkpoint of an experiment other than the one in the folder's ``config.yaml``.

    ``lengths``: the numbers of iterations that the run was extended to; a checkpoint from before an
    extension has a smaller one.

    Raises:
        UserError: it is of another experiment, of another length, or of other images.
    """
    ours, hint = asdict(experiment), "put config.yaml back as it was, or start a new run"
    for f in fields(Experiment):
        theirs = held["experiment"].get(f.name, ours[f.name])
        extended = f.name == "steps" and theirs < ours["steps"] and ours["steps"] in lengths
        if theirs != ours[f.name] and not f.metadata["free"] and not extended:
            raise UserError(f"{path}: its {f.name} is {theirs}, not {ours[f.name]}", hint)
    if held.get("data", digest) != digest:
        raise UserError(
            f"the images are not those that {path} was trained on",
            "check --data-dir; a run is continued with the same images",
        )


def extend(
    saved: Experiment,
    experiment: Experiment,
    step: int,
    before: list[dict[str, Any]],
    tell: Tell,
) -> dict[str, Any]:
    """Report, and return for the result, whether a run extended at ``step`` has one schedule.

    The learning rates so far were those of shorter schedules: of ``saved``, and of the extensions
    ``before``, as returned here. Only if the longer schedule has the same rates up to ``step`` is
    the run the same as one that was this long from its start.
    """
    if saved.steps == experiment.steps:
        return {}
    differ, begun = [], 0
    for plan in [*before, {"from_steps": saved.steps, "at": step}]:
        planned = replace(saved, steps=plan["from_steps"])
        differ += [
            (s, planned.steps)
            for s in range(begun, plan["at"])
            if lr_factor(planned, s) != lr_factor(experiment, s)
        ]
        begun = plan["at"]
    if not differ:
        tell(f"its learning rates so far are those of {experiment.steps:,} iterations too: one run")
    else:
        shorter = list(dict.fromkeys(f"{steps:,}" for _, steps in differ))
        named = f"the schedule{'s' if len(shorter) > 1 else ''} of {', '.join(shorter)}"
        tell(
            f"not one run of {experiment.steps:,} iterations: {differ[0][0] + 1:,} to "
            f"{differ[-1][0] + 1:,} had learning rates of {named}; the result says so"
        )
    return {"from_steps": saved.steps, "at": step, "one_schedule": not differ}
