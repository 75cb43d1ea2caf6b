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


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, called in turn for a number of rounds, so that noise hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(once(function))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
