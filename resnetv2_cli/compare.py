"""Two runs side by side: what differs between them, and by how much their results differ."""

from collections.abc import Mapping
from typing import Any

from resnetv2_cli.inventory import Run
from resnetv2_cli.jsonfile import is_number
from resnetv2_cli.quantities import NONE, TOP
from resnetv2_cli.runfolder import OTHERS

RESULTS = {  # of result.json, with their units
    "test_error": "%",
    "test_top5_error": "%",
    "test_loss": "nats",
    "train_loss": "nats",
    "train_error": "%",
}
FACTS = ("test_images", "train_images", "parameters", "precision", "data")  # of result.json too


def compare(a: Run, b: Run) -> dict[str, Any]:
    """``settings``, ``environment`` and ``facts`` that differ, as [of a, of b]; ``results``, as
    [of a, of b, b - a]; ``curves``: for each column of both metrics files, how far they agree."""
    return {
        "runs": [a.name, b.name],
        "states": [a.state, b.state],
        "settings": differing(a.settings, b.settings),
        "environment": differing(flat(a.environment), flat(b.environment)),
        "facts": differing(*({k: r.result.get(k) for k in FACTS} | r.own_code for r in (a, b))),
        "results": results(a, b),
        "curves": {
            name: agreement(a.series[name], b.series[name])
            for name in a.series
            if name in b.series and name not in ("epoch", "lr")
        },
    }


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    """The keys whose values differ, in order; None for a missing value."""
    return {k: [a.get(k), b.get(k)] for k in {**a, **b} if a.get(k) != b.get(k)}


def flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    """``{"versions": {"torch": 1}}`` as ``{"versions.torch": 1}``."""
    found: dict[str, Any] = {}
    for key, inside in value.items():
        found |= (
            flat(inside, f"{before}{key}.") if isinstance(inside, dict) else {before + key: inside}
        )
    return found


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """The RESULTS in a run's result, and its scores by other protocols; without the top-5 error if
    there are too few classes for one."""
    few = result.get("classes", TOP + 1) <= TOP
    found = {key: result[key] for key in RESULTS if key in result}
    found |= flat({OTHERS: result.get(OTHERS, {})})
    return {k: v for k, v in found.items() if not (few and k.endswith("top5_error"))}


def said(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything in a result except where it ran: measured values with their units, and the rest as
    it is."""
    errors = measured(result)
    others = {k: v for k, v in result.items() if k not in ("environment", "name", OTHERS, *RESULTS)}
    found = [(headed(key), number(value)) for key, value in errors.items()]
    return found + [
        (key, f"{value:,}" if type(value) is int else word(value))
        for key, value in others.items()
        if value != []
    ]


def headed(key: str) -> str:
    """The key of a number in a result, with its unit."""
    unit = RESULTS.get(f"test_{key.rpartition('.')[2]}" if key.startswith(OTHERS) else key)
    return f"{key}, {unit}" if unit else key


def results(a: Run, b: Run) -> dict[str, list[float | None]]:
    """What was measured at the end of both runs, and b - a; None if missing."""
    found = {}
    of_a, of_b = measured(a.result), measured(b.result)
    for key in dict.fromkeys([*RESULTS, *of_a, *of_b]):
        ours, theirs = of_a.get(key), of_b.get(key)
        apart = theirs - ours if is_number(ours) and is_number(theirs) else None
        found[key] = [ours, theirs, apart]
    return found


def agreement(a: list[tuple[int, float]], b: list[tuple[int, float]]) -> dict[str, Any]:
    """``points``: iterations that both have; ``equal``: how many of these agree to the last digit
    kept before the first that does not; ``first``: the iteration of that one; ``largest``: the
    largest difference b - a that is a number, and ``at``: its iteration.

    Values that are NaN in both agree.
    """
    theirs = dict(b)
    both = [(step, value, theirs[step]) for step, value in a if step in theirs]
    apart = [i for i, (_, x, y) in enumerate(both) if x != y and (x == x or y == y)]
    found = [(step, y - x) for step, x, y in both if y - x == y - x]
    at, largest = max(found, key=lambda pair: abs(pair[1]), default=(None, None))
    return {
        "points": len(both),
        "equal": apart[0] if apart else len(both),
        "first": both[apart[0]][0] if apart else None,
        "largest": largest,
        "at": at,
    }


def rows(made: dict[str, Any]) -> list[list[str]]:
    """Everything that differs, a line each: what, of a, of b, b - a."""
    found = [
        [key, word(a), word(b), ""]
        for part in ("settings", "environment", "facts")
        for key, (a, b) in made[part].items()
    ]
    for key, (a, b, difference) in made["results"].items():
        if a is not None or b is not None:
            found.append([headed(key), number(a), number(b), number(difference, "+")])
    return found


def notes(made: dict[str, Any]) -> list[str]:
    """A sentence about each curve that both runs have."""
    lines = []
    for name, c in made["curves"].items():
        if not c["points"]:
            lines.append(f"{name}: no iteration in common")
        elif c["first"] is None:
            lines.append(f"{name}: the same at all {c['points']:,} iterations that both have")
        else:
            before = f"the same at the first {c['equal']:,} of {c['points']:,} iterations, "
            start = (before if c["equal"] else "") + f"different from {c['first']:,} on"
            most = (
                f"; largest difference {c['largest']:+.4g}, at {c['at']:,}" if c["largest"] else ""
            )
            lines.append(f"{name}: {start}{most}")
    return lines


def word(value: Any) -> str:
    """A value for a table."""
    return NONE if value is None else str(value)


def number(value: Any, sign: str = "") -> str:
    """A number with four decimals; a dash if it is not a number."""
    return f"{value:{sign}.4f}" if is_number(value) else NONE
