"""The paper's tables: sizes of networks, and every published number."""

from dataclasses import replace

import pytest
from torch import nn

from resnetv2_cli import console, paper, plans
from resnetv2_cli.ablation import planning, studies, tables
from resnetv2_cli.config import Experiment
from resnetv2_cli.describe import describe
from resnetv2_cli.errors import UserError
from resnetv2_cli.quantities import NONE
from resnetv2_cli.report import rows
from resnetv2_cli.resnet import ResNet
from resnetv2_cli.shortcuts import SHORTCUTS, settings_of


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


CIFAR_SIZES = [  # counts from independent code: osmr/imgclsmob, wide-residual-networks' logs
    (20, "basic", "original", "A", 10, 269_722),
    (20, "basic", "original", "B", 10, 272_474),
    (20, "basic", "full-preact", "B", 10, 272_282),
    (110, "basic", "original", "A", 10, 1_727_962),
    (110, "basic", "full-preact", "A", 10, 1_727_962),
    (110, "basic", "original", "B", 10, 1_730_714),
    (110, "basic", "full-preact", "B", 10, 1_730_522),
    (110, "single", "full-preact", "A", 10, 1_727_962),
    (110, "basic", "original", "A", 100, 1_733_812),
    (164, "bottleneck", "original", "B", 10, 1_704_154),
    (164, "bottleneck", "full-preact", "B", 10, 1_703_258),
    (164, "bottleneck", "full-preact", "B", 100, 1_726_388),
    (1001, "bottleneck", "original", "B", 10, 10_328_602),
    (1001, "bottleneck", "full-preact", "B", 10, 10_327_706),
    (1001, "bottleneck", "full-preact", "B", 100, 10_350_836),
    (1202, "basic", "original", "A", 10, 19_421_274),
]


def described(classes: int = 10, **given) -> dict:
    return describe(Experiment(**given), classes)


@pytest.mark.parametrize("depth, block, unit, option, classes, parameters", CIFAR_SIZES)
def test_sizes_on_cifar(depth, block, unit, option, classes, parameters):
    made = described(classes, depth=depth, block=block, unit=unit, option=option)
    assert made["parameters"] == parameters


def test_the_default_block_and_option_are_the_papers():
    for depth, unit, parameters in [
        (110, "full-preact", 1_727_962),
        (164, "original", 1_704_154),
        (164, "full-preact", 1_703_258),
        (1001, "full-preact", 10_327_706),
    ]:
        assert described(depth=depth, unit=unit)["parameters"] == parameters


# torchvision's, and osmr/imgclsmob's without the superfluous BN(64) of its first unit
IMAGENET_SIZES = [
    (18, 11_689_512, 11_687_720),
    (34, 21_797_672, 21_795_880),
    (50, 25_557_032, 25_549_352),
    (101, 44_549_160, 44_541_480),
    (152, 60_192_808, 60_185_128),
    (200, 64_673_832, 64_666_152),
]


@pytest.mark.parametrize("depth, original, full_preact", IMAGENET_SIZES)
def test_sizes_on_imagenet(depth, original, full_preact):
    for unit, parameters in [("original", original), ("full-preact", full_preact)]:
        made = described(1000, depth=depth, unit=unit, stem="imagenet")
        assert made["parameters"] == parameters


@pytest.mark.parametrize("unit", plans.UNITS)
def test_all_unit_types_have_the_same_size(unit):
    """Fig. 4: "All these units consist of the same components — only the orders are different"."""
    assert size(ResNet(20, "basic", unit)) == 269_722


