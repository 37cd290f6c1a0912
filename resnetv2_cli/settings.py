"""How an option is declared in one place (default, type, limits, help), and how it is checked."""

import types
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal, Union, get_args, get_origin

from resnetv2_cli.errors import UserError, shown, unknown

LONGEST = 4096  # bytes of a text
MOST = {int: 2**31 - 1, float: None}  # where a setting has no limit of its own

# Removed settings: each of their values, and the settings that replace it.
RENEWED: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "test_size": [(None, {}), (224, {"protocol": "224"}), (320, {"protocol": "320"})]
}

# The effect of changing a setting when a run is continued.
BITS = "other kernels round differently: the run will not end with the same bits"
PARTS = (
    "BN sees parts of another size from here on, and an epoch may end with another batch: the run "
    "will not end with the same bits"
)
LATER = "it applies from here on"
SAME = "the images are the same, wherever they are and whoever reads them"


def setting(
    default: Any,
    doc: str,
    panel: str,
    *,
    least: float | None = None,
    most: float | None = None,
    free: str = "",
    form: Callable[[str], str] = str,
) -> Any:
    """A field that is also a key of config files, a command-line flag and an entry of the help.

    ``least``, ``most``: the accepted range. ``free``: if not empty, the setting may change when a
    run is resumed, because it does not decide what is learned, with this effect. ``form``:
    normalizes a text, so that equivalent ones become the same, and refuses invalid ones.
    """
    limits = {"least": least, "most": most, "form": form}
    return field(default=default, metadata={"doc": doc, "panel": panel, "free": free, **limits})


def flag_name(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def rows(table: dict[str, Any]) -> Any:
    """The names of a table's rows as a Literal type."""
    return Literal[tuple(table)]  # type: ignore[valid-type]


def renewed(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, perhaps of an older version, under their current names.

    Raises:
        UserError: a removed setting has a value that nothing replaces.
    """
    rest = dict(given)
    for name in RENEWED.keys() & given.keys():
        value = rest.pop(name)
        meant = [now for before, now in RENEWED[name] if before == value]
        if not meant:
            known = ", ".join(str(before) for before, _ in RENEWED[name] if before)
            raise UserError(f"{name} {shown(value)} is no longer known", f"only {known}")
        rest |= meant[0]
    return rest


def kinds(f: Any) -> tuple[type, tuple[Any, ...], bool]:
    """The plain type of a field, its choices if it has them, and whether it may be None."""
    parts = get_args(f.type) if get_origin(f.type) in (Union, types.UnionType) else (f.type,)
    optional = type(None) in parts
    [kind] = [p for p in parts if p is not type(None)]
    if get_origin(kind) is Literal:
        return str, get_args(kind), optional
    return kind, (), optional


def checked(f: Any, value: Any) -> Any:
    """The value of a field, of the field's type; 1e-4, which YAML reads as text, becomes a number.

    Raises:
        UserError: the value has another type, is none of the choices, or is not finite, too
            small or too large.
    """
    kind, choices, optional = kinds(f)
    if value is None and optional:
        return None
    if choices:
        if type(value) is int:  # as YAML reads a name made of digits
            value = shown(value)
        if value not in choices:
            raise unknown(f.name, value, choices)
        return value
    wrong = UserError(f"{f.name} must be {_A[kind]}, not {shown(value)}", f.metadata["doc"])
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise wrong
    if kind is str:
        if isinstance(value, str) and is_text(value):
            return f.metadata["form"](value)
        if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
            return f.metadata["form"](str(value))  # as YAML reads devices: 2 and drops: 0.5
        raise wrong
    try:
        number = kind(value)
        if (isinstance(value, float) and number != value) or number != number:
            raise wrong
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    least, most = f.metadata["least"], f.metadata["most"] or MOST[kind]
    for wanted, broken in (
        ("finite", abs(number) == float("inf")),
        (f"at least {least}", least is not None and number < least),
        (f"at most {most}", most is not None and number > most),
    ):
        if broken:
            raise UserError(f"{f.name} must be {wanted}, not {shown(value)}", f.metadata["doc"])
    return number


def drops(text: str) -> tuple[float, ...]:
    """The fractions of the training after which the learning rate drops, from a text with commas.

    Raises:
        UserError: they are not numbers, or do not rise from 0 to 1.
    """
    try:
        found = tuple(float(share) for share in text.split(",") if share.strip())
    except ValueError:
        raise UserError(f"drops {shown(text)} are no numbers", "such as 0.5,0.75") from None
    if list(found) != sorted(found) or not all(0 <= share <= 1 for share in found):
        raise UserError(f"drops must rise from 0 to 1, not {shown(text)}", "the paper's: 0.5,0.75")
    return found


def is_text(value: str) -> bool:
    """Whether a text can be written to a file and be the name of one."""
    try:
        return len(value.encode()) <= LONGEST and "\0" not in value
    except UnicodeEncodeError:
        return False


_A = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
