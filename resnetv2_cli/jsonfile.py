"""JSON files: written wholly or not at all, and nothing in them that JSON does not know."""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from resnetv2_cli.files import write_text


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A value as JSON; null for what is not finite."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def write(path: Path, value: Any) -> None:
    """Replace a file by a value.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    write_text(path, text(value) + "\n")


def mapping(path: Path) -> dict[str, Any]:
    """A file's object; empty if there is none, or none yet."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return {}


def parsed(content: bytes) -> dict[str, Any]:
    """The object that a file's content is; empty if it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
