"""JSON files: written atomically, with nothing in them that standard JSON does not allow."""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from resnetv2_cli.files import write_text


def finite(value: Any) -> Any:
    """The same value, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A value as JSON; null for numbers that are not finite."""
    return json.dumps(finite(value), indent=2, allow_nan=False)


def write(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    write_text(path, text(value) + "\n")


def mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or holds none."""
    try:
        return parsed(path.read_bytes())
    except OSError:
        return {}


def parsed(content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content; empty if it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
