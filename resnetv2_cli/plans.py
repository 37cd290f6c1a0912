"""The networks as data: unit types, blocks, stems, layouts and the arithmetic of depth.

To add a unit type: one row in UNITS. To add a block: one row in BLOCKS. To add a layout: one row in
LAYOUTS. Nothing here needs torch, so that help and error messages appear at once.
"""

import ast
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from resnetv2_cli.errors import UserError, shown, unknown
from resnetv2_cli.ownname import OwnName
from resnetv2_cli.settings import flag_name

UNITS = {  # the layers between two units: + ends one, | begins the next (Fig. 4)
    "original": "bn + relu |",
    "bn-after-add": "+ bn relu |",
    "relu-before-add": "bn relu + |",
    "relu-only-preact": "bn + | relu",
    "full-preact": "+ | bn relu",
}
OWN = ("unit", "shortcut")  # settings that may name the user's own code, module:Class
MARKS = {"+", "|"}  # they tell a unit type that is written out from the name of one


class Block(NamedTuple):
    """The weight layers of F."""

    kernels: tuple[int, ...]
    expansion: int  # output channels of F per channel inside it


BLOCKS = {
    "single": Block(kernels=(3,), expansion=1),
    "basic": Block(kernels=(3, 3), expansion=1),
    "bottleneck": Block(kernels=(1, 3, 1), expansion=4),
}


class Stem(NamedTuple):
    """The layers before the first unit, and the widths of the stages after them."""

    kernel: int
    stride: int
    pool: bool  # followed by a 3x3 max-pooling of stride 2
    channels: int
    widths: tuple[int, ...]  # channels inside F, stage by stage
    size: int  # side of the images it is designed for, pixels


STEMS = {
    "cifar": Stem(3, 1, False, 16, (16, 32, 64), size=32),
    "imagenet": Stem(7, 2, True, 64, (64, 128, 256, 512), size=224),
}

IMAGENET = {  # depth: (block, units in each stage); Table 1 of [1], and footnote 3 for 200
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}


class Layout(NamedTuple):
    """How one code base builds what the paper leaves open. Every layout gives values for the same
    settings of an experiment, so that one replaces another as a whole."""

    doc: str
    settings: dict[str, str | None]


LAYOUTS = {
    "authors": Layout(
        "the authors' Caffe and Torch code, and the default: stride on the first 1x1, the first "
        "activation in the stem",
        {"stride_on": "first", "pad": "raw", "option": None, "first_act": "stem"},
    ),
    "fb": Layout(
        "fb.resnet.torch: stride on the 3x3, option A pads the activated x",
        {"stride_on": "3x3", "pad": "activated", "option": None, "first_act": "stem"},
    ),
    "torchvision": Layout(
        "torchvision, and timm's resnet*: stride on the 3x3, projections at every depth",
        {"stride_on": "3x3", "pad": "raw", "option": "B", "first_act": "stem"},
    ),
    "timm": Layout(
        "timm's resnetv2*: as torchvision, but the max-pool follows conv1 directly, and the first "
        "unit activates its input like every other",
        {"stride_on": "3x3", "pad": "raw", "option": "B", "first_act": "unit"},
    ),
}

DEEPEST = 10_000  # weight layers that a network may have
FIRST_BOTTLENECK = 164  # from here on depths that fit both blocks are bottleneck, as in the paper


def parts(stem: str) -> tuple[str, ...]:
    """The parts of a network, from input to output."""
    return ("stem", *(f"stage{i + 1}" for i in range(len(STEMS[stem].widths))), "head")


def check_frozen(frozen: Collection[str], stem: str) -> None:
    """Refuse to freeze a part that the network lacks, or all parts.

    Raises:
        UserError: names the parts.
    """
    known = parts(stem)
    for part in frozen:
        if part not in known:
            raise unknown("part", part, known, where="freeze: ")
    if {*frozen} == {*known}:
        raise UserError("nothing is left to train", f"freeze some of {', '.join(known)}")


def between(unit: str) -> str:
    """The layers between two units of a type: its row of UNITS, or ``unit`` if written out."""
    return UNITS.get(unit, unit)


