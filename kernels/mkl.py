"""Intel MKL's matrix products as XLA custom calls on the CPU, where they can be had.

PyTorch's x86 build carries MKL and exports its functions; kpx uses those of a PyTorch that the process has
loaded. The glue between XLA and MKL (mkl.cc) is compiled once a machine, with the C++ compiler that torch.compile
needs too. Where anything is missing, products stay XLA's own; `missing()` says what it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

import jax

from kpx.errors import KpxError

_SOURCE = pathlib.Path(__file__).with_name("mkl.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
# One target a kind of product: f32, bf16 to f32, and f32 as three bf16 products.
TARGETS = ("kpx_matmul_f32", "kpx_matmul_bf16", "kpx_matmul_f32_as_three_bf16")
# Fortran's interface for f32: of C's, PyTorch exports only what it calls itself.
_FUNCTIONS = ("SGEMM", "cblas_gemm_bf16bf16f32", "MKL_Set_Num_Threads_Local")

_lock = threading.Lock()


class _Missing(KpxError):
    """Something that MKL's products need is not here."""


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
        glue = _glue()
    except _Missing as error:
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


def _glue() -> ctypes.CDLL:
    """The compiled glue: from the user's cache folder, or made now."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise _Missing("there is no C++ compiler")
    headers = jax.ffi.include_dir()
    cpu = next((line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), "")
    known = "\n".join([_SOURCE.read_text(), compiler, headers, jax.__version__, *_FLAGS, cpu])
    name = f"kpx_mkl_{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    for folder in (_cache(), pathlib.Path(tempfile.gettempdir()) / f"kpx-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid == os.getuid():  # never load what another user may have put there
                return _compiled(compiler, headers, folder / name)
    raise _Missing(f"neither {_cache()} nor the folder of temporary files can be written")


def _compiled(compiler: str, headers: str, path: pathlib.Path) -> ctypes.CDLL:
    """The glue at a path, compiled where it is missing or damaged."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    _compile(compiler, headers, path)
    return ctypes.CDLL(str(path))


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kpx"


def _compile(compiler: str, headers: str, to: pathlib.Path) -> None:
    """Compiles into a file of this process's own, then renames: others may be compiling it too."""
    with tempfile.NamedTemporaryFile(dir=to.parent, suffix=".so", delete=False) as file:
        pass
    command = [*compiler.split(), *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", file.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        os.unlink(file.name)
        raise _Missing(f"the C++ compiler cannot be run ({error})") from None
    if done.returncode:
        os.unlink(file.name)
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise _Missing(f"{compiler} could not compile mkl.cc: {first}")
    os.replace(file.name, to)
