"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels.registry import kernel


def rotated_half(x):
    """`[-second half, first half]` of the last dimension."""
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([-second, first], -1)


@kernel("kpx.rotary", version=1)
def rotary_kernel(x, cos, sin):
    """`x * cos + rotated_half(x) * sin`, in f32 until the end; `cos` and `sin` broadcast to `x`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide, cos, sin = (a.astype(wide) for a in (x, cos, sin))
    return (x_wide * cos + rotated_half(x_wide) * sin).astype(x.dtype)


def rotary(x, cos, sin):
    """Turns pairs of numbers, one from either half of the last dimension, by angles.

    Args:
        x: `[..., length, size]`, floating; `size` is even.
        cos, sin: of the angles, `[..., length, size]`, or what broadcasts to `x`; floating.

    Returns:
        An array like `x`.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    shapes = f"{x.dtype}{list(x.shape)}, cosines {cos.dtype}{list(cos.shape)}, sines {sin.dtype}{list(sin.shape)}"
    if x.ndim < 2 or x.shape[-1] % 2 or cos.shape != sin.shape or any(a.ndim > x.ndim for a in (cos, sin)):
        raise InputError(
            f"rotary was given {shapes}. Arrays are `[..., length, size]`, the size even, and cosines and sines alike."
        )
    try:
        fits = jnp.broadcast_shapes(x.shape, cos.shape) == x.shape
    except ValueError:
        fits = False
    if not fits or not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (x, cos, sin)):
        raise InputError(f"rotary was given {shapes}. Cosines and sines broadcast to the array, and all are floating.")
    return rotary_kernel(x, cos, sin)
