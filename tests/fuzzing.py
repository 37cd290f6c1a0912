"""Random bytes for fuzzing; ``RESNETV2_FUZZ=50`` tries fifty times as many cases."""

import os

from hypothesis import settings
from hypothesis import strategies as st

MUCH = int(os.environ.get("RESNETV2_FUZZ", "1"))


def cases(n: int):
    return settings(max_examples=n * MUCH)


@st.composite
def mutated(draw, contents: list[bytes]) -> bytes:
    """One of the contents, with bytes changed, removed or inserted in a few places."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, len(content)))
        what = draw(st.sampled_from(["flip", "cut", "insert", "end"]))
        if what == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del content[place : place + draw(st.integers(1, 64))]
        elif what == "insert":
            content[place:place] = draw(st.binary(max_size=16))
        elif what == "end":
            del content[place:]
    return bytes(content)