@pytest.mark.parametrize(
    "given, macs",
    [
        ({"depth": 110}, 252.9e6),
        ({"depth": 110, "option": "B"}, 253.2e6),
        ({"depth": 110, "block": "single"}, 252.9e6),
        ({"depth": 164}, 244.5e6),
        ({"depth": 164, "stride_on": "3x3"}, 247.6e6),
        ({"depth": 1001}, 1487.9e6),
        ({"depth": 20}, 40.6e6),
        ({"depth": 50, "dataset": "imagenet"}, 3.86e9),
        ({"depth": 50, "dataset": "imagenet", "stride_on": "3x3"}, 4.09e9),
        ({"depth": 152, "dataset": "imagenet"}, 11.28e9),
        ({"depth": 200, "dataset": "imagenet"}, 14.78e9),
        ({"depth": 18, "stem": "imagenet"}, 37.0e6),  # on 32x32
    ],
)
def test_multiply_adds(given, macs):
    classes = 1000 if given.get("dataset") else 10
    assert described(classes, **given)["macs"] == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize(
    "shortcut, parameters",
    [("exclusive-gate", 1_824_186), ("shortcut-only-gate", 1_824_186), ("conv1x1", 1_826_202)],
)
def test_sizes_of_shortcuts_with_weights(shortcut, parameters):
    assert described(depth=110, unit="original", shortcut=shortcut)["parameters"] == parameters


def test_the_papers_10_2_million_leave_bn_out():
    assert described(depth=1001)["parameters_without_bn"] == 10_178_490


# Every cell of Tables 1 to 5, copied from the paper a second time.
TABLE_1 = {
    "identity": 6.61, "constant-scale 0/1": "fail", "constant-scale 0.5/1": "fail",
    "constant-scale 0.5/0.5": 12.35, "exclusive-gate b=0": "fail", "exclusive-gate b=-6": 8.70,
    "exclusive-gate b=-7": 9.81, "shortcut-only-gate b=0": 12.86, "shortcut-only-gate b=-6": 6.91,
    "conv1x1": 12.22, "dropout 0.5": "fail",
}  # fmt: skip
TABLE_2 = {
    "ResNet-110 original": 6.61, "ResNet-110 bn-after-add": 8.17,
    "ResNet-110 relu-before-add": 7.84, "ResNet-110 relu-only-preact": 6.71,
    "ResNet-110 full-preact": 6.37, "ResNet-164 original": 5.93, "ResNet-164 bn-after-add": 6.50,
    "ResNet-164 relu-before-add": 6.14, "ResNet-164 relu-only-preact": 5.91,
    "ResNet-164 full-preact": 5.46,
}  # fmt: skip
TABLE_3 = {
    "ResNet-110 (1-layer skip) original": 9.90, "ResNet-110 (1-layer skip) full-preact": 8.91,
    "ResNet-110 original": 6.61, "ResNet-110 full-preact": 6.37,
    "ResNet-164 original": 5.93, "ResNet-164 full-preact": 5.46,
    "ResNet-1001 original": 7.61, "ResNet-1001 full-preact": 4.92,
    "ResNet-164, CIFAR-100 original": 25.16, "ResNet-164, CIFAR-100 full-preact": 24.33,
    "ResNet-1001, CIFAR-100 original": 27.82, "ResNet-1001, CIFAR-100 full-preact": 22.71,
}  # fmt: skip
TABLE_4 = {
    "ResNet-110 original": 6.61, "ResNet-1202 original": 7.93, "ResNet-164 full-preact": 5.46,
    "ResNet-1001 full-preact": 4.92, "ResNet-1001 full-preact, batch 64": 4.62,
    "ResNet-164 original, CIFAR-100": 25.16, "ResNet-1001 original, CIFAR-100": 27.82,
    "ResNet-164 full-preact, CIFAR-100": 24.33, "ResNet-1001 full-preact, CIFAR-100": 22.71,
}  # fmt: skip
# With top-5; below, the numbers from elsewhere in the paper.
TABLE_5 = [(23.0, 6.7), (21.3, 5.5), (21.1, 5.5), (21.8, 6.0), (20.7, 5.3), (20.1, 4.8)]
ELSEWHERE = [(23.6, 7.1), (24.6, 7.5), (24.7, 7.8), (21.66, 5.79), (20.15, 4.93)]


