"""Layer normalization (arXiv 1607.06450) and RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.patterns import builtin
from kpx.kernels.registry import kernel


def _statistics_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


@kernel("kpx.layer_norm", version=1)
def _layer_norm(x, *parameters, axes, eps, affine):
    dtype = _statistics_dtype(x.dtype)
    reduced = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(dtype)
    mean = jnp.mean(wide, reduced, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(jnp.square(centred), reduced, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + np.asarray(eps, dtype))
    rest = list(parameters)
    if "w" in affine:
        y = y * rest.pop(0).astype(dtype)
    if "b" in affine:
        y = y + rest.pop(0).astype(dtype)
    return y.astype(x.dtype)


def layer_norm(x, weight=None, bias=None, *, axes: int = 1, eps: float = 1e-5):
    """Normalizes the last `axes` dimensions to zero mean and unit variance.

    Args:
        x: `[..., *normalized]`, floating. Statistics are computed in f32 (f64 for f64).
        weight, bias: `[*normalized]` or None.
        axes: how many trailing dimensions are normalized.
        eps: added to the (biased) variance.

    Returns:
        An array like `x`.
    """
    affine = "w" * (weight is not None) + "b" * (bias is not None)
    arrays = [a for a in (weight, bias) if a is not None]
    return _layer_norm(x, *arrays, axes=axes, eps=float(eps), affine=affine or "none")


@kernel("kpx.rms_norm", version=1)
def _rms_norm(x, *weight, axes, eps):
    dtype = _statistics_dtype(x.dtype)
    reduced = tuple(range(x.ndim - axes, x.ndim))
    wide = x.astype(dtype)
    mean_square = jnp.mean(jnp.square(wide), reduced, keepdims=True)
    y = wide * jax.lax.rsqrt(mean_square + np.asarray(eps, dtype))
    if weight:
        y = y * weight[0].astype(dtype)
    return y.astype(x.dtype)


def rms_norm(x, weight=None, *, axes: int = 1, eps: float = 1e-6):
    """Divides by the root mean square of the last `axes` dimensions.

    Args:
        x: `[..., *normalized]`, floating. The mean square is computed in f32 (f64 for f64).
        weight: `[*normalized]` or None.

    Returns:
        An array like `x`.
    """
    return _rms_norm(x, *([] if weight is None else [weight]), axes=axes, eps=float(eps))


# What the norms are recognised by ------------------------------------------------------------------

_X = ((4, 6, 32), jnp.bfloat16)
_W = ((32,), jnp.bfloat16)


def _root_mean_square(x, eps, exponent: bool):
    wide = x.astype(_statistics_dtype(x.dtype))
    mean_square = jnp.mean(jnp.square(wide), -1, keepdims=True)
    if exponent:
        return wide / jnp.sqrt(mean_square + eps)
    return wide * jax.lax.rsqrt(mean_square + eps)


def _rms_rounded_before_weight(exponent: bool):
    return lambda x, w, *, eps: _root_mean_square(x, eps, exponent).astype(x.dtype) * w


def _rms_rounded_after_weight(exponent: bool):
    def search(x, w, *, eps):
        return (_root_mean_square(x, eps, exponent) * w.astype(_statistics_dtype(x.dtype))).astype(x.dtype)

    return search


builtin(
    "rms_norm",
    [
        spelling(exponent)
        for spelling in (_rms_rounded_before_weight, _rms_rounded_after_weight)
        for exponent in (False, True)
    ],
    lambda x, w, *, eps: rms_norm(x, w, eps=eps),
    [_X, _W],
    eps=1e-6,
)
