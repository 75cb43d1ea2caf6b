"""Scaled dot-product attention (arXiv 1706.03762), with grouped key/value heads (arXiv 2305.13245)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.registry import kernel


@kernel("kpx.attention", version=1)
def attention_kernel(query, key, value, *mask, scale, causal):
    *lead, heads, length, size = query.shape
    kv_heads, kv_length = key.shape[-3:-1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Query heads that share a key head become rows of one product.
    query = query.reshape(*lead, kv_heads, heads // kv_heads * length, size)
    batch, last = tuple(range(len(lead) + 1)), len(lead) + 2
    scores = jax.lax.dot_general(
        query, key, (((last,), (last,)), (batch, batch)), preferred_element_type=dtype
    ) * np.asarray(scale, dtype)
    scores = scores.reshape(*lead, heads, length, kv_length)
    low = np.asarray(-np.inf, dtype)
    if causal:
        # Not an array: it would be an operand of the composite.
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (length, kv_length), axis) for axis in (0, 1))
        scores = jnp.where(row >= column, scores, low)
    if mask:
        scores = jnp.where(mask[0], scores, low) if mask[0].dtype == bool else scores + mask[0].astype(dtype)
    top = jnp.max(scores, -1, keepdims=True)
    # A row that sees nothing has maximum -inf: it becomes zeros, not NaN.
    weights = jnp.exp(scores - jnp.maximum(top, np.asarray(jnp.finfo(dtype).min, dtype)))
    total = jnp.sum(weights, -1, keepdims=True)
    weights = weights / jnp.where(total == 0, np.asarray(1, dtype), total)
    weights = weights.reshape(*query.shape[:-1], kv_length).astype(value.dtype)
    out = jax.lax.dot_general(weights, value, (((last,), (last - 1,)), (batch, batch)), preferred_element_type=dtype)
    return out.reshape(*lead, heads, length, value.shape[-1]).astype(query.dtype)


def attention(query, key, value, *, mask=None, causal: bool = False, scale: float | None = None):
    """`softmax(scale * query @ key^T + mask) @ value`.

    Args:
        query: `[..., heads, length, size]`, or `[length, size]`; floating. Scores and softmax are in f32 (f64 for f64).
        key: `[..., kv_heads, kv_length, size]`; `kv_heads` divides `heads`.
        value: `[..., kv_heads, kv_length, value_size]`.
        mask: broadcasts to `[..., heads, length, kv_length]`; bool (True is visible) or added.
        causal: position `i` sees key positions up to `i`.
        scale: `1 / sqrt(size)` by default.

    Returns:
        `[..., heads, length, value_size]`, of the query's dtype. A row that sees nothing is zero.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if query.ndim == 2:
        return attention(query[None], key[None], value[None], mask=mask, causal=causal, scale=scale)[0]
    lead = jnp.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (jnp.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (query, key, value))
    return attention_kernel(query, key, value, *([] if mask is None else [mask]), scale=scale, causal=bool(causal))
