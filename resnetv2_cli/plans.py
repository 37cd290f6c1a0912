"""What the networks are, as data: unit types, blocks, stems, layouts and the arithmetic of depth.

To add a unit type: one row in UNITS. To add a block: one row in BLOCKS. To add a layout: one row in
LAYOUTS. Nothing here needs torch, so that help and error messages come at once.
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

UNITS = {  # what stands between two units: + ends one, | begins the next (Fig. 4)
    "original": "bn + relu |",
    "bn-after-add": "+ bn relu |",
    "relu-before-add": "bn relu + |",
    "relu-only-preact": "bn + | relu",
    "full-preact": "+ | bn relu",
}
OWN = ("unit", "shortcut")  # settings that may name code of one's own, module:Class
MARKS = {"+", "|"}  # a unit type that is written so is one of one's own


class Block(NamedTuple):
    """The weight layers of F."""

    kernels: tuple[int, ...]
    expansion: int  # channels out of F, over channels inside it


BLOCKS = {
    "single": Block(kernels=(3,), expansion=1),
    "basic": Block(kernels=(3, 3), expansion=1),
    "bottleneck": Block(kernels=(1, 3, 1), expansion=4),
}


class Stem(NamedTuple):
    """What stands before the first unit, and how wide the stages after it are."""

    kernel: int
    stride: int
    pool: bool  # a 3x3 max-pooling of stride 2 behind it
    channels: int
    widths: tuple[int, ...]  # channels inside F, stage by stage
    size: int  # side of the images it is made for, pixels


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
    """How one code base builds what the paper leaves open: settings of an experiment, the same in
    every row, so that one layout wins over another as a whole."""

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
        "timm's resnetv2*: as torchvision, but the max-pool takes what conv1 gives, and the first "
        "unit activates it as every other does",
        {"stride_on": "3x3", "pad": "raw", "option": "B", "first_act": "unit"},
    ),
}

DEEPEST = 10_000  # weight layers that a network may have
FIRST_BOTTLENECK = 164  # of the depths that fit both blocks, from here on: as the paper's networks


def parts(stem: str) -> tuple[str, ...]:
    """What a network consists of, from the image to the classes."""
    return ("stem", *(f"stage{i + 1}" for i in range(len(STEMS[stem].widths))), "head")


def check_frozen(frozen: Collection[str], stem: str) -> None:
    """Refuse to freeze what no network has, or all of it.

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
    """What stands between two units of a type: its row of UNITS, or itself, of one's own."""
    return UNITS.get(unit, unit)


def places(unit: str) -> tuple[str, str, str]:
    """A unit type cut at its marks: what ends F, what follows the addition (f), what opens F."""
    last, rest = between(unit).split("+")
    after, before = rest.split("|")
    return last.strip(), after.strip(), before.strip()


def unit_type(text: str) -> str:
    """A unit type by its name: ``bn+|bn`` is ``bn + | bn``, and ``+ | bn relu`` is full-preact.

    A class of the user's own is looked at when it is imported; here only its name is.

    Raises:
        UserError: it is no row of UNITS, no module:Class, nor what can stand between two units.
    """
    return str(OwnName.of(text, "mine:MyUnit")) if ":" in text else unit_between(text)


def unit_between(text: str) -> str:
    """A unit type by its row's name, or by what stands between two of it.

    Raises:
        UserError: it is no row of UNITS, nor what can stand between two units.
    """
    if not MARKS & {*text}:
        if text not in UNITS:
            raise unknown("unit", text, UNITS)
        return text
    words = re.findall(r"\w+|\S", text.lower())
    hint = "such as 'bn + | bn relu': BN and ReLU, where + adds x and | behind it splits"
    if other := [word for word in words if word not in {"bn", "relu", *MARKS}]:
        raise UserError(f"unit {shown(text)}: what is {other[0]!r}?", hint)
    if [word for word in words if word in MARKS] != ["+", "|"]:
        raise UserError(f"unit {shown(text)} has not one + and behind it one |", hint)
    whole = " ".join(words)
    for place in map(str.split, places(whole)):
        if len({*place}) < len(place):
            raise UserError(f"unit {shown(text)} has {place[0]} twice in one place", hint)
    return next((name for name, row in UNITS.items() if row == whole), whole)


def in_names(text: str) -> str:
    """A unit or a shortcut as part of a file's name: ``bn + | bn`` -> ``bn-add-split-bn``."""
    for sign, word in {"+": "add", "|": "split", " ": "-", ":": ".", "=": "-"}.items():
        text = text.replace(sign, word)
    return text


def laid_out(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, with those that a ``layout`` among them stands for; others win over it.

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


def default_block(depth: int, stem: str) -> str:
    """The block of a network known by its depth alone.

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
    """Units in each stage. On CIFAR n in each of three, from depth = 3 K n + 2: K weight layers a
    unit, and the stem and the head. On ImageNet a table.

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
    """What the first line of a shortcut's docstring says, and its settings with their defaults."""

    formula: str
    settings: dict[str, object]


@cache
def shortcuts() -> dict[str, ShortcutRow]:
    """Every row of ``SHORTCUTS``, read from the source of ``shortcuts.py``.

    Not imported from it: importing takes torch with it, and ``--help`` would wait two seconds.
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
    """A shortcut by its name, one for all that mean the same.

    A class of the user's own is looked at when it is imported; here only its name is.

    Raises:
        UserError: it is no row of SHORTCUTS, and no module:Class; names what there is.
    """
    if ":" in text:
        return str(OwnName.of(text))
    if text not in shortcuts():
        raise unknown("shortcut", text, shortcuts())
    return text


def own_settings(name: str) -> dict[str, Any]:
    """What is said behind the name of a unit or a shortcut of one's own; nothing of the paper's."""
    return OwnName.of(name).settings if ":" in name else {}


def check_shortcut(name: str, given: Iterable[str]) -> None:
    """Refuse flags that a shortcut has not as settings, or that its name has too.

    Raises:
        UserError: names what there is.
    """
    if ":" not in name:
        check_settings(name, given, shortcuts()[name].settings)
    elif twice := own_settings(name).keys() & {*given}:
        flag = flag_name(min(twice))
        raise UserError(f"{flag} is in the name {name} too", "give it in one of them")
