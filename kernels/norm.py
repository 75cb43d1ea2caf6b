"""Layer normalization (arXiv 1607.06450) and RMS normalization (arXiv 1910.07467)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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


# In training steps: what patterns put in place of either norm, where they find it with its gradient ---------


def _normalized(x, parameters, eps, centred: bool, affine: str):
    if centred:
        return _layer_norm.decomposition(x, *parameters, axes=1, eps=eps, affine=affine)
    return _rms_norm.decomposition(x, *parameters, axes=1, eps=eps)


@kernel("kpx.norm", version=1)
def norm_kernel(x, *parameters, eps, centred, affine):
    """Either norm of the last dimension; `affine` names the parameters, as for `kpx.layer_norm`."""
    return _normalized(x, parameters, eps, centred, affine)


@kernel("kpx.norm_carried", version=1)
def carried_kernel(x, *parameters, eps, centred, affine):
    """The norm, and `x` as it is, for what goes around the norm (a residual): its gradient is added by the kernel."""
    return _normalized(x, parameters, eps, centred, affine), x
