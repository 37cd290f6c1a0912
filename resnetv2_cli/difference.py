"""How two networks differ: in settings, in counts, and in the words of the paper's tables."""

from dataclasses import replace
from typing import Any

from resnetv2_cli import plans
from resnetv2_cli.data.catalog import known_classes
from resnetv2_cli.describe import decided, describe, skeleton
from resnetv2_cli.shortcuts import shortcut_class
from resnetv2_cli.source import Source
from resnetv2_cli.units import standing_between

WORDS = {
    "layers": "layers",
    "units": "units",
    "parameters": "parameters",
    "parameters_without_bn": "parameters without BN",
    "macs": "MACs",
}
COUNTED = ("parameters", "macs")  # of each part
LAID_OUT = plans.LAYOUTS["authors"].settings  # every layout sets the same ones


def difference(a: Source, b: Source) -> dict[str, Any]:
    """The differences of two networks, as plain values.

    ``settings``: those that differ, as [of a, of b], except layout settings that change neither
    network; ``counts``: [of a, of b, b - a]; ``parts``: the same for stem, stages and head whose
    parameters or MACs differ; ``words``: a sentence on the unit and on the shortcut, if they
    differ.

    Parameters are counted in numbers, MACs in multiply-adds of one image.
    """
    ours, theirs = settings(a), settings(b)
    made = [counted(source) for source in (a, b)]
    parts = [by_part(m) for m in made]
    return {
        "networks": [source.experiment.name for source in (a, b)],
        "settings": {
            k: [ours.get(k), theirs.get(k)]
            for k in {**ours, **theirs}
            if ours.get(k) != theirs.get(k)
            and (k not in LAID_OUT or acts(a, k, theirs[k]) or acts(b, k, ours[k]))
        },
        "counts": {k: apart(made[0][k], made[1][k]) for k in WORDS},
        "parts": {
            part: {k: apart(*(p.get(part, {}).get(k, 0) for p in parts)) for k in COUNTED}
            for part in {**parts[0], **parts[1]}
            if parts[0].get(part) != parts[1].get(part)
        },
        "words": [
            f"{what}: {texts[0]}; instead {texts[1]}"
            for what, say in SAYS.items()
            if (texts := [say(source) for source in (a, b)]) and texts[0] != texts[1]
        ],
    }


def settings(source: Source) -> dict[str, Any]:
    """The settings that determine a network and its classes, with defaults resolved."""
    return decided(source.experiment) | {"classes": classes(source)}


def acts(source: Source, name: str, value: Any) -> bool:
    """Whether this value of a setting changes the layers of a network: ``stride_on`` changes none
    in basic blocks."""
    other = replace(source.experiment, **{name: value})
    return str(skeleton(source.experiment)) != str(skeleton(other))


def classes(source: Source) -> int:
    """How many classes: the checkpoint's, else the dataset's; 1000 for a folder not read yet."""
    e = source.experiment
    return source.classes or known_classes(e.dataset, e.classes)


def counted(source: Source) -> dict[str, Any]:
    """``describe`` with the counts of layers and units."""
    made = describe(source.experiment, classes(source))
    return made | {"layers": made["depth"], "units": len(made["parts"]) - 2}


def by_part(made: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Parameters and MACs of the stem, each stage and the head."""
    found: dict[str, dict[str, int]] = {}
    for part in made["parts"]:
        into = found.setdefault(part["name"].split(".")[0], dict.fromkeys(COUNTED, 0))
        for k in COUNTED:
            into[k] += part[k]
    return found


def apart(a: int, b: int) -> list[int]:
    """Of a, of b, and b - a."""
    return [a, b, b - a]


def unit(source: Source) -> str:
    """A unit's name, what stands between two of them, and what at the three places of Fig. 4."""
    name, between = source.experiment.unit, standing_between(source.experiment.unit)
    last, after, before = (spoken(place) for place in plans.places(between))
    called = ", ".join(dict.fromkeys([name, between]))
    return (
        f"{called}: before F's first weights {before}, "
        f"after its last {last}, after the addition {after}"
    )


def spoken(place: str) -> str:
    """The layers at a place in words: ``BN and ReLU``, or ``nothing``."""
    words = {"bn": "BN", "relu": "ReLU"}
    return " and ".join(words[name] for name in place.split()) or "nothing"


def shortcut(source: Source) -> str:
    """A shortcut's name and the first line of its docstring, which is its formula."""
    name = source.experiment.shortcut
    formula = (shortcut_class(name).__doc__ or "").strip().partition("\n")[0]
    return f"{name}, {formula.removesuffix('.') or 'no formula'}"


SAYS = {"unit": unit, "shortcut": shortcut}


def rows(made: dict[str, Any]) -> list[list[str]]:
    """Everything that differs, and all counts, a row each: what, of a, of b, b - a."""
    found = [[k, str(a), str(b), ""] for k, (a, b) in made["settings"].items()]
    found += [line(WORDS[k], n) for k, n in made["counts"].items()]
    for part, numbers in made["parts"].items():
        found += [line(f"{part}: {WORDS[k]}", n) for k, n in numbers.items() if n[2]]
    return found


def line(what: str, numbers: list[int]) -> list[str]:
    """A count and its difference as a row of a table."""
    a, b, difference = numbers
    return [what, f"{a:,}", f"{b:,}", f"{difference:+,}"]
