"""Code of ours in C++ for the CPU: compiled once a machine, with the C++ compiler that torch.compile needs too."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import jax

from kpx.errors import KpxError

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC")


class Missing(KpxError):
    """Something that a library's calls need is not here."""


def load(source: str, *, further: Sequence[str] = ()) -> ctypes.CDLL:
    """A file of this folder, compiled: from the user's cache folder, or made now.

    Args:
        source: its name, as `mkl.cc`.
        further: flags for the compiler, after the file's name.

    Raises:
        Missing: there is no C++ compiler, it refuses the file, or no folder can be written.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Missing("there is no C++ compiler")
    path = pathlib.Path(__file__).with_name(source)
    texts = [path.read_text(), *(header.read_text() for header in sorted(path.parent.glob("*.h")))]
    command = [*compiler.split(), *_FLAGS, f"-I{path.parent}", f"-I{jax.ffi.include_dir()}", str(path), *further]
    cpu = next((line for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), "")
    known = "\n".join([*texts, *command, jax.__version__, cpu])
    name = f"kpx_{path.stem}_{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    for folder in (_cache(), pathlib.Path(tempfile.gettempdir()) / f"kpx-{os.getuid()}"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid == os.getuid():  # never load what another user may have put there
                return _compiled(command, folder / name)
    raise Missing(f"neither {_cache()} nor the folder of temporary files can be written")


def _compiled(command: Sequence[str], path: pathlib.Path) -> ctypes.CDLL:
    """The library at a path, compiled where it is missing or damaged."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    _compile(command, path)
    return ctypes.CDLL(str(path))


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kpx"


def _compile(command: Sequence[str], to: pathlib.Path) -> None:
    """Compiles into a file of this process's own, then renames: others may be compiling it too."""
    with tempfile.NamedTemporaryFile(dir=to.parent, suffix=".so", delete=False) as file:
        pass
    try:
        done = subprocess.run([*command, "-o", file.name], capture_output=True, text=True, check=False)
    except OSError as error:
        os.unlink(file.name)
        raise Missing(f"the C++ compiler cannot be run ({error})") from None
    if done.returncode:
        os.unlink(file.name)
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise Missing(f"{command[0]} could not compile {to.name}: {first}")
    os.replace(file.name, to)
