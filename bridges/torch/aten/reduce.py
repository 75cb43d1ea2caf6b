"""ATen's reductions, softmax and cumulative ops."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kpx.bridges.torch.aten.common import axes, axis, is_complex, sum_dtype
from kpx.bridges.torch.aten.scan import associative_scan
from kpx.bridges.torch.dtypes import promote_to_float, to_jax
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers
from kpx.kernels.norm import shifted


def summed(x, dtype):
    """Sums of integers and bools are int64; low-precision floats are summed in f32 by XLA itself."""
    if dtype is not None:
        return x.astype(to_jax(dtype))
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.int64)


@lowers(aten.sum.default, aten.sum.dim_IntList)
def sum_(x, dim=None, keepdim=False, *, dtype=None):
    x = summed(x, dtype)
    return jnp.sum(x, axes(x, dim), dtype=x.dtype, keepdims=keepdim)


@lowers(aten.mean.default, aten.mean.dim)
def mean(x, dim=None, keepdim=False, *, dtype=None):
    x = x if dtype is None else x.astype(to_jax(dtype))
    return jnp.mean(x, axes(x, dim), keepdims=keepdim)


def accumulated(function, x):
    """Apply a product or a running reduction in the dtype that eager PyTorch accumulates it in, and round once.

    That is f32 for 16-bit floats. For f32 it is f64 on the CPU, and f32 elsewhere, as PyTorch's CUDA kernels have it.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float64:
        return function(x)
    if x.dtype != jnp.float32:
        return function(x.astype(jnp.float32)).astype(x.dtype)
    return jax.lax.platform_dependent(
        x, cpu=lambda x: function(x.astype(jnp.float64)).astype(jnp.float32), default=function
    )


@lowers(aten.prod.default)
def prod(x, *, dtype=None):
    x = summed(x, dtype)
    return accumulated(lambda x: jnp.prod(x, dtype=x.dtype), x)


@lowers(aten.prod.dim_int)
def prod_dim(x, dim, keepdim=False, *, dtype=None):
    x = summed(x, dtype)
    return accumulated(lambda x: jnp.prod(x, axes(x, dim), dtype=x.dtype, keepdims=keepdim), x)


def variance(x, over, correction, keepdim):
    """NaN where no degree of freedom is left, as PyTorch has it."""
    count = math.prod(x.shape[d] for d in over)
    wide = shifted(x.astype(sum_dtype(x.dtype)), over)
    centred = wide - jnp.mean(wide, over, keepdims=True)
    total = jnp.sum(jnp.square(jnp.abs(centred)), over, keepdims=keepdim)
    divisor = max(count - (1 if correction is None else correction), 0)
    real = jnp.finfo(x.dtype).dtype
    return (total / jnp.asarray(divisor, total.dtype)).astype(real)


@lowers(aten.var.correction)
def var(x, dim=None, *, correction=1, keepdim=False):
    return variance(x, axes(x, dim), correction, keepdim)


@lowers(aten.amax.default)
def amax(x, dim=(), keepdim=False):
    return jnp.max(x, axes(x, dim), keepdims=keepdim)


@lowers(aten.amin.default)
def amin(x, dim=(), keepdim=False):
    return jnp.min(x, axes(x, dim), keepdims=keepdim)


@lowers(aten.max.default)
def max_all(x):
    return jnp.max(x)


@lowers(aten.min.default)
def min_all(x):
    return jnp.min(x)


@lowers(aten.max.dim)
def max_dim(x, dim, keepdim=False):
    return jnp.max(x, axes(x, dim), keepdims=keepdim), argmax(x, dim, keepdim)


@lowers(aten.min.dim)
def min_dim(x, dim, keepdim=False):
    return jnp.min(x, axes(x, dim), keepdims=keepdim), argmin(x, dim, keepdim)


def _place(function, x, dim, keepdim):
    if not x.ndim:
        return jnp.zeros((), jnp.int64)
    return function(x, dim, keepdims=keepdim).astype(jnp.int64)


@lowers(aten.argmax.default)
def argmax(x, dim=None, keepdim=False):
    return _place(jnp.argmax, x, dim, keepdim)


@lowers(aten.argmin.default)
def argmin(x, dim=None, keepdim=False):
    return _place(jnp.argmin, x, dim, keepdim)


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_(x, dim=None, keepdim=False):
    return jnp.any(x, axes(x, dim), keepdims=keepdim)


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_(x, dim=None, keepdim=False):
    return jnp.all(x, axes(x, dim), keepdims=keepdim)


@lowers(aten._is_all_true.default)
def is_all_true(x):
    return jnp.all(x)


@lowers(aten._is_any_true.default)
def is_any_true(x):
    return jnp.any(x)


@lowers(aten._softmax.default)
def softmax_(x, dim, half_to_float):
    return jax.nn.softmax(x.astype(jnp.float32) if half_to_float else x, axes(x, dim))


@lowers(aten.softmax.int)
def softmax(x, dim, dtype=None):
    return jax.nn.softmax(promote_to_float(x) if dtype is None else x.astype(to_jax(dtype)), axes(x, dim))


@lowers(aten._log_softmax.default)
def log_softmax_(x, dim, half_to_float):
    return jax.nn.log_softmax(x.astype(jnp.float32) if half_to_float else x, axes(x, dim))


@lowers(aten.log_softmax.int)
def log_softmax(x, dim, dtype=None):
    return jax.nn.log_softmax(promote_to_float(x) if dtype is None else x.astype(to_jax(dtype)), axes(x, dim))


@lowers(aten.logsumexp.default)
def logsumexp(x, dim, keepdim=False):
    return jax.nn.logsumexp(promote_to_float(x), axes(x, dim), keepdims=keepdim)


@lowers(aten.cumsum.default)
def cumsum(x, dim, *, dtype=None):
    x = summed(x, dtype)
    return accumulated(lambda x: jnp.cumsum(x, dim, dtype=x.dtype), x) if x.ndim else x


@lowers(aten.cumprod.default)
def cumprod(x, dim, *, dtype=None):
    x = summed(x, dtype)
    return accumulated(lambda x: jnp.cumprod(x, dim, dtype=x.dtype), x) if x.ndim else x


@lowers(aten.logcumsumexp.default)
def logcumsumexp(x, dim):
    if is_complex(x):
        raise NotImplementedError("of complex numbers: which branch of the logarithm PyTorch gives is its own")

    def running(x):
        return associative_scan(lambda a, b: (jnp.logaddexp(a[0], b[0]),), [x], axis(x, dim))[0]

    return accumulated(running, x) if x.ndim else x


@lowers(aten.linalg_vector_norm.default)
def vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    x = x if dtype is None else x.astype(to_jax(dtype))
    over = axes(x, dim)
    x = jnp.abs(x)
    if ord == 2:
        return jnp.sqrt(jnp.sum(jnp.square(x), over, keepdims=keepdim))
    if ord == float("inf"):
        return jnp.max(x, over, keepdims=keepdim)
    if ord == -float("inf"):
        return jnp.min(x, over, keepdims=keepdim)
    if ord == 0:
        return jnp.sum(x != 0, over, keepdims=keepdim).astype(x.dtype)
    return jnp.power(jnp.sum(jnp.power(x, ord), over, keepdims=keepdim), 1 / ord)
