"""How a class of the user's own is named: ``module:Class``, and with settings of its own
``module:Class:start=0.5:learned=true``, which no shell reads otherwise."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from resnetv2_cli.errors import UserError, shown

PLACE = r"\w+(?:\.\w+)*:\w+"
SETTING = r":(\w+)=([\w.+-]+)"
WORDS = {"true": True, "false": False}


class OwnName(NamedTuple):
    """Where a class is, and what it is made with beside what the network gives.

    As text: one for all that mean the same.
    """

    place: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, text: str, example: str = "mine:LearnedScale") -> Self:
        """What a text names.

        Raises:
            UserError: it is no module:Class with settings behind it, or has one of them twice.
        """
        if not re.fullmatch(f"{PLACE}(?:{SETTING})*", text):
            hint = f"a class of your own is named as {example}, a setting of it {example}:name=0.5"
            raise UserError(f"{shown(text)} is no module:Class", hint)
        given = re.findall(SETTING, text)
        names = [name for name, _ in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{shown(text)} has {twice[0]} twice", "give it once")
        place = re.match(PLACE, text)
        assert place
        return cls(place[0], {name: value(said) for name, said in sorted(given)})

    def __str__(self) -> str:
        said = [
            f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.settings.items()
        ]
        return ":".join([self.place, *said])


def value(text: str) -> Any:
    """A number, true, false or a word. 1.0 is 1, as the same number has one text.

    Raises:
        UserError: it is a number that is not finite.
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise UserError(f"{text} is not finite", "numbers, true, false and words may be given")
    return int(number) if number.is_integer() else number


def settled(kind: str, name: OwnName, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is given, of a class that is known to have such settings, with these defaults.

    Raises:
        UserError: it has no such one, or one of another type.
    """
    made = {}
    for setting, given in name.settings.items():
        if setting not in known:
            hint = f"its settings: {', '.join(known) or 'none'} ({where})"
            raise UserError(f"{kind} {name.place} has no setting {setting!r}", hint)
        if (wanted := _sort(known[setting])) not in ("", _sort(given)):
            said = f"{setting} of {kind} {name.place} must be {wanted}, not {shown(given)}"
            raise UserError(said, f"its default is {shown(known[setting])}")
        made[setting] = float(given) if isinstance(known[setting], float) else given
    return made


def _sort(given: object) -> str:
    """What kind of value it is; empty where that says nothing."""
    if isinstance(given, bool):
        return "true or false"
    if isinstance(given, int | float):
        return "a number"
    return "a word" if isinstance(given, str) else ""
