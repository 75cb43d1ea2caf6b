"""Scans by an associative function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def associative_scan(function: Callable, xs: Sequence[jax.Array], axis: int = 0) -> tuple[jax.Array, ...]:
    """Return the partial results of an associative function along an axis, each to the bit what the function gave.

    `jax.lax.associative_scan` interleaves by adding zeros, which loses the sign of -0.0; this one copies. The scheme is the
    same, odd partial results first (Blelloch 1990, Prefix Sums and Their Applications).

    Args:
        function: `(a, b) -> combined`, on tuples of arrays of any length along the axis.
        xs: arrays of one length along the axis.
    """
    xs = tuple(xs)
    length = xs[0].shape[axis]
    if length < 2:
        return xs

    def cut(arrays: Sequence[jax.Array], start: int, stop: int, step: int = 1) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.slice_in_dim(x, start, stop, step, axis) for x in arrays)

    half = length // 2
    odd = associative_scan(function, tuple(function(cut(xs, 0, 2 * half, 2), cut(xs, 1, length, 2))), axis)
    even = cut(xs, 0, 1)
    if length > 2:
        rest = (length - 1) // 2
        later = function(cut(odd, 0, rest), cut(xs, 2, length, 2))
        even = tuple(jnp.concatenate(pair, axis) for pair in zip(even, later, strict=True))
    return tuple(_interleaved(e, o, axis) for e, o in zip(even, odd, strict=True))


def _interleaved(even: jax.Array, odd: jax.Array, axis: int) -> jax.Array:
    half = odd.shape[axis]
    pairs = jnp.stack([jax.lax.slice_in_dim(even, 0, half, axis=axis), odd], axis + 1)
    whole = pairs.reshape(*odd.shape[:axis], 2 * half, *odd.shape[axis + 1 :])
    if even.shape[axis] == half:
        return whole
    return jnp.concatenate([whole, jax.lax.slice_in_dim(even, half, half + 1, axis=axis)], axis)
