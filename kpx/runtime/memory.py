"""The process's memory, where its C library is glibc."""

from __future__ import annotations

import ctypes
import functools
import sys

# malloc.h's names. A block of 32 MiB is the largest that glibc can be told not to map for itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAPPED_FROM, _TRIMMED_FROM = 1 << 25, (1 << 31) - 1


def give_back_freed() -> None:
    """Returns to the system what compilations and captures have freed, where the C library keeps it (glibc)."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@functools.cache
def keep_freed() -> None:
    """Has this process keep memory that it frees, to use it again: a training step frees what the next one needs.

    Otherwise glibc returns a backward pass's memory as soon as it is freed, and each step's gradients meet pages that
    the system must first clear: 23,000 of them in MiniLM's, a twentieth of the step.
    """
    if (library := _glibc()) is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIMMED_FROM)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