def places(unit: str) -> tuple[str, str, str]:
    """A unit type split at its marks: the layers that end F, follow the addition (f), open F."""
    last, rest = between(unit).split("+")
    after, before = rest.split("|")
    return last.strip(), after.strip(), before.strip()


def unit_type(text: str) -> str:
    """The canonical name of a unit type: ``bn+|bn`` is ``bn + | bn``, ``+ | bn relu`` full-preact.

    Of a user's own class only the name is checked here; the class is checked when imported.

    Raises:
        UserError: it is neither a row of UNITS, nor module:Class, nor valid layers and marks.
    """
    return str(OwnName.of(text, "mine:MyUnit")) if ":" in text else unit_between(text)


def unit_between(text: str) -> str:
    """The canonical name of a unit type, given by name or by the layers between two units.

    Raises:
        UserError: it is neither a row of UNITS nor valid layers and marks.
    """
    if not MARKS & {*text}:
        if text not in UNITS:
            raise unknown("unit", text, UNITS)
        return text
    words = re.findall(r"\w+|\S", text.lower())
    hint = "such as 'bn + | bn relu': BN and ReLU, + where x is added, then | where the paths split"
    if other := [word for word in words if word not in {"bn", "relu", *MARKS}]:
        raise UserError(f"unit {shown(text)}: what is {other[0]!r}?", hint)
    if [word for word in words if word in MARKS] != ["+", "|"]:
        raise UserError(f"unit {shown(text)} must have one + and, after it, one |", hint)
    whole = " ".join(words)
    for place in map(str.split, places(whole)):
        if len({*place}) < len(place):
            raise UserError(f"unit {shown(text)} has {place[0]} twice in one place", hint)
    return next((name for name, row in UNITS.items() if row == whole), whole)


def in_names(text: str) -> str:
    """A unit or a shortcut as part of a file name: ``bn + | bn`` -> ``bn-add-split-bn``."""
    for sign, word in {"+": "add", "|": "split", " ": "-", ":": ".", "=": "-"}.items():
        text = text.replace(sign, word)
    return text


def laid_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a ``layout`` among them expanded into its own; explicit ones win over it.

    Raises:
        UserError: there is no such layout.
    """
    rest = dict(given)
    name = rest.pop("layout", None)
    if name is None:
        return rest
    if str(name) not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    return LAYOUTS[str(name)].settings | rest


def fits(depth: int, block: str) -> bool:
    """Whether some n >= 1 gives this depth in a CIFAR network of this block."""
    n, rest = divmod(depth - 2, 3 * len(BLOCKS[block].kernels))
    return n >= 1 and rest == 0


def default_option(block: str, stem: str) -> str:
    """A for CIFAR, but B for bottlenecks and for ImageNet ([1]; appendix)."""
    return "A" if stem == "cifar" and block != "bottleneck" else "B"


def default_block(depth: int, stem: str) -> str:
    """The block of a network of which only the depth is given.

    On CIFAR 6n+2 is basic and 9n+2 is bottleneck. A depth that fits both (20, 38, 56, ..., 18k+2)
    is basic below 164 and bottleneck from 164 on, as the paper's 110 and 164 are.

    Raises:
        UserError: the depth fits neither; names the nearest that do.
    """
    if stem == "imagenet":
        if depth not in IMAGENET:
            raise UserError(
                f"no ImageNet network has {depth} layers",
                f"--depth {', '.join(map(str, IMAGENET))}; other depths take --stem cifar",
            )
        return IMAGENET[depth][0]
    wide = fits(depth, "bottleneck")
    if fits(depth, "basic"):
        return "bottleneck" if wide and depth >= FIRST_BOTTLENECK else "basic"
    if wide:
        return "bottleneck"
    raise UserError(
        f"no network has {depth} layers: basic ones have 6n+2, bottleneck ones 9n+2",
        f"try {neighbours(depth, 'basic', 'bottleneck')}",
    )


def neighbours(depth: int, *blocks: str) -> str:
    """``110 or 116``: the nearest depth on each side that fits one of the blocks."""
    known = [d for d in range(DEEPEST + 1) if any(fits(d, block) for block in blocks)]
    below, above = [d for d in known if d < depth][-1:], [d for d in known if d > depth][:1]
    return " or ".join(map(str, below + above))


def units_per_stage(depth: int, block: str, stem: str = "cifar") -> tuple[int, ...]:
    """The number of units in each stage.

    On CIFAR n in each of three stages, from depth = 3 K n + 2: K weight layers per unit, plus the
    stem and the head. On ImageNet from a table.

    Raises:
        UserError: no n gives this depth; names the depths next to it.
    """
    if stem == "imagenet":
        known = {d: stages for d, (b, stages) in IMAGENET.items() if b == block}
        if depth not in known:
            hint = f"try {' or '.join(map(str, known))}" if known else "use basic or bottleneck"
            raise UserError(f"no {block} ImageNet network has {depth} layers", hint)
        return known[depth]
    per_n = 3 * len(BLOCKS[block].kernels)
    if not fits(depth, block):
        raise UserError(
            f"no {block} network has {depth} layers, only {per_n}n+2",
            f"try {neighbours(depth, block)}",
        )
    return ((depth - 2) // per_n,) * 3


class ShortcutRow(NamedTuple):
    """The first line of a shortcut's docstring, and its settings with their defaults."""

    formula: str
    settings: dict[str, object]


