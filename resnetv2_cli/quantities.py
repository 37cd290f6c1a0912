"""Numbers with units, formatted for people."""

NONE = "—"  # in place of an unknown number or word
TOP = 5  # guesses of the top-5 error, which means nothing among so few classes


def duration(seconds: float | None) -> str:
    """``40 s``, ``12 min``, ``3.5 h`` or ``2.1 days``; a dash if unknown."""
    if seconds is None:
        return NONE
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            number = seconds / size
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes as ``30 kB``, ``1.2 MB`` or ``340 GB``."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            number = count / one
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.1f} {unit}"
    return f"{count:.0f} bytes"