@pytest.mark.parametrize(
    "number, expected", [(1, TABLE_1), (2, TABLE_2), (3, TABLE_3), (4, TABLE_4)]
)
def test_published_numbers(number, expected):
    rows = paper.TABLES[number].rows
    found = {r.name: "fail" if r.published == paper.FAIL else r.published for r in rows}
    assert found == expected
    assert len(rows) == len(expected)


def test_published_numbers_of_table_5_and_elsewhere():
    assert [(row.published, row.top5) for row in paper.TABLE_5.rows] == TABLE_5
    assert [(row.published, row.top5) for row in paper.ELSEWHERE.rows] == ELSEWHERE


def test_published_spreads():
    tables = [*paper.TABLES.values(), paper.ELSEWHERE]
    assert {row.name: row.spread for table in tables for row in table.rows if row.spread} == {
        "ResNet-1001 full-preact": "4.89±0.14",
        "ResNet-1001 full-preact, batch 64": "4.69±0.20",
        "ResNet-1001 full-preact, CIFAR-100": "22.68±0.22",
    }


def test_batch_64_has_the_recipe_of_the_authors_code():
    [row] = [row for row in paper.TABLE_4.rows if "batch 64" in row.name]
    e = Experiment(**paper.TABLE_4.base | row.settings)
    assert (e.batch_size, e.nesterov, e.warmup, e.normalize) == (64, True, 0, "channel")
    assert (e.epochs, e.drops_) == (200, (80 / 200, 121 / 200))


def test_what_the_runs_of_table_5_had(tmp_path):
    """The last row is from fb.resnet.torch; the others used the colors of [21] (appendix)."""
    recipes = [Experiment(**paper.TABLE_5.base | row.settings) for row in paper.TABLE_5.rows]
    found = [(e.crop, e.color, e.nesterov, e.stride_on) for e in recipes]
    assert found == [("scale", "lighting", False, "first")] * 5 + [
        ("scale-aspect", "jitter", True, "3x3")
    ]
    [study] = studies.studies(tables=[5])
    assert "the mean image" in planning.plan(study, 1, {}, tmp_path).title.splitlines()[1]


def test_the_panels_of_figure_6():
    assert list(paper.FIGURES[6].panels.values()) == [
        ("ResNet-110 original", "ResNet-110 bn-after-add"),
        ("ResNet-164 original", "ResNet-164 full-preact"),
    ]


@pytest.mark.parametrize("table, figure, letters", [(1, 2, "abbbcccddef"), (2, 4, "abcde" * 2)])
def test_a_row_names_the_drawing_of_its_unit(table, figure, letters):
    assert [r.figure for r in paper.TABLES[table].rows] == [f"{figure}({c})" for c in letters]


def test_the_panels_of_figures_1_and_3():
    """The original network next to those that the captions name."""
    assert list(paper.FIGURES[1].panels.values()) == [
        ("ResNet-1001 original", "ResNet-1001 full-preact")
    ]
    beside = ["constant-scale 0.5/0.5", "exclusive-gate b=-6", "shortcut-only-gate b=0", "conv1x1"]
    assert list(paper.FIGURES[3].panels.values()) == [("identity", row) for row in beside]


ALL = [table.values() for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4)]
ALL += [[top1 for top1, _ in TABLE_5]]


@pytest.mark.parametrize("number, expected", list(enumerate(map(list, ALL), 1)))
def test_published_numbers_as_they_are_shown(number, expected, tmp_path):
    """Even above 20 %: what the paper calls a fail applies to CIFAR-10 only."""
    [study] = studies.studies(tables=[number])
    columns, cells = tables.table(planning.plan(study, 1, {}, tmp_path), 0.5)
    said = [dict(zip(columns, row, strict=True)) for row in cells]
    shown = [row["paper, %"].partition(" ")[0] for row in said]
    assert shown == [e if isinstance(e, str) else f"{e:.2f}" for e in expected]
    fails = [row.get("in the paper") == "fail" for row in said]  # in the column of differences too
    assert fails == [e == "fail" for e in expected]


