"""oneDNN's products and convolutions over packed weights, as XLA custom calls on the CPU.

The packages `onednn-cpu-gomp` and `onednn-devel-cpu-gomp` (the extra `onednn`) carry it: the last builds on PyPI that
need no SYCL. The glue between XLA and it (onednn.cc) is compiled once a machine. Where anything is missing, everything
stays XLA's own; `missing()` says what it was.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
import threading
from collections.abc import Sequence

import jax

from kpx.kernels import native

TARGETS = ("kpx_onednn_pack", "kpx_onednn_matmul", "kpx_onednn_quantized", "kpx_onednn_conv", "kpx_onednn_attention")
# What may follow a product or a convolution in its call; the numbers are those of onednn.cc.
STEPS = {"bias": 1, "relu": 2, "gelu": 3, "gelu_tanh": 4, "silu": 5, "tanh": 6, "logistic": 7, "add": 8, "multiply": 9,
         "scale": 10, "shift": 11}  # fmt: skip
VECTORS = ("bias", "scale", "shift")  # take a number for each column, or channel

_lock = threading.Lock()


def available() -> bool:
    """Whether oneDNN can be called in this process; the first time that it can, its calls are made ready."""
    return missing() is None


def missing() -> str | None:
    """What oneDNN's calls lack here, or None."""
    with _lock:
        found = _load()
    return found if isinstance(found, str) else None


def packed_bytes(
    sizes: Sequence[int], steps: Sequence[int], types: Sequence[str], *, quantized: bool = False
) -> int | None:
    """The bytes of the packed weights of a call, or None where oneDNN computes no such product or convolution.

    Args:
        sizes, steps: the attributes of that name, see onednn.cc.
        types: `f32` or `bf16`: of the operand, the result, then of what the steps take.
        quantized: of a product by int8 weights, whose operand is quantized.
    """
    glue = _load()
    if isinstance(glue, str) or not set(types) <= {"f32", "bf16"}:
        return None
    arrays = [(ctypes.c_int64 * max(len(a), 1))(*a) for a in (sizes, steps, [int(t == "bf16") for t in types])]
    given = [x for a, count in zip(arrays, map(len, (sizes, steps, types)), strict=True) for x in (a, count)]
    found = glue.kpx_onednn_bytes(*given, int(quantized))
    return found if found >= 0 else None


def column_blocks(rows: int, columns: int) -> int:
    """Into how many blocks of columns a product is cut, so that every core has work where rows are few."""
    tasks = 2 * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    by_rows = max(1, rows // 32)
    return max(1, min(-(-tasks // by_rows), columns // 128)) if by_rows < tasks else 1


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The glue, its calls registered, or what is missing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"its packages are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    try:
        library, header = (
            _file("onednn-cpu-gomp", "libdnnl.so.3"),
            _file("onednn-devel-cpu-gomp", "oneapi/dnnl/dnnl.hpp"),
        )
        include = header.parents[2]
        folder = library.parent
        flags = [f"-I{include}", f"-L{folder}", f"-l:{library.name}", "-l:libgomp.so.1", f"-Wl,-rpath,{folder}"]
        glue = native.load("onednn.cc", further=flags)
    except native.Missing as error:
        return str(error)
    glue.kpx_onednn_bytes.restype = ctypes.c_int64
    arrays = ctypes.POINTER(ctypes.c_int64)
    glue.kpx_onednn_bytes.argtypes = [*[arrays, ctypes.c_int64] * 3, ctypes.c_int64]
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(glue, name)), platform="cpu")
    return glue


def _file(package: str, ends: str) -> pathlib.Path:
    """A file that a package installed."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise native.Missing(f"the package {package} is not installed (pip install 'kpx-xla[onednn]')") from None
    for file in files:
        if file.as_posix().endswith(ends) and (path := pathlib.Path(str(file.locate()))).exists():
            return pathlib.Path(os.path.normpath(path))
    raise native.Missing(f"{package} has no {ends}")
