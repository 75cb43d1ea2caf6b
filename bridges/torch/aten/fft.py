"""ATen's Fourier transforms."""

from __future__ import annotations

import math

import jax.numpy as jnp

from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers


def _scale(x, normalization: int, count: int):
    """`normalization` is ATen's: 0 none, 1 by the square root of the number of points, 2 by that number."""
    if normalization == 0:
        return x
    factor = 1 / (math.sqrt(count) if normalization == 1 else count)
    return x * jnp.asarray(factor, x.real.dtype)


def _points(x, dim) -> int:
    return math.prod(x.shape[d] for d in dim)


@lowers(aten._fft_c2c.default)
def c2c(x, dim, normalization, forward):
    count = _points(x, dim)
    dtype = x.dtype
    for d in dim:
        x = jnp.fft.fft(x, axis=d) if forward else jnp.fft.ifft(x, axis=d, norm="forward")
    return _scale(x, normalization, count).astype(dtype)


@lowers(aten._fft_r2c.default)
def r2c(x, dim, normalization, onesided):
    count = _points(x, dim)
    *rest, last = dim
    y = jnp.fft.rfft(x, axis=last) if onesided else jnp.fft.fft(x.astype(jnp.result_type(x, jnp.complex64)), axis=last)
    return _scale(c2c(y, rest, 0, True), normalization, count)


@lowers(aten._fft_c2r.default)
def c2r(x, dim, normalization, last_dim_size):
    *rest, last = dim
    x = c2c(x, rest, 0, False)
    y = jnp.fft.irfft(x, n=last_dim_size, axis=last, norm="forward")
    return _scale(y, normalization, _points(y, dim))