@pytest.mark.parametrize(
    "number, gains",
    [
        (3, ["-0.99", "-0.24", "-0.47", "-2.69", "-0.83", "-5.11"]),
        (4, ["-0.83", "-5.11"]),  # on CIFAR-100; the other depths have no original row
        (5, ["-0.20", "-1.10"]),  # at 320; the last row's recipe has none either
    ],
)
def test_a_pre_activation_unit_is_compared_with_the_original_of_its_table(number, gains, tmp_path):
    [study] = studies.studies(tables=[number])
    made = planning.plan(study, 2, {}, tmp_path)
    said = [tables.published_difference(made, line) for line in made.lines]
    assert [difference for difference in said if difference != NONE] == gains
    for line in made.lines:
        if baseline := made.line(line.row.baseline):
            ours, theirs = (one.arms[0].experiment for one in (line, baseline))
            assert ours.protocols[0] == theirs.protocols[0]
            assert theirs == replace(ours, unit="original", protocol=theirs.protocol)


@pytest.mark.parametrize("number, row, to_paper", [
    (3, "ResNet-164, CIFAR-100 full-preact", "+0.67"),
    (5, "ResNet-152 original, test 320", "+3.70"),
    (2, "ResNet-110 original", "—"),
])  # fmt: skip
def test_twenty_five_percent_is_a_fail_on_cifar10_alone(number, row, to_paper, tmp_path):
    [study] = studies.studies(tables=[number])
    planned = planning.plan(study.only([row]), 1, {}, tmp_path)
    [line] = planned.lines
    line.arms[0].folder.mkdir(parents=True)
    (line.arms[0].folder / "result.json").write_text('{"test_error": 25.0}')
    columns, [cells] = tables.table(planned, 0.5)
    said = dict(zip(columns, cells, strict=True))
    fails = number == 2
    assert said["here, %"] == ("fail: 25.00" if fails else "25.00")
    assert said.get("to paper", "—") == to_paper
    made = rows.study(planned, [], 0.5)
    assert made["shaded"] is fails and (made["rows"][0]["marks"]["fail"] < 100) is fails


SETTINGS = [(number, row) for number, table in paper.TABLES.items() for row in table.rows]


@pytest.mark.parametrize("number, row", SETTINGS, ids=lambda x: getattr(x, "name", x))
def test_every_published_row_can_be_built(number, row):
    experiment = Experiment(**paper.TABLES[number].base | row.settings)
    assert str(experiment.depth) in row.name or number == 1
    assert describe(experiment)["parameters"] > 1e6


def test_table_1_varies_only_the_shortcut():
    base = paper.TABLE_1.base
    assert base == {"dataset": "cifar10", "depth": 110, "block": "basic", "unit": "original"}
    settings = [row.settings for row in paper.TABLE_1.rows]
    assert [s["shortcut"] for s in settings] == (
        ["identity"] + ["constant-scale"] * 3 + ["exclusive-gate"] * 3
        + ["shortcut-only-gate"] * 2 + ["conv1x1", "dropout"]
    )  # fmt: skip
    assert [(s["shortcut_scale"], s["residual_scale"]) for s in settings[1:4]] == [
        (0, 1), (0.5, 1), (0.5, 0.5),
    ]  # fmt: skip
    assert [s["gate_bias"] for s in settings[4:9]] == [0, -6, -7, 0, -6]
    assert settings[10]["dropout_ratio"] == 0.5


@pytest.mark.parametrize(
    "block, depth, hint",
    [
        ("basic", 111, "try 110 or 116"),
        ("bottleneck", 165, "try 164 or 173"),
        ("single", 4, "try 5"),
        (None, 112, "try 110 or 116"),
        (None, 1000, "try 998 or 1001"),
        ("basic", 9999, "try 9998"),  # 10,004 are too many
        (None, 9999, "try 9998"),
    ],
)
def test_impossible_depths_name_their_neighbours(block, depth, hint):
    with pytest.raises(UserError, match=f"no .*network has {depth} layers") as raised:
        Experiment(depth=max(depth, 5), block=block) if depth > 4 else plans.units_per_stage(
            depth, block
        )
    assert raised.value.hint == hint


