"""Intel's GPUs: the environment that their compiler needs, and what XLA must be told.

Intel's plugin for JAX is of another JAX than the one that most have, and has wheels for later versions of Python alone:
so it gets a Python environment of its own, and the worker runs there, with kpx as it is here.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from kpx.errors import TargetError

JAX = "0.11.2"  # the version that the plugin is of
PYTHON = (3, 12)  # the first that it has wheels for

COMPILER_OPTIONS = {
    # oneDNN, which products go to, makes no engine where there is no GPU: they stay XLA's own loops.
    "xla_gpu_gemm_rewrite_size_threshold": 100_000_000_000,
    # LLVM's optimizations give vectors that its SPIR-V cannot express. XLA's own are not changed by this.
    "xla_backend_optimization_level": 0,
}
REMARK = (
    "Intel's library of products cannot be planned for without its device: products are XLA's own loops here, and the "
    "program that a device would run differs. The compiler is experimental."
)


def python() -> str:
    """A Python here that the plugin has wheels for: this one, one on the path, or one of pyenv's.

    Raises:
        TargetError: there is none.
    """
    for found in _pythons():
        code = "import sys, venv; print(*sys.version_info[:2])"
        answer = subprocess.run([found, "-c", code], capture_output=True, text=True)
        if answer.returncode == 0 and tuple(map(int, answer.stdout.split())) >= PYTHON:
            return found
    wanted = ".".join(map(str, PYTHON))
    raise TargetError(
        f"Intel's compiler has wheels for Python {wanted} and later; this is Python {sys.version.split()[0]}, and no "
        f"other was found on the path or among pyenv's. Install Python {wanted} beside it (`uv python install {wanted}`, "
        f"`pyenv install {wanted}`, or your system's package), and run the command again."
    )


def _pythons() -> Iterator[str]:
    yield sys.executable
    names = [f"python3.{minor}" for minor in range(PYTHON[1], PYTHON[1] + 3)]
    yield from (path for name in names if (path := shutil.which(name)))
    versions = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv") / "versions"
    yield from (str(path) for name in names for path in sorted(versions.glob(f"*/bin/{name}")))


def requirements() -> list[str]:
    """What kpx itself needs, less JAX, which the plugin brings."""
    needed = importlib.metadata.requires("kpx-xla") or []
    return [r for r in needed if ";" not in r and not r.startswith("jax")]


def environment_python(folder: pathlib.Path) -> pathlib.Path:
    """The Python of an environment in a folder."""
    return folder / "bin" / "python"


def site_packages(folder: pathlib.Path) -> pathlib.Path | None:
    """Where an environment keeps its packages; None where it is not made."""
    return next(iter(sorted(folder.glob("lib/python3.*/site-packages"))), None)


def libraries(folder: pathlib.Path) -> list[pathlib.Path]:
    """The libraries of an environment that want the driver's, which stubs stand in for."""
    packages = site_packages(folder)
    found = [] if packages is None else sorted(packages.glob("jax_*plugin*/**/*.so"))
    return [*found, *sorted((folder / "lib").glob("libur_adapter_level_zero.so.0"))]
