"""Callables that receive progress messages, a line at a time."""

from collections.abc import Callable

Tell = Callable[[str], None]


def silent(line: str) -> None:
    """Discard a message."""