@cache
def shortcuts() -> dict[str, ShortcutRow]:
    """Every row of ``SHORTCUTS``, read from the source of ``shortcuts.py``.

    Importing them would import torch, and delay ``--help`` by two seconds.
    """
    tree = ast.parse((Path(__file__).parent / "shortcuts.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def settings(node: ast.ClassDef) -> dict[str, object]:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                defaults = [ast.literal_eval(d) for d in part.args.defaults]
                names = [a.arg for a in part.args.args[len(part.args.args) - len(defaults) :]]
                alone = zip(part.args.kwonlyargs, part.args.kw_defaults, strict=True)
                given = {a.arg: ast.literal_eval(d) for a, d in alone if d is not None}
                return dict(zip(names, defaults, strict=True)) | given
        [base] = [b.id for b in node.bases if isinstance(b, ast.Name)] or [""]
        return settings(classes[base]) if base in classes else {}

    [table] = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SHORTCUTS"
    )
    assert isinstance(table, ast.Dict)
    found = {}
    for key, value in zip(table.keys, table.values, strict=True):
        node = classes[ast.unparse(value)]
        formula = (ast.get_docstring(node) or "").splitlines()[0]
        found[ast.literal_eval(key)] = ShortcutRow(formula, settings(node))  # type: ignore
    return found


def of_shortcut(shortcut: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings without those of other shortcuts: a gate's bias means nothing to
    identity. One of the user's own may have any of them."""
    known = shortcuts()
    if shortcut not in known:
        return dict(given)
    others = {name for row in known.values() for name in row.settings}
    return {k: v for k, v in given.items() if k not in others - {*known[shortcut].settings}}


def check_settings(shortcut: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse settings that a shortcut would silently ignore.

    Raises:
        UserError: names the setting, and those that the shortcut has.
    """
    known = list(known)
    for name in given:
        if name not in known:
            flags = ", ".join(map(flag_name, known)) or "none"
            raise UserError(
                f"shortcut {shortcut} has no setting {name!r}", f"its settings: {flags}"
            )


def shortcut_type(text: str) -> str:
    """The canonical name of a shortcut.

    Of a user's own class only the name is checked here; the class is checked when imported.

    Raises:
        UserError: it is neither a row of SHORTCUTS nor module:Class; names the closest row, or all.
    """
    if ":" in text:
        return str(OwnName.of(text))
    if text not in shortcuts():
        raise unknown("shortcut", text, shortcuts())
    return text


def own_settings(name: str) -> dict[str, Any]:
    """The settings in the name of a user's own unit or shortcut; empty for the paper's."""
    return OwnName.of(name).settings if ":" in name else {}


def check_shortcut(name: str, given: Iterable[str]) -> None:
    """Refuse flags that are no settings of the shortcut, or that its name sets too.

    Raises:
        UserError: names the flag, and for a row of SHORTCUTS its settings.
    """
    if ":" not in name:
        check_settings(name, given, shortcuts()[name].settings)
    elif twice := own_settings(name).keys() & {*given}:
        flag = flag_name(min(twice))
        raise UserError(f"{flag} is in the name {name} too", "give it in one of them")
