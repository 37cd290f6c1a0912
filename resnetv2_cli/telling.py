"""Who hears what happens, a line at a time."""

from collections.abc import Callable

Tell = Callable[[str], None]


def silent(line: str) -> None:
    """Where nobody is told."""
