"""ATen's ops on complex numbers, and on the bits of a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

from kpx.bridges.torch.aten.common import is_complex, is_float
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers


@lowers(aten.view_as_real.default, aten.view_as_real_copy.default)
def view_as_real(x):
    return jnp.stack([x.real, x.imag], -1)


@lowers(aten.view_as_complex.default, aten.view_as_complex_copy.default)
def view_as_complex(x):
    return jax.lax.complex(x[..., 0], x[..., 1])


@lowers(aten.complex.default)
def complex_(real, imag):
    return jax.lax.complex(*jnp.broadcast_arrays(real, imag))


@lowers(aten.polar.default)
def polar(size, angle):
    return jax.lax.complex(*jnp.broadcast_arrays(size * jnp.cos(angle), size * jnp.sin(angle)))


@lowers(aten._conj.default, aten._conj_physical.default, aten.conj_physical.default, aten._conj_copy.default)
def conj(x):
    return jnp.conj(x)


@lowers(aten.angle.default)
def angle(x):
    if is_complex(x):
        return jnp.angle(x)
    if not is_float(x):
        x = x.astype(jnp.float32)
    # A negative zero has angle 0 here, as in PyTorch; NaN stays.
    turned = jnp.where(x < 0, jnp.asarray(jnp.pi, x.dtype), jnp.zeros_like(x))
    return jnp.where(jnp.isnan(x), x, turned)


@lowers(aten.view.dtype)
def view_dtype(x, dtype):
    """The same bits as another dtype; the last dimension grows or shrinks with its size."""
    target = to_jax(dtype)
    if x.dtype == target:
        return x
    if is_complex(x):
        return view_dtype(view_as_real(x).reshape(*x.shape[:-1], -1), dtype)
    if jnp.issubdtype(target, jnp.complexfloating):
        parts = view_dtype(x, torch.float32 if target == jnp.complex64 else torch.float64)
        return view_as_complex(parts.reshape(*parts.shape[:-1], -1, 2))
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    small, large = jnp.dtype(x.dtype).itemsize, jnp.dtype(target).itemsize
    if small < large:
        x = x.reshape(*x.shape[:-1], -1, large // small)
    if target == jnp.bool_:
        return jax.lax.bitcast_convert_type(x, jnp.uint8) != 0
    y = jax.lax.bitcast_convert_type(x, target)
    return y.reshape(*y.shape[:-2], -1) if small > large else y
