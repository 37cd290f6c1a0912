"""Arms timed in turn in one process, and their summary: medians of ratios."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

from resnetv2_cli import memory

WARM = 2  # untimed iterations of each turn: allocators, worker processes and kernel choices settle
Arm = Callable[[int], float]  # iterations -> seconds per iteration


class Turn(NamedTuple):
    """One turn of one arm: seconds per iteration, and the peak memory of the process in bytes.

    On a GPU the peak counts only memory reserved in addition to what was reserved before. None
    where it is not known, as for a replayed graph.
    """

    seconds: float
    peak: int | None


def finish(device: torch.device) -> None:
    """Wait until the device has done all queued work, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: torch.device) -> Arm:
    """An arm that repeats one step."""

    def run(steps: int) -> float:
        for i in range(WARM + steps):
            if i == WARM:
                finish(device)
                began = time.perf_counter()
            step()
        finish(device)
        return (time.perf_counter() - began) / steps

    return run


def in_turns(
    arms: Mapping[str, Arm], rounds: int, steps: int, device: torch.device
) -> dict[str, list[Turn]]:
    """Time ``steps`` iterations of each arm in turn, ``rounds`` times over.

    So a drift in the machine's speed affects all arms alike.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            fresh = memory.forget_peak()
            there = 0
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                there = torch.cuda.memory_reserved(device)  # by all arms, their graphs too
            seconds = arm(steps)
            peak = memory.peak(device)
            known = peak["host"] if fresh else None
            if peak["device"] is not None:
                known = (peak["device"] - there) or None  # a replay allocates nothing new
            turns[name].append(Turn(seconds, known))
    return turns


def ratios(turns: Mapping[str, list[Turn]], one: str, other: str) -> list[float]:
    """How many times as fast ``one`` is as ``other``, round by round."""
    pairs = zip(turns[other], turns[one], strict=True)
    return [slow.seconds / fast.seconds for slow, fast in pairs]


def rows(turns: Mapping[str, list[Turn]], first: str, images: int) -> dict[str, dict[str, Any]]:
    """For each arm: images per second, speed relative to ``first`` (median, least and most over
    rounds), and peak memory in bytes."""
    made = {}
    for name, taken in turns.items():
        times, found = ratios(turns, name, first), [t.peak for t in taken]
        made[name] = {
            "seconds": median(t.seconds for t in taken),
            "images_per_second": images / median(t.seconds for t in taken),
            "ratio": median(times),
            "least": min(times),
            "most": max(times),
            "peak_bytes": None if None in found else max(found),  # type: ignore[type-var]
        }
    return made
