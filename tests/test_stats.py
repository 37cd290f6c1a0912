"""Means, spreads and tests over seeds."""

import pytest
from conftest import ended, two_rows

from resnetv2_cli.ablation import tables
from resnetv2_cli.paper import FAIL
from resnetv2_cli.quantities import NONE
from resnetv2_cli.stats import Pairs, Summary, power, seeds_needed


def test_statistics():
    """Computed by hand: t is 4.3027 for two degrees of freedom."""
    low, high = Summary((6.0, 7.0, 8.0)).interval
    assert (low, high) == pytest.approx((7 - 4.3027 / 3**0.5, 7 + 4.3027 / 3**0.5), rel=1e-4)
    pairs = Pairs.of({0: 7.0, 1: 9.0, 2: 8.0}, {0: 6.0, 1: 7.0, 2: 7.0})
    assert pairs.differences == (1.0, 2.0, 1.0)
    assert pairs.p == pytest.approx(0.0572, abs=1e-3)
    assert seeds_needed(1.0, 1.0) == 10  # the textbook's n for an effect of one std
    assert seeds_needed(16.5, 0.5) == 8550  # 8548 by the normal: (1.96 + 0.8416)^2 (16.5 / 0.5)^2
    assert seeds_needed(20.0, 0.5) is None


@pytest.mark.parametrize(
    "errors, said",
    [
        ((6.4, 90.0), "0.00 to 100.00"),
        ((83.06, 89.72), "44.08 to 100.00"),  # 86.39 -+ 12.706 * 3.33
        ((0.2, 0.4), "0.00 to 1.57"),
        ((6.0, 7.0, 9.0), "3.54 to 11.13"),
        ((6.4,), NONE),
    ],
)
def test_an_interval_of_errors_ends_where_errors_do(errors, said):
    """In tables. Programs get it unclipped, symmetric about the mean."""
    summary = Summary(errors)
    assert tables.interval(summary) == said
    if len(errors) > 1:
        assert sum(summary.interval) / 2 == pytest.approx(summary.mean)


def test_a_seed_that_diverged_in_either_row_leaves_no_difference():
    """A mean of the remaining seeds would flatter the row that lost some."""
    ours, theirs = {0: 1.0, 1: FAIL, 2: 2.0, 3: 3.0}, {0: FAIL, 1: 1.0, 2: 1.5, 3: 1.8, 4: 1.0}
    pairs = Pairs.of(ours, theirs)
    assert pairs.differences == pytest.approx((0.5, 1.2))
    assert (pairs.n, pairs.diverged) == (2, 2)
    assert (pairs.mean, pairs.std, pairs.p) == (None, None, None)
    assert Pairs.of({0: FAIL}, {0: FAIL}) == Pairs((), 1)


@pytest.mark.parametrize(
    "baseline, row, said, pairs",
    [
        ((6.5, 6.7, 6.6, 6.6), (FAIL, FAIL, 6.2, 6.1), ["fail", NONE, NONE], (None, 2, 2)),
        ((6.5, 6.7, 6.6, 6.6), (FAIL, 6.3, 6.2, 6.1), [NONE, NONE, NONE], (None, 3, 1)),
        ((6.5, 6.7, FAIL, 6.6), (6.4, 6.3, 6.2, 6.1), [NONE, NONE, NONE], (None, 3, 1)),
        ((6.5, 6.7), (6.4, 6.3, 6.2, 6.1), ["-0.25 (n = 2)", "0.344", "4"], (-0.25, 2, 0)),
        ((), (FAIL,), [], (None, 0, 0)),  # no seed has a baseline, and the columns are left out
    ],
)
def test_a_row_that_failed_is_not_ahead_of_its_baseline(tmp_path, baseline, row, said, pairs):
    """Its surviving seeds would put it ahead. A difference has its number of seeds next to it where
    that is not all of the row's."""
    planned = two_rows(tmp_path, 4)
    ended(planned, baseline, row)
    columns, [_, cells] = tables.table(planned, 0.5)
    shown = dict(zip(columns, cells, strict=True))
    names = ["to baseline", "p", "seeds for 0.5"]
    assert [shown.get(name, NONE) for name in names] == (said or [NONE] * 3)
    found = tables.as_json(planned, 0.5)["rows"][1]["to_baseline"]
    mean = found["mean"] and round(found["mean"], 9)
    assert (mean, found["pairs"], found["diverged"]) == pairs


@pytest.mark.parametrize("std, n, seen", [(0.085, 2, 0.486), (0.089, 3, 0.991), (0.01, 2, 1.0)])
def test_the_power_of_few_seeds_and_a_large_difference(std, n, seen):
    """From the integral over the chi distribution, where SciPy's noncentral t gives NaN."""
    assert power(n, std, 0.5) == pytest.approx(seen, abs=1e-3)
    assert power(n, std, -0.5) == power(n, std, 0.5)


def test_more_seeds_than_anybody_runs_are_not_counted(tmp_path):
    planned = two_rows(tmp_path, 2)
    ended(planned, (6.0, 7.0), (6.0, 47.0))
    columns, [_, conv1x1] = tables.table(planned, 0.5)
    assert dict(zip(columns, conv1x1, strict=True))["seeds for 0.5"] == ">10,000"
    assert tables.as_json(planned, 0.5)["rows"][1]["seeds_for"]["seeds"] is None


def test_differences_that_are_all_the_same_say_nothing_of_chance():
    """One image of 360 is 0.28 points: with two seeds, both differences are often the same number
    of images."""
    pairs = Pairs.of({0: 100 * 4 / 360, 1: 100 * 5 / 360}, {0: 100 * 5 / 360, 1: 100 * 6 / 360})
    assert pairs.mean == pytest.approx(-100 / 360)
    assert (pairs.std, pairs.p) == (None, None)
    assert Pairs.of({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p is None
