"""Ablations: which rows, which settings, what is run again and how it is summed up."""

import json

import pytest

from resnetv2_cli import ablate
from resnetv2_cli.errors import UserError
from resnetv2_cli.paper import FAIL, TABLE_1, Row

TINY = ["--dataset", "digits", "--depth", 8, "--batch-size", 128, "--steps", 4, "--log-every", 2]


def line(tmp_path, errors, published=6.61) -> ablate.Line:
    arms = []
    for seed, error in enumerate(errors):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        if error == FAIL:
            (folder / "failed.json").write_text("{}")
        elif error is not None:
            (folder / "result.json").write_text(json.dumps({"test_error": error}))
        arms.append(ablate.Arm("row", None, folder))
    return ablate.Line(Row("row", published, {}), arms)


@pytest.mark.parametrize(
    "errors, measured, difference",
    [
        ([6.5, 6.9, 7.0], "6.90 (6.80±0.26)", "+0.29"),
        ([6.5], "6.50", "-0.11"),
        ([None], "—", "—"),
        ([25.0], "fail (25.00)", "—"),
        ([FAIL], "fail (diverged)", "—"),
        ([6.0, FAIL, FAIL], "fail (diverged)", "—"),
        ([6.0, FAIL, 6.4], "6.40 (1 of 3 diverged)", "-0.21"),
    ],
)
def test_a_row_is_median_mean_and_spread(tmp_path, errors, measured, difference):
    row = line(tmp_path, errors)
    assert (row.measured, row.difference) == (measured, difference)


def test_nothing_is_compared_with_a_published_fail(tmp_path):
    assert line(tmp_path, [12.0], published=FAIL).difference == "—"


@pytest.mark.parametrize(
    "chosen, names",
    [
        ({"shortcut": "exclusive-gate"}, ["identity", "exclusive-gate b=0", "exclusive-gate b=-6",
                                          "exclusive-gate b=-7"]),
        ({"shortcut": "conv1x1"}, ["identity", "conv1x1"]),
        ({"shortcut": "mine:Own"}, ["identity", "mine:Own"]),
        ({"unit": "full-preact"}, ["ResNet-110 original", "ResNet-164 original",
                                   "ResNet-110 full-preact", "ResNet-164 full-preact"]),
        ({"table": 1}, [row.name for row in TABLE_1.rows]),
    ],
)  # fmt: skip
def test_the_rows_that_concern_it_and_the_baseline(chosen, names):
    _, rows = ablate.rows(**chosen)
    assert [row.name for row in rows] == names


def test_one_thing_is_ablated_at_a_time():
    for given in ({}, {"shortcut": "dropout", "table": 1}):
        with pytest.raises(UserError, match="ablate what"):
            ablate.rows(**given)
    with pytest.raises(UserError, match="no Table 6"):
        ablate.rows(table=6)


def test_some_rows_only():
    _, rows = ablate.rows(table=1)
    assert [r.name for r in ablate.only(rows, ["dropout 0.5", "conv1x1"])] == [
        "conv1x1", "dropout 0.5",
    ]  # fmt: skip
    assert ablate.only(rows, []) == rows
    with pytest.raises(UserError, match="unknown row 'dropout'") as raised:
        ablate.only(rows, ["dropout"])
    assert raised.value.hint == "did you mean 'dropout 0.5'?"


def test_seeds_are_the_same_in_all_rows_and_flags_win(tmp_path):
    table, rows = ablate.rows(table=1)
    lines = ablate.plan(table, rows, 3, {"depth": 20, "seed": 5}, tmp_path)
    for line_ in lines:
        assert [arm.experiment.seed for arm in line_.arms] == [5, 6, 7]
        assert all(arm.experiment.depth == 20 for arm in line_.arms)
    assert len({arm.folder for line_ in lines for arm in line_.arms}) == 33


def test_the_plan_of_table_1_as_json(resnetv2):
    rows = json.loads(resnetv2("ablate", "--table", 1, "--dry-run", "--format", "json").stdout)
    assert [row["name"] for row in rows] == [row.name for row in TABLE_1.rows]
    assert [row["published"] for row in rows] == [
        6.61, "fail", "fail", 12.35, "fail", 8.70, 9.81, 12.86, 6.91, 12.22, "fail",
    ]  # fmt: skip
    assert rows[0]["parameters"] == 1_727_962 and rows[0]["macs"] == pytest.approx(
        252.9e6, rel=1e-3
    )


@pytest.mark.parametrize("table", [2, 3, 4, 5])
def test_every_table_has_a_plan(resnetv2, table):
    assert "paper" in resnetv2("ablate", "--table", table, "--dry-run").stdout


def test_an_ablation_runs_and_never_runs_a_row_again(resnetv2, tmp_path):
    command = ["ablate", "--shortcut", "shortcut-only-gate", *TINY, "--output", tmp_path / "a"]
    done = resnetv2(*command, "--runs", 2, "--format", "json")
    rows = json.loads(done.stdout)
    assert [(row["name"], row["n"]) for row in rows] == [
        ("identity", 2), ("shortcut-only-gate b=0", 2), ("shortcut-only-gate b=-6", 2),
    ]  # fmt: skip
    assert rows[1]["settings"]["gate_bias"] == 0 and rows[1]["settings"]["unit"] == "original"
    results = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("result.json")}
    assert len(results) == 6
    again = resnetv2(*command, "--runs", 2)
    assert again.stderr.count("done before") == 6
    assert {p: p.stat().st_mtime_ns for p in results} == results
    for cell in ("6.61", "12.86", "6.91"):
        assert cell in again.stdout


def test_runs_of_other_settings_do_not_pass_for_these(resnetv2, tmp_path):
    command = ["ablate", "--shortcut", "conv1x1", "--row", "conv1x1", *TINY]
    resnetv2(*command, "--output", tmp_path / "a")
    done = resnetv2(*command, "--lr", 0.2, "--output", tmp_path / "a", status=2)
    assert "has a run with lr 0.1, not 0.2" in done.stderr


def test_a_setting_goes_to_the_rows_that_have_it(tmp_path):
    table, rows = ablate.rows(shortcut="exclusive-gate")
    lines = ablate.plan(table, rows, 1, {"gate_bias": -3.0}, tmp_path)
    assert [line_.arms[0].experiment.gate_bias for line_ in lines] == [None, -3, -3, -3]


def test_a_row_that_diverges_is_a_fail_and_not_the_end(resnetv2, tmp_path):
    command = ["ablate", "--shortcut", "conv1x1", *TINY, "--lr", 1e30, "--precision", "32-true"]
    done = resnetv2(*command, "--output", tmp_path / "a", "--format", "json")
    assert [row["median"] for row in json.loads(done.stdout)] == ["fail", "fail"]


def test_a_shortcut_of_ones_own_beside_the_baseline(resnetv2, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from resnetv2_cli.shortcuts import Shortcut\n"
        "class Halved(Shortcut):\n"
        "    def forward(self, x, residual):\n"
        "        return self.carry(x) / 2 + residual\n"
    )
    command = ["ablate", "--shortcut", "mine:Halved", *TINY, "--output", tmp_path / "a"]
    rows = json.loads(resnetv2(*command, "--format", "json", cwd=tmp_path).stdout)
    assert [(r["name"], r["published"], r["n"]) for r in rows] == [
        ("identity", 6.61, 1), ("mine:Halved", None, 1),
    ]  # fmt: skip
    folder = next((tmp_path / "a").glob("mine*/s0"))
    scores = json.loads(resnetv2("eval", folder, "--json", cwd=tmp_path).stdout)
    assert scores["images"] == 360
