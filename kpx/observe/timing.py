"""Timing things against each other: interleaved in one process, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def turn(function: Callable[[], object], least: float = 0.15) -> float:
    """Seconds of one call; where that is short, the median of as many as fit into `least` seconds, after the first.

    The first call after another function's turn pays for what that left behind: its threads may still spin,
    and caches hold its data.
    """
    seconds = once(function)
    if seconds >= least:
        return seconds
    end, taken = time.perf_counter() + least, []
    while not taken or time.perf_counter() < end:
        taken.append(once(function))
    return statistics.median(taken)


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function over a number of rounds, a turn each, so that noise hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(turn(function))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