@pytest.mark.parametrize(
    "depth, block",
    [(8, "basic"), (20, "basic"), (110, "basic"), (146, "basic"), (1202, "basic"),
     (11, "bottleneck"), (164, "bottleneck"), (182, "bottleneck"), (1001, "bottleneck")],
)  # fmt: skip
def test_the_block_of_a_depth(depth, block):
    assert plans.default_block(depth, "cifar") == block


def test_a_name_always_carries_the_block():
    assert Experiment(depth=110).name == "cifar10-resnet110-basic-full-preact-s0"
    assert "bottleneck" in Experiment(depth=110, block="bottleneck").name


def test_the_names_read_from_the_source_are_the_shortcuts():
    assert list(plans.shortcuts()) == list(SHORTCUTS)
    for name, (formula, settings) in plans.shortcuts().items():
        assert SHORTCUTS[name].__doc__.splitlines()[0] == formula
        assert settings_of(SHORTCUTS[name]) == settings


def test_columns_that_do_not_fit_go_on_below_and_no_cell_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(console.out, "_width", 60)
    columns = ["row", *(f"column {i}" for i in range(9))]
    console.table("many", columns, [["a long name", *(f"{i}.25 (±1)" for i in range(9))]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert [sum("a long name" in ln for ln in lines), sum("many" in ln for ln in lines)] == [3, 1]
    assert all(any(f"{i}.25 (±1)" in ln for ln in lines) for i in range(9))


def test_a_bar_in_a_cell_ends_no_cell_of_markdown(capsys):
    console.as_markdown("two\nlines", ["a", "b"], [["x|y", "1"]])
    assert capsys.readouterr().out == (
        "**two; lines**\n\n| a | b |\n| --- | --: |\n| x\\|y | 1 |\n\n"
    )


def test_numbers_are_whole_and_words_fold(monkeypatch, capsys):
    monkeypatch.setattr(console.out, "_width", 66)
    words = "cannot identify image file: none of PNG, JPEG, WEBP, BMP"
    rows = [["a/long/path/" * 5, words, "1,234,567,890"], ["short", "1.0 %", "12"]]
    console.table("a title that is longer than the table " * 2, ["file", "1", "parameters"], rows)
    out = capsys.readouterr().out
    assert "1,234,567,890" in out and max(map(len, out.splitlines())) <= 66
    assert all(any(word in line for line in out.splitlines()) for word in words.split())
    assert out.count("┏") == 1 and "parameters" in out


def test_the_row_of_the_exclusive_gate_reaches_from_0_to_5_below(here):
    """Table 1: "fail" is for b_g = 0 to -5."""
    gate = {"dataset": "cifar10", "depth": 110, "unit": "original", "shortcut": "exclusive-gate"}
    rows = {
        b: studies.paper_row(gate | {"gate_bias": float(b)}) for b in (1, 0, -3, -5, -6, -7, -8)
    }
    found = {b: row and row.published for b, row in rows.items()}
    assert found == {
        1: None,
        0: paper.FAIL,
        -3: paper.FAIL,
        -5: paper.FAIL,
        -6: 8.70,
        -7: 9.81,
        -8: None,
    }
    assert studies.paper_row(gate | {"shortcut": "shortcut-only-gate", "gate_bias": -3.0}) is None
    flags = ["--unit", "original", "--shortcut", "exclusive-gate", "--gate-bias"]
    assert "of this network, %: fail (Table 1" in here("describe", *flags, -3).stdout
    assert "of this network" not in here("describe", *flags, -8).stdout


def test_what_stands_outside_of_the_tables_is_described_too(here):
    given = ["--dataset", "imagenet", "--depth", 101, "--unit"]
    for unit, error in (("original", "23.60"), ("bn-after-add", "24.60")):
        said = here("describe", *given, unit).stdout
        assert f"the paper's errors of this network, %: {error} (Sec. 5)" in said
