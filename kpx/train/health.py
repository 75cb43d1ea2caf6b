"""The health of a job: a loss that is no number, a step that hangs, hosts that fall behind, how hot devices are."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

from kpx.errors import TrainingError

HUNG = 75
"""The exit code of a process whose step hung; its launcher starts the job again."""

_STRAGGLES = 1.5  # times the median of all


class Watchdog:
    """Ends the process, with every thread's stack on stderr, where a step takes longer than it may.

    A collective that another process never joins cannot be interrupted; ending this one lets the job start again.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._step, self._since = seconds, 0, time.monotonic()
        self._done = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, daemon=True, name="kpx-watchdog").start()

    def at(self, step: int) -> None:
        """A step begins."""
        self._step, self._since = step, time.monotonic()

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        assert self._seconds is not None
        while not self._done.wait(min(self._seconds / 4, 1.0)):
            if (taken := time.monotonic() - self._since) > self._seconds:
                faulthandler.dump_traceback(file=sys.stderr)
                sys.stderr.write(
                    f"kpx: process {jax.process_index()} hangs in step {self._step}: {taken:.0f} s, where {self._seconds:g} s may "
                    f"be. It ends itself with exit code {HUNG}; its threads are above.\n"
                )
                sys.stderr.flush()
                os._exit(HUNG)


def check_finite(metrics: dict[str, float], step: int) -> None:
    """Raises where a loss or a gradient is no number.

    Raises:
        TrainingError: with the process's rank and the step.
    """
    wrong = {name: number for name, number in metrics.items() if not math.isfinite(number)}
    if wrong:
        told = ", ".join(f"{name}={number}" for name, number in wrong.items())
        raise TrainingError(
            f"Step {step} gave {told} on process {jax.process_index()}. The last checkpoint is from before it. A smaller "
            "learning rate, `clip=`, or a look at this step's batch may help; `jax.config.update('jax_debug_nans', True)` names "
            "the operation.",
            step,
        )


def stragglers(seconds: float) -> dict[int, float]:
    """Processes whose own time for a step is far above the median of all, with how many times that.

    Every process calls it together.
    """
    if jax.process_count() == 1:
        return {}
    from jax.experimental import multihost_utils

    every = np.asarray(multihost_utils.process_allgather(np.float32(seconds))).reshape(-1)
    median = float(np.median(every))
    return {n: float(s / median) for n, s in enumerate(every) if median > 0 and s > _STRAGGLES * median}


def devices() -> list[dict[str, Any]]:
    """Power (W) and temperature (degrees Celsius) of this host's GPUs; nothing where the platform does not tell."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no device
        return []
    found = []
    for n in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(n)
        heat = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        found.append({"device": n, "watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000, "celsius": heat})
    return found
