"""What each run was, and where it ran: settings, results, hardware, versions."""

from statistics import median
from typing import Any

from resnetv2_cli.compare import flat, said, word
from resnetv2_cli.inventory import Run
from resnetv2_cli.paper import FAIL
from resnetv2_cli.runfolder import STATES, read_metrics
from resnetv2_cli.settings import flag_name


def in_common(runs: list[Run]) -> dict[str, Any]:
    """The settings that all runs that have begun agree on."""
    begun = [run.settings for run in runs if run.settings]
    if not begun:
        return {}
    return {k: v for k, v in begun[0].items() if all(k in s and s[k] == v for s in begun)}


def described(run: Run, shared: dict[str, Any]) -> dict[str, Any]:
    """A run in three lists: its own settings, its results, where it ran."""
    own = {k: v for k, v in run.settings.items() if k not in shared}
    rate = rate_of(run)
    places = [*([("images a second", f"{rate:,.0f}")] if rate else [])]
    places += [(key, word(value)) for key, value in flat(run.environment).items()]
    error = run.error
    return {
        "name": run.name,
        "state": run.state,
        "says": STATES[run.state],
        "step": run.step,
        "steps": run.steps,
        "error": "" if error is None or error == FAIL else f"{error:.2f} %",
        "reason": run.failure.get("reason", ""),
        "settings": [*((flag_name(k), word(v)) for k, v in own.items()), *run.own_code.items()],
        "results": said(run.result),
        "environment": places,
    }


def rate_of(run: Run) -> float | None:
    """Training images a second: the median of the logged rates."""
    points = read_metrics(run.folder.speed).get("images_per_second")
    return median(rate for _, rate in points) if points else None
