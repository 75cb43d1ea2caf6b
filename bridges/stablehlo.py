"""StableHLO modules that other tools wrote, as JAX functions."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from kpx.errors import InputError
from kpx.ir import module as m
from kpx.ir.call import call_module

__all__ = ["load"]


def load(source: str | os.PathLike | bytes) -> Callable:
    """A StableHLO module as a function of positional JAX arrays, which gives a list of arrays.

    The function can be jitted, with `kpx.jit` too, and composed. It cannot be differentiated.

    Args:
        source: a file, or its contents: StableHLO text, MLIR bytecode, or a portable artifact (which any version of
            StableHLO up to this one may have written).

    Raises:
        InputError: there is no such file, or it holds none of the three. From the function: the arguments' shapes
            or dtypes are not the module's.
    """
    return call_module(m.load(_contents(source)))


def _contents(source: str | os.PathLike | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and ("\n" in source or "func.func" in source):
        return source.encode()
    try:
        return pathlib.Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"`{source}` cannot be read: {error}. Pass a file's path, or its contents as bytes.") from None
