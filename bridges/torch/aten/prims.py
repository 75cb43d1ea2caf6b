"""PyTorch's prims: what its own reference decompositions end in."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten import special
from kpx.bridges.torch.aten.common import axes, sum_dtype
from kpx.bridges.torch.aten.elementwise import division, remainder, sign
from kpx.bridges.torch.aten.random import _draw, _normal
from kpx.bridges.torch.dtypes import promote, to_jax
from kpx.bridges.torch.operators import prims
from kpx.bridges.torch.registry import lowers


def _divide(x, y):
    return jax.lax.div(*jnp.broadcast_arrays(*division(x, y)))


def _fmod(x, y):
    return jax.lax.rem(*jnp.broadcast_arrays(*division(x, y)))


UNARY = {
    "abs": jnp.abs, "acos": jnp.arccos, "acosh": jnp.arccosh, "asin": jnp.arcsin, "asinh": jnp.arcsinh,
    "atan": jnp.arctan, "atanh": jnp.arctanh, "cos": jnp.cos, "cosh": jnp.cosh,
    "bessel_i0": special.i0, "bessel_i0e": special.i0e, "bessel_i1": special.i1, "bessel_i1e": special.i1e,
    "bessel_j0": special.bessel_j0, "bessel_j1": special.bessel_j1, "spherical_bessel_j0": special.spherical_j0,
    "bitwise_not": jnp.bitwise_not, "ceil": jnp.ceil, "conj_physical": jnp.conj,
    "digamma": special.digamma, "erf": jax.lax.erf, "erf_inv": special.erfinv, "erfc": jax.lax.erfc,
    "erfcx": special.erfcx, "exp": jnp.exp, "exp2": jnp.exp2, "expm1": jnp.expm1, "floor": jnp.floor,
    "isfinite": jnp.isfinite, "lgamma": special.lgamma, "log": jnp.log, "log1p": jnp.log1p,
    "log2": jnp.log2, "log10": jnp.log10, "ndtri": special.ndtri, "neg": jnp.negative,
    "reciprocal": jnp.reciprocal, "round": jnp.round, "rsqrt": jax.lax.rsqrt, "sign": sign,
    "sin": jnp.sin, "sinh": jnp.sinh, "sqrt": jnp.sqrt, "cbrt": jnp.cbrt, "tan": jnp.tan,
    "tanh": jnp.tanh, "trunc": jnp.trunc, "clone": lambda x, **_: x, "frexp": special.frexp,
}  # fmt: skip
BINARY = {
    "add": jnp.add, "atan2": jnp.arctan2, "bitwise_and": jnp.bitwise_and, "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor, "eq": jnp.equal, "fmax": special.fmax, "fmin": special.fmin,
    "gcd": jnp.gcd, "ge": jnp.greater_equal, "gt": jnp.greater, "hypot": jnp.hypot,
    "igamma": special.igamma, "igammac": special.igammac, "le": jnp.less_equal, "lt": jnp.less,
    "maximum": jnp.maximum, "minimum": jnp.minimum, "mul": jnp.multiply, "ne": jnp.not_equal,
    "nextafter": special.nextafter, "pow": jnp.power,
    "sub": jnp.subtract, "zeta": special.zeta,
}  # fmt: skip

for _name, _function in UNARY.items():
    lowers(getattr(prims, _name).default)(lambda x, _function=_function, **options: _function(x))

for _name, _function in BINARY.items():
    lowers(getattr(prims, _name).default)(lambda x, y, _function=_function: _function(*promote(x, y)))

for _name, _function in {"div": _divide, "fmod": _fmod, "remainder": remainder}.items():
    lowers(getattr(prims, _name).default)(_function)


@lowers(prims.where.default)
def where(condition, x, y):
    return jnp.where(condition, *promote(x, y))


@lowers(prims.convert_element_type.default)
def convert_element_type(x, dtype):
    return special.cast(x, to_jax(dtype))


@lowers(prims.device_put.default)
def device_put(x, device=None, non_blocking=False):
    return x


# Shapes, as PyTorch's references write them ------------------------------------------------------


@lowers(prims.collapse.default, prims.collapse_view.default)
def collapse(x, start, end):
    """Dimensions `start` to `end`, both included, as one; of a 0-d array, a dimension of size 1."""
    if not x.ndim:
        return x.reshape(1)
    return x.reshape(*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


@lowers(prims.split_dim.default)
def split_dim(x, dim, outer_length):
    return x.reshape(*x.shape[:dim], outer_length, x.shape[dim] // outer_length, *x.shape[dim + 1 :])


@lowers(prims.squeeze.default)
def squeeze(x, dimensions):
    return jnp.squeeze(x, tuple(dimensions))


@lowers(prims.transpose.default)
def transpose(x, permutation):
    return jnp.transpose(x, permutation)


@lowers(prims.reshape.default)
def reshape(x, shape):
    return jnp.reshape(x, shape)


@lowers(prims.rev.default)
def rev(x, dims):
    return jnp.flip(x, dims)


@lowers(prims.cat.default)
def cat(tensors, dim):
    return jnp.concatenate(promote(*tensors), dim)


@lowers(prims.view_of.default)
def view_of(x):
    return x


@lowers(prims.real.default)
def real(x):
    return jnp.real(x)


@lowers(prims.imag.default)
def imag(x):
    return jnp.imag(x)


@lowers(prims.fill.default)
def fill(x, value):
    return jnp.full(x.shape, value, x.dtype)


@lowers(prims.full.default)
def full(shape, fill_value, *, dtype, requires_grad=False):
    return jnp.full(shape, fill_value, to_jax(dtype))


@lowers(prims.full_like.default)
def full_like(x, fill_value, *, dtype, requires_grad=False):
    return jnp.full(x.shape, fill_value, to_jax(dtype))


@lowers(prims.scalar_tensor.default)
def scalar_tensor(value, *, dtype=None):
    return jnp.asarray(value, jnp.float32 if dtype is None else to_jax(dtype))


@lowers(prims.broadcast_in_dim.default)
def broadcast_in_dim(x, shape, broadcast_dimensions):
    return jax.lax.broadcast_in_dim(x, shape, broadcast_dimensions)


@lowers(prims.iota.default)
def iota(length, *, start, step, dtype, requires_grad=False):
    return (jnp.arange(length, dtype=jnp.int64) * step + start).astype(to_jax(dtype))


@lowers(prims.empty_strided.default)
def empty_strided(shape, strides, *, dtype, requires_grad=False):
    return jnp.zeros(shape, to_jax(dtype))


def _kind(x, output_dtype):
    return x.dtype if output_dtype is None else to_jax(output_dtype)


@lowers(prims.sum.default)
def sum_(x, dims=None, *, output_dtype=None):
    return jnp.sum(x, axes(x, dims) if dims is None else tuple(dims), dtype=_kind(x, output_dtype))


@lowers(prims.prod.default)
def prod(x, dims=None, *, output_dtype=None):
    return jnp.prod(x, axes(x, dims) if dims is None else tuple(dims), dtype=_kind(x, output_dtype))


@lowers(prims.var.default)
def var(x, dims=None, correction=1.0, *, output_dtype=None):
    from kpx.bridges.torch.aten.reduce import variance

    return variance(x, axes(x, dims) if dims is None else tuple(dims), correction, False)


@lowers(prims.amax.default)
def amax(x, dims=None, *, output_dtype=None):
    return jnp.max(x, axes(x, dims) if dims is None else tuple(dims))


@lowers(prims.amin.default)
def amin(x, dims=None, *, output_dtype=None):
    return jnp.min(x, axes(x, dims) if dims is None else tuple(dims))


@lowers(prims.normal.default, random=True)
def normal(shape, *, mean, std, dtype, requires_grad=False, generator=None, key):
    kind = to_jax(dtype)
    return _normal(key, shape, kind) * jnp.asarray(std, kind) + jnp.asarray(mean, kind)


@lowers(prims.uniform.default, random=True)
def uniform(shape, *, low, high, dtype, stride=None, generator=None, key):
    kind = to_jax(dtype)
    drawn = _draw(key, shape, kind).astype(sum_dtype(kind))
    return (drawn * np.asarray(high - low, drawn.dtype) + np.asarray(low, drawn.dtype)).astype(kind)
