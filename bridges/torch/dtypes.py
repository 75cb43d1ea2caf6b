"""PyTorch's dtypes and JAX's, and PyTorch's type promotion."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import torch

from kpx.errors import InputError

_TO_JAX = {
    torch.float64: jnp.float64,
    torch.float32: jnp.float32,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float8_e4m3fn: jnp.float8_e4m3fn,
    torch.float8_e5m2: jnp.float8_e5m2,
    torch.complex64: jnp.complex64,
    torch.complex128: jnp.complex128,
    torch.int64: jnp.int64,
    torch.int32: jnp.int32,
    torch.int16: jnp.int16,
    torch.int8: jnp.int8,
    torch.uint8: jnp.uint8,
    torch.uint16: jnp.uint16,
    torch.uint32: jnp.uint32,
    torch.uint64: jnp.uint64,
    torch.bool: jnp.bool_,
}
_TO_JAX = {k: np.dtype(v) for k, v in _TO_JAX.items()}
_TO_TORCH = {v: k for k, v in _TO_JAX.items()}
_SCALARS = {bool: torch.bool, int: torch.int64, float: torch.float32, complex: torch.complex64}


def to_jax(dtype: torch.dtype) -> np.dtype:
    """The JAX dtype of a PyTorch dtype.

    Raises:
        InputError: the dtype has no counterpart (a quantized one, say).
    """
    try:
        return _TO_JAX[dtype]
    except KeyError:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _TO_JAX)
        raise InputError(
            f"A tensor of dtype {dtype} was given, which kpx cannot hold. Use one of: {allowed}."
        ) from None


def to_torch(dtype) -> torch.dtype:
    """The PyTorch dtype of a JAX dtype (see `to_jax`)."""
    return _TO_TORCH[np.dtype(dtype)]


def _category(dtype: torch.dtype) -> int:
    if dtype is torch.bool:
        return 0
    if dtype.is_complex:
        return 3
    return 2 if dtype.is_floating_point else 1


def result_type(*args) -> np.dtype:
    """PyTorch's result dtype for arrays and Python numbers.

    Arrays with dimensions come first, then 0-d arrays, then Python numbers: a lower group counts
    only where its kind (bool, integer, floating, complex) is above that of the groups before it.
    Source: the type promotion section of torch's tensor_attributes documentation.
    """
    groups: tuple[list, list, list] = ([], [], [])
    for arg in args:
        if isinstance(arg, (bool, int, float, complex)):
            groups[2].append(_SCALARS[type(arg)])
        else:
            groups[0 if arg.ndim else 1].append(to_torch(arg.dtype))
    result = None
    for group in groups:
        if not group:
            continue
        candidate = functools.reduce(torch.promote_types, group)
        if result is None:
            result = candidate
        elif _category(candidate) > _category(result):
            # A wider kind brings its default width: int32 array + 1.5 is float32 and a
            # float64 array stays float64, which promote_types gives for both.
            is_scalar = group is groups[2]
            result = torch.promote_types(result, candidate) if not is_scalar else _widen(result, candidate)
    assert result is not None
    return to_jax(result)


def _widen(dtype: torch.dtype, scalar: torch.dtype) -> torch.dtype:
    if scalar.is_complex and dtype.is_floating_point:
        return (
            torch.promote_types(dtype, torch.complex32)
            if dtype is torch.float16
            else (torch.complex128 if dtype is torch.float64 else torch.complex64)
        )
    return scalar


def promote(*args) -> tuple:
    """Arrays and numbers as arrays of their `result_type`."""
    dtype = result_type(*args)
    return tuple(jnp.asarray(a, dtype) for a in args)


def promote_to_float(x):
    """What PyTorch's unary float functions do to integers: computed as float32."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
