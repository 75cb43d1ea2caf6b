"""Scaled dot-product attention (arXiv 1706.03762), with grouped key/value heads (arXiv 2305.13245)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels.registry import kernel


@kernel("kpx.attention", version=2)
def attention_kernel(query, key, value, *mask, scale, causal, window=0, softcap=0.0):
    *lead, heads, length, size = query.shape
    kv_heads, kv_length = key.shape[-3:-1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Query heads that share a key head become rows of one product.
    query = query.reshape(*lead, kv_heads, heads // kv_heads * length, size)
    batch, last = tuple(range(len(lead) + 1)), len(lead) + 2
    scores = jax.lax.dot_general(query, key, (((last,), (last,)), (batch, batch)), preferred_element_type=dtype) * (
        scale.astype(dtype) if isinstance(scale, jax.Array) else np.asarray(scale, dtype)
    )  # traced, it is a pattern's
    scores = scores.reshape(*lead, heads, length, kv_length)
    if softcap:
        scores = jnp.tanh(scores / np.asarray(softcap, dtype)) * np.asarray(softcap, dtype)
    low = np.asarray(-np.inf, dtype)
    if causal or window:
        scores = jnp.where(in_sight(length, kv_length, causal, window), scores, low)
    if mask:
        scores = jnp.where(mask[0], scores, low) if mask[0].dtype == bool else scores + mask[0].astype(dtype)
    weights = _softmax(scores).reshape(*query.shape[:-1], kv_length).astype(value.dtype)
    out = jax.lax.dot_general(weights, value, (((last,), (last - 1,)), (batch, batch)), preferred_element_type=dtype)
    return out.reshape(*lead, heads, length, value.shape[-1]).astype(query.dtype)


@jax.custom_jvp
def _softmax(scores):
    """Over the last dimension; zeros, not NaN, where every score is -inf."""
    least = np.asarray(jnp.finfo(scores.dtype).min, scores.dtype)
    weights = jnp.exp(scores - jnp.maximum(jnp.max(scores, -1, keepdims=True), least))
    total = jnp.sum(weights, -1, keepdims=True)
    return weights / jnp.where(total == 0, np.asarray(1, scores.dtype), total)


@_softmax.defjvp
def _softmax_jvp(primals, tangents):
    weights, (tangent,) = _softmax(*primals), tangents
    return weights, weights * (tangent - jnp.sum(weights * tangent, -1, keepdims=True))


def in_sight(length: int, kv_length: int, causal: bool, window: int):
    """Which keys a query sees. Computed: an array would be an operand of the composite."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, kv_length), axis) for axis in (0, 1))
    if not window:
        return row >= column
    return ((row >= column) | (not causal)) & (row - column < window) & (column - row < window)


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
):
    """`softmax(scale * query @ key^T + mask) @ value`.

    Args:
        query: `[..., heads, length, size]`, or `[length, size]`; floating. Scores and softmax are in f32 (f64 for f64).
        key: `[..., kv_heads, kv_length, size]`; `kv_heads` divides `heads`.
        value: `[..., kv_heads, kv_length, value_size]`.
        mask: broadcasts to `[..., heads, length, kv_length]`; bool (True is visible) or added.
        causal: position `i` sees key positions up to `i`.
        window: position `i` sees key positions nearer than `window` alone (a sliding window, arXiv 2004.05150).
        softcap: scores become `softcap * tanh(scores / softcap)` before they are masked (arXiv 2408.00118).
        scale: `1 / sqrt(size)` by default.

    Returns:
        `[..., heads, length, value_size]`, of the query's dtype. A row that sees nothing is zero.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    given = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if query.ndim == 2:
        return attention(query[None], key[None], value[None], mask=mask, **given)[0]
    _check(query, key, value, window, softcap)
    lead = jnp.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (jnp.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (query, key, value))
    if not key.shape[-2]:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)  # nothing to see
    further: dict[str, Any] = {}
    if window is not None and window < max(query.shape[-2], key.shape[-2]):
        further["window"] = int(window)
    if softcap is not None:
        further["softcap"] = float(softcap)
    masks = [] if mask is None else [mask]
    return attention_kernel(query, key, value, *masks, scale=scale, causal=bool(causal), **further)


def _check(query, key, value, window: int | None, softcap: float | None) -> None:
    shapes = f"queries {query.shape}, keys {key.shape}, values {value.shape}"
    if min(a.ndim for a in (query, key, value)) < 3:
        raise InputError(f"Attention was given {shapes}. Each is `[..., heads, length, size]`, or `[length, size]`.")
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if key.shape[-1] != query.shape[-1] or value.shape[-3:-1] != key.shape[-3:-1]:
        raise InputError(
            f"Attention was given {shapes}. Keys are of the queries' size, and values have the keys' heads and length."
        )
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(f"Attention was given {shapes}. The heads of keys divide those of queries.")
    if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in (query, key, value)):
        raise InputError(f"Attention was given {query.dtype}, {key.dtype} and {value.dtype}. Each is a floating dtype.")
    if window is not None and window < 1:
        raise InputError(f"Attention was given window={window}. It is 1 or more: a position sees itself.")
    if softcap is not None and not softcap > 0:
        raise InputError(f"Attention was given softcap={softcap}. It is more than 0, or None.")
