"""Products of few rows by weights that stay in int8 or int4, as XLA custom calls on the CPU.

The call (weights_only.cc) is compiled once a machine. Where it cannot be, XLA widens the weights first.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
import threading
from typing import Any

import jax

from kpx.kernels import native

TARGET = "kpx_weights_only"

_lock = threading.Lock()


def is_call(op: Any) -> bool:
    """Whether an op is such a call."""
    return op.operation.name == "stablehlo.custom_call" and op.call_target_name.value == TARGET


def available() -> bool:
    """Whether the call can be made in this process; the first time that it can, it is made ready."""
    return missing() is None


def missing() -> str | None:
    """What the call lacks here, or None."""
    with _lock:
        found = _load()
    return found if isinstance(found, str) else None


@functools.cache
def _load() -> ctypes.CDLL | str:
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform} on {platform.machine()}"
    try:
        glue = native.load("weights_only.cc")
    except native.Missing as error:
        return str(error)
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(glue.kpx_weights_only), platform="cpu")
    return glue
