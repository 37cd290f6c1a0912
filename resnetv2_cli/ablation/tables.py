"""An ablation's results as rows of a table and as plain values, with their statistics."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from resnetv2_cli.ablation.arms import Ablation, Line
from resnetv2_cli.ablation.record import described, number
from resnetv2_cli.paper import FAIL, FAIL_ABOVE, Row, percent
from resnetv2_cli.quantities import NONE
from resnetv2_cli.stats import CONFIDENCE, MOST_SEEDS, Summary, seeds_needed


def table(ablation: Ablation, detect: float) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; a column that would be empty in every row is left out.

    ``detect``: the difference, in points, for which the needed number of seeds is given.
    """
    columns = {
        "row": lambda line: line.row.name,
        "paper, %": lambda line: published(line.row),
        "here, %": lambda line: measured(line),
        "n": lambda line: str(line.summary.n),
        "top-5: paper, %": lambda line: NONE if line.row.top5 is None else f"{line.row.top5:.2f}",
        "top-5: here, %": lambda line: top5(line),
        f"mean, {CONFIDENCE:.0%} interval": lambda line: interval(line.summary),
        "to paper": lambda line: to_paper(ablation, line),
        "to baseline": lambda line: to_baseline(ablation, line),
        "p": lambda line: p(ablation, line),
        "in the paper": lambda line: published_difference(ablation, line),
        f"seeds for {detect:g}": lambda line: seeds(ablation, line, detect),
    }
    cells = {name: [cell(line) for line in ablation.lines] for name, cell in columns.items()}
    kept = {
        name: column
        for name, column in cells.items()
        if name in ("row", "here, %", "n") or any(cell != NONE for cell in column)
    }
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def published(row: Row) -> str:
    """The paper's error, with mean±std where it gives them; a dash where it has no such row."""
    return percent(row.published) + (f" ({row.spread})" if row.spread else "")


def failed(line: Line) -> bool:
    """Whether the paper would print ``fail``: the median error is above 20 % where that limit
    applies (``ruled``), or infinite, as of runs that diverged."""
    median = line.summary.median
    return median is not None and (median == FAIL or (ruled(line) and median > FAIL_ABOVE))


def ruled(line: Line) -> bool:
    """Whether an error above 20 % is a ``fail``: only on CIFAR-10, after training in full. After
    less, most errors are that high, which means nothing; on other images the paper's own are."""
    return line.arms[0].experiment.dataset == "cifar10" and line.in_full


def measured(line: Line) -> str:
    """Median (mean±std), as in Table 4; after ``fail`` where the paper would print only that.

    If there is no error because runs crashed: why.
    """
    s = line.summary
    if s.median is None:
        return f"crashed: {line.failures[0]}" if line.failures else NONE
    crashes = sum(arm.crashed for arm in line.arms)
    crashed = f", {crashes} crashed" if crashes else ""
    if s.median == FAIL:
        finite = ", ".join(percent(error) for error in s.errors if error != FAIL)
        others = f"{s.diverged} of {s.n} diverged, else {finite}" if finite else "diverged"
        return f"fail ({others}{crashed})"
    spread = f"{s.mean:.2f}±{s.std:.2f}" if s.std is not None else ""
    if s.diverged:
        spread = f"{s.diverged} of {s.n} diverged"
    inside = (spread + crashed).removeprefix(", ")
    text = f"{s.median:.2f}" + (f" ({inside})" if inside else "")
    return f"fail: {text}" if failed(line) else text


def top5(line: Line) -> str:
    """Median (mean±std) of the top-5 errors."""
    s = Summary(tuple(line.top5.values()))
    if s.median is None:
        return NONE
    return f"{s.median:.2f}" + (f" ({s.mean:.2f}±{s.std:.2f})" if s.std is not None else "")


def interval(summary: Summary) -> str:
    """The confidence interval of the mean, clipped to possible errors: with two seeds, Student's t
    often reaches beyond them."""
    if summary.interval is None:
        return NONE
    low, high = summary.interval
    return f"{max(low, 0.0):.2f} to {min(high, 100.0):.2f}"


def difference(line: Line) -> float | None:
    """Median minus the published error, in points; None where either is missing or failed."""
    ours, theirs = line.summary.median, line.row.published
    if ours is None or theirs in (None, FAIL) or failed(line):
        return None
    return ours - theirs


def to_paper(ablation: Ablation, line: Line) -> str:
    """Median minus the published error, if both are of the same recipe."""
    points = difference(line) if ablation.comparable else None
    return NONE if points is None else f"{points:+.2f}"


def to_baseline(ablation: Ablation, line: Line) -> str:
    """Mean difference from the baseline over the seeds that both rows have, and the number of these
    if it differs from the row's; ``fail`` if the row's median is infinite."""
    pairs = ablation.pairs(line)
    if pairs.diverged and line.summary.median == FAIL:
        return "fail"
    if pairs.mean is None:
        return NONE
    return f"{pairs.mean:+.2f}" + (f" (n = {pairs.n})" if pairs.n != line.summary.n else "")


def p(ablation: Ablation, line: Line) -> str:
    """Probability of such a difference by seeds alone (paired t-test)."""
    value = ablation.pairs(line).p
    return NONE if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def published_difference(ablation: Ablation, line: Line) -> str:
    """The difference from the baseline between the paper's own errors."""
    baseline = ablation.line(line.row.baseline)
    if baseline is None:
        return NONE
    own, other = line.row.published, baseline.row.published
    if own == FAIL:
        return "fail"
    return NONE if own is None or other in (None, FAIL) else f"{own - other:+.2f}"


def seeds(ablation: Ablation, line: Line, detect: float) -> str:
    """The number of seeds that would show a true difference of ``detect`` points 8 times in 10."""
    std = ablation.pairs(line).std
    if std is None:
        return NONE
    needed = seeds_needed(std, detect)
    return f">{MOST_SEEDS:,}" if needed is None else f"{needed:,}"


def as_json(
    ablation: Ablation, detect: float, counts: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Everything in the table, and the settings, as plain values; ``counts``: further values for
    each row."""
    rows = [row_as_json(ablation, line, detect) for line in ablation.lines]
    return {
        "title": ablation.title,
        "scale": ablation.scale,
        "protocol": ablation.protocol,
        "comparable": ablation.comparable,
        "rows": [row | of_it for row, of_it in zip(rows, counts, strict=True)] if counts else rows,
    }


def row_as_json(ablation: Ablation, line: Line, detect: float) -> dict[str, Any]:
    """One row as plain values."""
    s, pairs = line.summary, ablation.pairs(line)
    return {
        **described(line.row),
        "top5": {
            "published": line.row.top5,
            "errors": {str(seed): error for seed, error in line.top5.items()},
        },
        "errors": {str(seed): number(error) for seed, error in line.errors.items()},
        "n": s.n,
        "median": number(s.median),
        "mean": s.mean,
        "std": s.std,
        "interval": s.interval,
        "fail": failed(line),
        "to_paper": difference(line) if ablation.comparable else None,
        "to_baseline": {
            "mean": pairs.mean,
            "std": pairs.std,
            "p": pairs.p,
            "pairs": pairs.n,
            "diverged": pairs.diverged,
        },
        "seeds_for": {
            "difference": detect,
            "seeds": None if pairs.std is None else seeds_needed(pairs.std, detect),
        },
        "failures": line.failures,
        "settings": asdict(line.arms[0].experiment),
        "runs": [str(arm.folder) for arm in line.arms],
    }
