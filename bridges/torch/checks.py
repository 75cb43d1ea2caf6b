"""Checks on values that a compiled program makes as it runs, and their errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch


@dataclass
class Checks:
    """Conditions met while a graph was traced, each a 0-d bool array that is True where something is wrong."""

    failed: list[Any] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)  # the error's class, its text
    where: str = ""

    def outputs(self) -> list[Any]:
        """What the program gives besides its results: one array of bools, or nothing."""
        return [jnp.stack(self.failed)] if self.failed else []


_current: ContextVar[Checks | None] = ContextVar("kpx_checks", default=None)


@contextlib.contextmanager
def collecting(checks: Checks | None) -> Iterator[None]:
    """Collects the checks that rules ask for; with None, rules ask for none (under a JAX transformation)."""
    token = _current.set(checks)
    try:
        yield
    finally:
        _current.reset(token)


def at(where: str) -> None:
    """Names the op, and the place in the model, that the next checks are of."""
    if (checks := _current.get()) is not None:
        checks.where = where


def in_range(indices: Any, low: int, high: int, dim: int) -> None:
    """Asks that all indices lie in [low, high), as PyTorch does on the CPU."""
    checks = _current.get()
    if checks is None or isinstance(indices, (int, np.ndarray)) or not indices.size:
        return
    if indices.dtype == jnp.bool_ or (np.iinfo(indices.dtype).max < high and np.iinfo(indices.dtype).min >= low):
        return
    message = f"an index is out of range for dimension {dim} with size {high}"
    holds(jnp.all((indices >= low) & (indices < high)), message, "IndexError")


def holds(condition: Any, message: str, error: str) -> None:
    """Asks that a 0-d bool array is True; else the call raises the error named, one of `_ERRORS`."""
    checks = _current.get()
    if checks is not None:
        checks.failed.append(~condition)
        checks.messages.append((error, f"{checks.where}: {message}"))


_ERRORS = {"IndexError": IndexError, "LinAlgError": torch.linalg.LinAlgError, "RuntimeError": RuntimeError}


def raise_failed(flags: np.ndarray, messages: Sequence[tuple[str, str]]) -> None:
    """Raises the error of the first check that failed, with what and where."""
    if flags.any():
        error, text = messages[int(np.flatnonzero(flags)[0])]
        raise _ERRORS[error](text)
