"""What He et al. 2016 published: test error in percent. On CIFAR it is the median of 5 runs (Sec.
3.1), except for results of [1]: 6.61 is the mean of 5 runs there, the best of which has 6.43, and
Table 4 names others. How many runs there were on ImageNet is not stated.

A row names what it varies; its ``table`` says what stays fixed. FAIL is "above 20 %".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from resnetv2_cli.quantities import NONE

FAIL = float("inf")
FAIL_ABOVE = 20.0  # percent (caption of Table 1)


@dataclass(frozen=True)
class Row:
    """One row of one table: the settings that make it, and the error published for it."""

    name: str
    published: float | None  # percent, or FAIL; None if unpublished
    settings: dict[str, Any]
    figure: str = ""
    spread: str = ""  # mean±std, where the paper gives it
    note: str = ""
    top5: float | None = None  # percent, on ImageNet
    tested: str = ""  # the protocol that the errors are of; empty: the experiment's first
    source: str = ""  # where it is published, if not in a table of the paper
    baseline: str = ""  # the row that it is compared with
    reach: dict[str, float] = field(default_factory=dict)  # the row holds up to this value too

    def at(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its settings, replaced by those of ``given`` that are within its reach."""
        inside = dict(self.settings)
        for name, end in self.reach.items():
            low, high = sorted((self.settings[name], end))
            if (value := given.get(name)) is not None and low <= value <= high:
                inside[name] = value
        return inside


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper; ``base`` holds for every row of it.

    ``panels``: for a figure, the names of the rows whose curves each of its panels shows.
    """

    title: str
    base: dict[str, Any]
    rows: tuple[Row, ...]
    panels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unlike: str = ""  # how all runs here differ from the paper's

    def of(self, **settings: Any) -> list[Row]:
        """The rows that agree with these settings."""
        return [
            r
            for r in self.rows
            if all((self.base | r.settings).get(k) == v for k, v in settings.items())
        ]


def _gate(
    name: str, published: float, b_g: float, figure: str, note: str = "", **reach: float
) -> Row:
    settings, called = {"shortcut": name, "gate_bias": b_g}, f"{name} b={b_g:g}"
    return Row(called, published, settings, figure, note=note, baseline="identity", reach=reach)


def _scale(published: float, a: float, b: float, note: str) -> Row:
    settings = {"shortcut": "constant-scale", "shortcut_scale": a, "residual_scale": b}
    name = f"constant-scale {a:g}/{b:g}"
    return Row(name, published, settings, "2(b)", note=note, baseline="identity")


TABLE_1 = PaperTable(
    "Table 1: shortcuts, ResNet-110 on CIFAR-10",
    {"dataset": "cifar10", "depth": 110, "block": "basic", "unit": "original"},
    (
        Row("identity", 6.61, {"shortcut": "identity"}, "2(a)"),
        _scale(FAIL, 0.0, 1.0, "a plain net"),
        _scale(FAIL, 0.5, 1.0, ""),
        _scale(12.35, 0.5, 0.5, "frozen gating"),
        _gate(
            "exclusive-gate", FAIL, 0.0, "2(c)", "the paper's row is b = 0 to -5", gate_bias=-5.0
        ),
        _gate("exclusive-gate", 8.70, -6.0, "2(c)"),
        _gate("exclusive-gate", 9.81, -7.0, "2(c)"),
        _gate("shortcut-only-gate", 12.86, 0.0, "2(d)"),
        _gate("shortcut-only-gate", 6.91, -6.0, "2(d)"),
        Row("conv1x1", 12.22, {"shortcut": "conv1x1"}, "2(e)", baseline="identity"),
        Row(
            "dropout 0.5",
            FAIL,
            {"shortcut": "dropout", "dropout_ratio": 0.5},
            "2(f)",
            baseline="identity",
        ),
    ),
)


def _units(depth: int, block: str, errors: dict[str, float]) -> tuple[Row, ...]:
    figures = dict(zip(errors, ("4(a)", "4(b)", "4(c)", "4(d)", "4(e)"), strict=True))
    baseline = f"ResNet-{depth} original"

    def row(unit: str, error: float) -> Row:
        settings, name = {"depth": depth, "block": block, "unit": unit}, f"ResNet-{depth} {unit}"
        compared = baseline if name != baseline else ""
        return Row(name, error, settings, figures[unit], baseline=compared)

    return tuple(row(unit, error) for unit, error in errors.items())


_UNITS_110 = {
    "original": 6.61,
    "bn-after-add": 8.17,
    "relu-before-add": 7.84,
    "relu-only-preact": 6.71,
    "full-preact": 6.37,
}
_UNITS_164 = {
    "original": 5.93,
    "bn-after-add": 6.50,
    "relu-before-add": 6.14,
    "relu-only-preact": 5.91,
    "full-preact": 5.46,
}

TABLE_2 = PaperTable(
    "Table 2: units, CIFAR-10",
    {"dataset": "cifar10", "shortcut": "identity"},
    _units(110, "basic", _UNITS_110) + _units(164, "bottleneck", _UNITS_164),
)


def _pair(name: str, baseline: float, ours: float, **settings: Any) -> tuple[Row, Row]:
    """A line of Table 3: the original unit and the pre-activation unit."""
    return (
        Row(f"{name} original", baseline, settings | {"unit": "original"}),
        Row(
            f"{name} full-preact",
            ours,
            settings | {"unit": "full-preact"},
            baseline=f"{name} original",
        ),
    )


_C10, _C100 = {"dataset": "cifar10"}, {"dataset": "cifar100"}
_164 = {"depth": 164, "block": "bottleneck"}
_1001 = {"depth": 1001, "block": "bottleneck"}

TABLE_3 = PaperTable(
    "Table 3: original and pre-activation units",
    {"shortcut": "identity"},
    _pair("ResNet-110 (1-layer skip)", 9.90, 8.91, **_C10, depth=110, block="single")
    + _pair("ResNet-110", 6.61, 6.37, **_C10, depth=110, block="basic")
    + _pair("ResNet-164", 5.93, 5.46, **_C10, **_164)
    + _pair("ResNet-1001", 7.61, 4.92, **_C10, **_1001)
    + _pair("ResNet-164, CIFAR-100", 25.16, 24.33, **_C100, **_164)
    + _pair("ResNet-1001, CIFAR-100", 27.82, 22.71, **_C100, **_1001),
)

_POST, _PRE = {"unit": "original"}, {"unit": "full-preact"}

# Drops after 80 and 121 of 200 epochs (fb.resnet.torch, which the released code plugs into).
_TORCH_CODE = {
    "batch_size": 64,
    "nesterov": True,
    "warmup": 0,
    "normalize": "channel",
    "epochs": 200.0,
    "drops": "0.4,0.605",
}

TABLE_4 = PaperTable(
    "Table 4: residual networks among the best of their time",
    {"shortcut": "identity"},
    (
        Row("ResNet-110 original", 6.61, _C10 | _POST | {"depth": 110, "block": "basic"}),
        Row("ResNet-1202 original", 7.93, _C10 | _POST | {"depth": 1202, "block": "basic"}),
        Row("ResNet-164 full-preact", 5.46, _C10 | _PRE | _164),
        Row("ResNet-1001 full-preact", 4.92, _C10 | _PRE | _1001, spread="4.89±0.14"),
        Row(
            "ResNet-1001 full-preact, batch 64",
            4.62,
            _C10 | _PRE | _1001 | _TORCH_CODE,
            spread="4.69±0.20",
            note="the authors' Torch code",
        ),
        Row("ResNet-164 original, CIFAR-100", 25.16, _C100 | _POST | _164),
        Row("ResNet-1001 original, CIFAR-100", 27.82, _C100 | _POST | _1001),
        Row(
            "ResNet-164 full-preact, CIFAR-100",
            24.33,
            _C100 | _PRE | _164,
            baseline="ResNet-164 original, CIFAR-100",
        ),
        Row(
            "ResNet-1001 full-preact, CIFAR-100",
            22.71,
            _C100 | _PRE | _1001,
            spread="22.68±0.22",
            baseline="ResNet-1001 original, CIFAR-100",
        ),
    ),
)


def _imagenet(
    depth: int,
    unit: str,
    protocol: str,
    published: float,
    top5: float,
    source: str = "",
    baseline: str = "",
    protocols: str = "",
    **more: Any,
) -> Row:
    """``protocols``: all that its training is tested by, if other rows test the same training."""
    name = f"ResNet-{depth} {unit}, test {protocol}" + (", scale + aspect" if more else "")
    settings: dict[str, Any] = {"depth": depth, "block": "bottleneck", "unit": unit}
    settings |= {"protocol": protocols or protocol} | more
    note = "projections of the raw input" if more else ""
    return Row(name, published, settings, "", "", note, top5, protocol, source, baseline)


_FB = "fb.resnet.torch"
# That code's recipe; its preresnet.lua of the time has BN in projections, unlike the unit here.
_FB_CODE: dict[str, Any] = {
    "crop": "scale-aspect",
    "color": "jitter",
    "nesterov": True,
    "stride_on": "3x3",
}

TABLE_5 = PaperTable(
    "Table 5: ILSVRC-2012 validation, single crop",
    {
        "dataset": "imagenet",
        "shortcut": "identity",
        "color": "lighting",
        "batch_size": 256,
        "warmup": 0,
        "epochs": 90.0,  # not stated; drops at 30 and 60 are
        "drops": "0.333333,0.666667",
    },
    (
        _imagenet(152, "original", "224", 23.0, 6.7, protocols="320,224"),
        _imagenet(152, "original", "320", 21.3, 5.5, protocols="320,224"),
        _imagenet(152, "full-preact", "320", 21.1, 5.5, baseline="ResNet-152 original, test 320"),
        _imagenet(200, "original", "320", 21.8, 6.0),
        _imagenet(200, "full-preact", "320", 20.7, 5.3, baseline="ResNet-200 original, test 320"),
        _imagenet(200, "full-preact", "320", 20.1, 4.8, **_FB_CODE),
    ),
    unlike="normalized by ImageNet's mean and std, where the paper subtracts the mean image",
)

# Errors on ImageNet published elsewhere: evaluation prints them beside its own.
ELSEWHERE = PaperTable(
    "ILSVRC-2012 validation, outside of the tables",
    TABLE_5.base,
    (
        _imagenet(101, "original", "224", 23.6, 7.1, "Sec. 5"),
        _imagenet(101, "bn-after-add", "224", 24.6, 7.5, "Sec. 5"),
        _imagenet(50, "original", "224", 24.7, 7.8, "the authors' Caffe models"),
        _imagenet(200, "full-preact", "224", 21.66, 5.79, _FB, **_FB_CODE),
        _imagenet(200, "full-preact", "ten-crop", 20.15, 4.93, _FB, **_FB_CODE),
    ),
)

TABLES = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 4: TABLE_4, 5: TABLE_5}


def _figure(title: str, table: PaperTable, panels: dict[str, tuple[str, ...]]) -> PaperTable:
    """The rows of a table whose curves a figure shows."""
    shown = {name for names in panels.values() for name in names}
    rows = tuple(row for row in table.rows if row.name in shown)
    return replace(table, title=title, rows=rows, panels=panels)


FIGURES = {
    1: _figure(
        "Figure 1: ResNet-1001 on CIFAR-10",
        TABLE_3,
        {"ResNet-1001": ("ResNet-1001 original", "ResNet-1001 full-preact")},
    ),
    3: _figure(
        "Figure 3: shortcuts, ResNet-110 on CIFAR-10",
        TABLE_1,
        {
            "(a) constant scaling": ("identity", "constant-scale 0.5/0.5"),
            "(b) exclusive gating": ("identity", "exclusive-gate b=-6"),
            "(c) shortcut-only gating": ("identity", "shortcut-only-gate b=0"),
            "(d) 1x1 conv shortcut": ("identity", "conv1x1"),
        },
    ),
    6: _figure(
        "Figure 6: units, CIFAR-10",
        TABLE_2,
        {
            "ResNet-110": ("ResNet-110 original", "ResNet-110 bn-after-add"),
            "ResNet-164": ("ResNet-164 original", "ResNet-164 full-preact"),
        },
    ),
}


def evaluated(experiment: Any) -> list[Row]:
    """The published rows for an ``Experiment``'s network and protocols, however it is trained."""
    names = ("dataset", "depth", "unit", "shortcut")
    wanted = {name: getattr(experiment, name) for name in names} | {"block": experiment.block_}
    known = [row for table in (TABLE_5, ELSEWHERE) for row in table.of(**wanted)]
    return [row for row in known if row.tested in experiment.protocols]


def percent(error: float | None) -> str:
    """``6.61``, ``fail``, or a dash if unknown."""
    if error is None:
        return NONE
    return "fail" if error == FAIL else f"{error:.2f}"


ERRORS_OF = {  # what the errors that ``describe`` shows are of
    "network": "of this network",
    "unit": "on CIFAR-10 with this unit",
    "shortcut": "on CIFAR-10 with this shortcut (ResNet-110, original units)",
}


def _settings(row: Row, shortcut: str) -> str:
    return row.name.removeprefix(shortcut).strip() + "".join(
        f" to {v:g}" for v in row.reach.values()
    )


def published(kind: str, name: str) -> str:
    """What Tables 1 and 2 publish for a shortcut or a unit type, with the settings in brackets."""
    if kind == "shortcut":
        rows = TABLE_1.of(shortcut=name)
        parts = [(_settings(r, name), percent(r.published)) for r in rows]
    else:
        rows = TABLE_2.of(unit=name)
        parts = [
            ("{depth} layers, {block}".format(**r.settings), percent(r.published)) for r in rows
        ]
    return ", ".join(f"{e} ({what})" if what else e for what, e in parts) or NONE
