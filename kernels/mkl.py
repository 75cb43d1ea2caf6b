"""Intel MKL's matrix products as XLA custom calls on the CPU, where they can be had.

PyTorch's x86 build carries MKL and exports its functions; kpx uses those of a PyTorch that the process has
loaded. The glue between XLA and MKL (mkl.cc) is compiled once a machine, with the C++ compiler that torch.compile
needs too. Where anything is missing, products stay XLA's own; `missing()` says what it was.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import sys
import threading

import jax

from kpx.kernels import native

# One target a kind of product: f32, bf16 to f32, and f32 as three bf16 products.
TARGETS = ("kpx_matmul_f32", "kpx_matmul_bf16", "kpx_matmul_f32_as_three_bf16")
# Fortran's interface for f32: of C's, PyTorch exports only what it calls itself.
_FUNCTIONS = ("SGEMM", "cblas_gemm_bf16bf16f32", "MKL_Set_Num_Threads_Local")

_lock = threading.Lock()


def available() -> bool:
    """Whether MKL's products can be called in this process; the first time that they can, they are made ready."""
    return missing() is None


def missing() -> str | None:
    """What MKL's products lack here, or None."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "__file__"):
        return "PyTorch, whose MKL is used, is not loaded"
    with _lock:
        return _load(torch.__file__)


@functools.cache
def _load(torch_file: str) -> str | None:
    if not _is_intel():  # MKL takes slower paths on other makers' CPUs
        return "the CPU is not Intel's"
    try:
        mkl = ctypes.CDLL(os.path.join(os.path.dirname(torch_file), "lib", "libtorch_cpu.so"))
        functions = [ctypes.cast(getattr(mkl, name), ctypes.c_void_p) for name in _FUNCTIONS]
    except (OSError, AttributeError) as error:
        return f"this PyTorch does not export MKL ({error})"
    try:
        glue = native.load("mkl.cc")
    except native.Missing as error:
        return str(error)
    glue.kpx_mkl_bind(*functions)
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(glue, name)), platform="cpu")
    return None


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
