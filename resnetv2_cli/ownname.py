"""How a class of the user's own is named: ``module:Class``, or with settings
``module:Class:start=0.5:learned=true``, in which no character is special to a shell."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from resnetv2_cli.errors import UserError, shown

PLACE = r"\w+(?:\.\w+)*:\w+"
SETTING = r":(\w+)=([\w.+-]+)"
WORDS = {"true": True, "false": False}


class OwnName(NamedTuple):
    """Where a class is, and the settings that it gets beside the arguments from the network.

    As text: the same for all names that mean the same.
    """

    place: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, text: str, example: str = "mine:LearnedScale") -> Self:
        """Parse a name.

        Raises:
            UserError: it is not module:Class, with or without settings, or has a setting twice.
        """
        if not (found := named(text)):
            hint = f"a class of your own is named as {example}, a setting of it {example}:name=0.5"
            raise UserError(f"{shown(text)} is no module:Class", hint)
        given = re.findall(SETTING, found[2])
        settings = {name: value(said) for name, said in sorted(given)}
        if len(settings) < len(given):
            raise UserError(f"{shown(text)} has a setting twice", "give it once")
        return cls(found[1], settings)

    def __str__(self) -> str:
        return ":".join([self.place, *(f"{k}={spelled(v)}" for k, v in self.settings.items())])


def named(text: str) -> re.Match[str] | None:
    """Match a whole text as the name of a class and its settings; None if it is not one."""
    return re.fullmatch(rf"({PLACE})((?:{SETTING})*)", text)


def value(text: str) -> Any:
    """An int, a float, true, false or a word, as the text is written.

    Raises:
        UserError: it is a number that is not finite.
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if abs(number) == math.inf or number != number:
            raise UserError(f"{text} is not finite", "numbers, true, false and words may be given")
        return number
    return text


def spelled(given: object) -> str:
    """A value as it is written in a name."""
    return str(given).lower() if isinstance(given, bool) else str(given)


def settled(kind: str, name: OwnName, known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in a name, checked against those that the class has: ``known``, with defaults.

    Raises:
        UserError: the class has no such setting, or one of another type.
    """
    made = {}
    for setting, given in name.settings.items():
        if setting not in known:
            hint = f"its settings: {', '.join(known) or 'none'} ({where})"
            raise UserError(f"{kind} {name.place} has no setting {setting!r}", hint)
        usual = known[setting]
        if isinstance(usual, str):
            given = spelled(given)
        elif (wanted := _sort(usual)) not in ("", _sort(given)):
            said = f"{setting} of {kind} {name.place} must be {wanted}, not {shown(given)}"
            raise UserError(said, f"its default is {shown(usual)}")
        made[setting] = float(given) if isinstance(usual, float) else given
    return made


def _sort(given: object) -> str:
    """What kind of value it is, in words; empty for None, which stands for any."""
    if isinstance(given, bool):
        return "true or false"
    return "a number" if isinstance(given, int | float) else "a word" if given is not None else ""
