"""GELU (arXiv 1606.08415), exact and by tanh."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.registry import kernel


@kernel("kpx.gelu", version=1)
def _gelu(x, *, approximate):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    half, one = np.asarray(0.5, dtype), np.asarray(1, dtype)
    if approximate:
        inner = np.asarray(math.sqrt(2 / math.pi), dtype) * (wide + np.asarray(0.044715, dtype) * wide**3)
        return (half * wide * (one + jnp.tanh(inner))).astype(x.dtype)
    return (half * wide * (one + jax.lax.erf(wide * np.asarray(math.sqrt(0.5), dtype)))).astype(x.dtype)


def gelu(x, *, approximate: bool = False):
    """`x * Phi(x)`, `Phi` the standard normal distribution function.

    Args:
        x: any shape, floating; computed in f32 (f64 for f64).
        approximate: use the tanh form of section 2 of the paper.

    Returns:
        An array like `x`.
    """
    return _gelu(x, approximate=bool(approximate))
