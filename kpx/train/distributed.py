"""Processes of one job: how they find each other, and agree to stop."""

from __future__ import annotations

import os
import signal
from typing import Any

import jax
from jax.experimental import multihost_utils

from kpx.errors import ConfigError

COORDINATOR, COUNT, NUMBER, JOB, ATTEMPT, DEVICES = (
    f"KPX_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS", "JOB", "ATTEMPT", "DEVICES")
)
"""Environment variables that `python -m kpx launch` tells a process its place by."""

_HEARTBEAT_SECONDS = 10  # after which the others take a process for dead


def initialize() -> None:
    """Joins the job that `python -m kpx launch` started, or that SLURM, a TPU pod or Kubernetes tells of; once.

    Without any of them this process is alone, and nothing is done. To be called before JAX makes its devices.

    Raises:
        ConfigError: the environment names a job, and not this process's place in it.
    """
    if jax.distributed.is_initialized():
        return
    if (devices := os.environ.get(DEVICES)) is not None:
        jax.config.update("jax_num_cpu_devices", int(devices))
    options: dict[str, Any] = {"heartbeat_timeout_seconds": _HEARTBEAT_SECONDS}
    if (coordinator := os.environ.get(COORDINATOR)) is not None:
        try:
            count, number = int(os.environ[COUNT]), int(os.environ[NUMBER])
        except (KeyError, ValueError):
            given = ", ".join(f"{name}={os.environ.get(name)!r}" for name in (COORDINATOR, COUNT, NUMBER))
            raise ConfigError(
                f"The environment has {given}. All three are set together by `python -m kpx launch`: the coordinator's "
                "address, how many processes there are, and which this is."
            ) from None
        if count > 1:
            jax.distributed.initialize(coordinator, count, number, **options)
    elif os.environ.get("SLURM_NTASKS", "1") != "1" or os.environ.get("TPU_WORKER_HOSTNAMES", "").count(","):
        jax.distributed.initialize(**options)


class Preemption:
    """Whether the job is told to stop (SIGTERM): asked by every process at each step, and answered alike by all."""

    def __init__(self):
        self._told = False
        self._alone = jax.process_count() == 1
        if self._alone:
            try:
                self._before = signal.signal(signal.SIGTERM, self._tell)
            except ValueError:  # not the main thread, which alone may
                self._before = None

    def _tell(self, number, frame):
        self._told = True

    def is_due(self, step: int) -> bool:
        """Whether to save and to stop after this step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signal back."""
        if self._alone and self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
