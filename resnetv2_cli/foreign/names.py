"""Layer names as patterns: ``layer{s}.{u-1}.conv{k}``, where s, u, k and K are whole numbers.

A hole is a letter, optionally with a factor before it and an offset after it: ``{3k-5}``.
"""

import re
from collections.abc import Mapping
from functools import cache

HOLE = re.compile(r"\{(\d*)(\w)([+-]\d+)?\}")


def filled(pattern: str, numbers: Mapping[str, int]) -> str:
    """The pattern with its holes filled with numbers."""
    return HOLE.sub(
        lambda hole: str(int(hole[1] or 1) * numbers[hole[2]] + int(hole[3] or 0)), pattern
    )


def numbers(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers that fill the pattern to give ``name``; None if none do."""
    match = _expression(pattern).fullmatch(name)
    if match is None:
        return None
    found: dict[str, int] = {}
    for (factor, letter, offset), text in zip(HOLE.findall(pattern), match.groups(), strict=True):
        number, rest = divmod(int(text) - int(offset or 0), int(factor or 1))
        if rest or number < 1 or found.setdefault(letter, number) != number:
            return None
    return found


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    between = re.split(r"\{[^}]*\}", pattern)
    return re.compile(r"(\d+)".join(map(re.escape, between)))
