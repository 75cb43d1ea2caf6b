"""Optimized programs on disk, so that a second process neither captures nor rewrites a model.

A program is a file: a line that says what it is, the digest of the rest, and the rest, pickled. It is written beside its
place and moved there, so that readers see it whole; one that is damaged, or not this user's, is not read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import pickle
import tempfile
import warnings
from typing import Any

from kpx.errors import KernelCacheWarning

_HEADER = b"kpx program 1\n"


def path(folder: str | os.PathLike, key: str) -> pathlib.Path:
    """Where a program is kept."""
    return pathlib.Path(folder) / "programs" / f"{key}.kpx"


def load(folder: str | os.PathLike, key: str) -> Any | None:
    """What was saved under a key; None where nothing was. A file that cannot be used is told of, and None."""
    file = path(folder, key)
    try:
        if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
            _warn(file, "it belongs to another user")
            return None
        contents = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(file, f"it cannot be read ({error.strerror})")
        return None
    header, digest, rest = contents[: len(_HEADER)], contents[len(_HEADER) :][:32], contents[len(_HEADER) + 32 :]
    if header != _HEADER or hashlib.sha256(rest).digest() != digest:
        _warn(file, "it is damaged, or of another version of kpx")
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own classes warn of themselves
            return pickle.loads(rest)
    except Exception as error:  # unpickling raises whatever the classes in it do
        _warn(file, f"it cannot be read ({type(error).__name__}: {error})")
        return None


def save(folder: str | os.PathLike, key: str, program: Any) -> None:
    """Keeps a program under a key. Where that cannot be done, a warning says why."""
    file = path(folder, key)
    try:
        rest = pickle.dumps(program, protocol=5)
    except Exception as error:  # as above
        _warn(file, f"it cannot be written ({type(error).__name__}: {error})")
        return
    name = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(_HEADER + hashlib.sha256(rest).digest() + rest)
        os.replace(name, file)
    except OSError as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        _warn(file, f"it cannot be written ({error.strerror})")


def _warn(file: pathlib.Path, why: str) -> None:
    message = f"The program at `{file}` was not used: {why}. The model is compiled anew."
    warnings.warn(message, KernelCacheWarning, stacklevel=4)
