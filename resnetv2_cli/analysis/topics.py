"""What ``analyze`` studies, as data.

To add a topic: one row in TOPICS, and a module of that name beside this one, with ``measure``,
``table`` and ``draw``. Nothing here needs torch, so that help is fast.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """What a topic shows, and whether only a trained network can show it."""

    doc: str
    trained: bool = False


TOPICS = {
    "forward": Topic("norms of x_l and F_l, the additive form (Eq. 4), the share of y_l < 0"),
    "backward": Topic("dL/dx_l, its direct term and its term through the weights (Eqs. 5, 8)"),
    "shrink": Topic("the gradient when F is made arbitrarily small (Sec. 2, Eq. 5)"),
    "paths": Topic("the gradient by path length (Veit et al. 2016)"),
    "lesion": Topic("test error with units deleted or swapped", trained=True),
}


class Table(NamedTuple):
    """A topic's results for a terminal; ``notes`` are sentences below the table."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()
