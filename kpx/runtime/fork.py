"""Forked processes: JAX's threads do not exist in them, and a call would wait for them forever."""

from __future__ import annotations

import os

from kpx import jax_internals
from kpx.errors import ForkError

_is_forked = False


def _before() -> None:
    global _had_backend
    _had_backend = jax_internals.has_backend()


def _after_in_child() -> None:
    global _is_forked
    if _had_backend and not _is_forked:
        jax_internals.keep_threads()
    _is_forked = _is_forked or _had_backend


_had_backend = False
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_after_in_child)


def check() -> None:
    """Raise an error in a process that was forked from one in which JAX had started.

    Raises:
        ForkError: this is such a process.
    """
    if _is_forked:
        raise ForkError(
            f"Process {os.getpid()} was forked from one that had run compiled programs, whose threads it does not have. "
            "Start worker processes with `multiprocessing.get_context('spawn')` (a DataLoader: "
            "`multiprocessing_context='spawn'`), or fork before the first call."
        )
