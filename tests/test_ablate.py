"""Ablations: which rows, which settings, what is run again and how it is summed up."""

import json

import pytest

from resnetv2_cli.ablation import arms, studies
from resnetv2_cli.errors import UserError
from resnetv2_cli.paper import TABLE_1
from resnetv2_cli.stats import Pairs, Summary, seeds_needed

TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 128, "--steps", 4, "--log-every", 2]


def names(**given) -> list[str]:
    return [row.name for study in studies.studies(**given) for row in study.table.rows]


def test_the_rows_that_concern_it_and_the_baseline():
    assert names(shortcut="conv1x1") == ["identity", "conv1x1"]
    assert names(shortcut="mine:Own") == ["identity", "mine:Own"]
    assert names(tables=[1]) == [row.name for row in TABLE_1.rows]
    assert names(grid=["depth=8,14", "shortcut=identity"]) == [
        "depth=8 shortcut=identity",
        "depth=14 shortcut=identity",
    ]


def test_one_thing_is_ablated_at_a_time():
    with pytest.raises(UserError, match="ablate what"):
        studies.studies(tables=[1], shortcut="dropout")
    with pytest.raises(UserError, match="no Table 6"):
        studies.studies(tables=[6])


def test_seeds_are_the_same_in_all_rows_and_flags_win(tmp_path):
    [study] = studies.studies(tables=[1])
    made = arms.plan(study, 3, {"depth": 20, "seed": 5}, tmp_path)
    for line in made.lines:
        assert [arm.experiment.seed for arm in line.arms] == [5, 6, 7]
        assert all(arm.experiment.depth == 20 for arm in line.arms)
    assert len({arm.folder for line in made.lines for arm in line.arms}) == 33


def test_statistics():
    """Worked by hand: t of two degrees of freedom is 4.3027."""
    low, high = Summary((6.0, 7.0, 8.0)).interval
    assert (low, high) == pytest.approx((7 - 4.3027 / 3**0.5, 7 + 4.3027 / 3**0.5), rel=1e-4)
    pairs = Pairs.of({0: 7.0, 1: 9.0, 2: 8.0}, {0: 6.0, 1: 7.0, 2: 7.0})
    assert pairs.differences == (1.0, 2.0, 1.0)
    assert pairs.p == pytest.approx(0.0572, abs=1e-3)
    assert seeds_needed(1.0, 1.0) == 10  # the textbook's n for an effect of one std


def test_an_ablation_runs_and_never_runs_a_row_again(resnetv2, tmp_path):
    command = ["ablate", "--shortcut", "conv1x1", *TINY, "--output", tmp_path / "a"]
    [made] = json.loads(resnetv2(*command, "--format", "json").stdout)
    assert [(row["name"], row["n"]) for row in made["rows"]] == [("identity", 1), ("conv1x1", 1)]
    results = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("result.json")}
    assert len(results) == 2
    again = resnetv2(*command)
    assert again.stderr.count("done before") == 2
    assert {p: p.stat().st_mtime_ns for p in results} == results
