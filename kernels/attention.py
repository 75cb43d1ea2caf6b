"""Scaled dot-product attention (arXiv 1706.03762), with grouped key/value heads (arXiv 2305.13245)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels import visible
from kpx.kernels.registry import kernel

# Arrays that may follow queries, keys and values, by name; `batch` is what comes before heads.
ARRAYS = {
    "mask": "[batch, heads, length, kv_length], or what broadcasts to it",
    "sinks": "[heads]",
    "slopes": "[heads]",
    "kv_lengths": "[batch]",
    "offset": "[batch]",
    "segments": "[batch, length]",
    "kv_segments": "[batch, kv_length]",
}


@kernel("kpx.attention", version=3)
def attention_kernel(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-np.inf, given="mask", visible=""
):  # `low`: the score of what bools hide; `visible`: what is known of the mask (see `visible.describe`)
    further = named(arrays, given)
    *lead, heads, length, size = query.shape
    kv_heads, kv_length = key.shape[-3:-1]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Query heads that share a key head become rows of one product.
    query = query.reshape(*lead, kv_heads, heads // kv_heads * length, size)
    batch, last = tuple(range(len(lead) + 1)), len(lead) + 2
    scores = jax.lax.dot_general(query, key, (((last,), (last,)), (batch, batch)), preferred_element_type=dtype) * (
        scale.astype(dtype) if isinstance(scale, jax.Array) else np.asarray(scale, dtype)
    )  # traced, it is a pattern's
    scores = masked(scores.reshape(*lead, heads, length, kv_length), further, causal, window, softcap, low)
    if "sinks" in further:
        weights = _softmax_with_sinks(scores, further["sinks"].astype(dtype)[:, None, None])
    else:
        weights = _softmax(scores)
    weights = weights.reshape(*query.shape[:-1], kv_length).astype(value.dtype)
    out = jax.lax.dot_general(weights, value, (((last,), (last - 1,)), (batch, batch)), preferred_element_type=dtype)
    return out.reshape(*lead, heads, length, value.shape[-1]).astype(query.dtype)


attention_kernel.preference = ("onednn", "cudnn", "flash_cuda", "flash_rocm", "decode_cuda", "decode_rocm")
attention_kernel.fixed = lambda attributes: tuple(
    3 + place for place, name in enumerate(attributes.get("given", "mask").split()) if name == "mask"
)


def _sample(rng, structs, attributes):
    """Random numbers; whole keys, one segment, and a mask that is what is known of it."""
    query, key, _, *rest = structs
    names = attributes.get("given", "mask").split()
    found = [rng.standard_normal(s.shape).astype(s.dtype) for s in structs[:3]]
    for name, struct in zip(names, rest, strict=False):
        if jnp.issubdtype(struct.dtype, jnp.floating):
            found.append(rng.standard_normal(struct.shape).astype(struct.dtype))
        elif name == "mask":
            seen = visible.shown(attributes.get("visible", ""), (query.shape[-2], key.shape[-2]))
            found.append(np.broadcast_to(seen, struct.shape))
        else:
            found.append(np.full(struct.shape, key.shape[-2] if name == "kv_lengths" else 0, struct.dtype))
    return found


attention_kernel.sample = _sample


def named(arrays, given: str) -> dict[str, Any]:
    """Arrays after queries, keys and values, by the names that the attribute `given` lists."""
    return dict(zip(given.split(), arrays, strict=False))


def masked(scores, further: dict[str, Any], causal: bool, window: int, softcap: float, lowest: float = -np.inf):
    """Scores `[batch, heads, length, kv_length]`, capped, with what is added to them, and -inf where a key is not seen;
    `lowest` where a mask of bools hides it."""
    dtype, low = scores.dtype, np.asarray(-np.inf, scores.dtype)
    if softcap:
        scores = jnp.tanh(scores / np.asarray(softcap, dtype)) * np.asarray(softcap, dtype)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
    if "offset" in further:
        row = row + _by_batch(further["offset"])
    if "slopes" in further:
        scores = scores - further["slopes"].astype(dtype)[:, None, None] * jnp.abs(row - column).astype(dtype)
    if "mask" in further:
        mask = further["mask"]
        if mask.dtype == bool:
            scores = jnp.where(mask, scores, jnp.asarray(lowest, dtype))
        else:
            scores = scores + mask.astype(dtype)
    if causal or window:
        scores = jnp.where(in_sight(row, column, causal, window), scores, low)
    if "kv_lengths" in further:
        scores = jnp.where(column < _by_batch(further["kv_lengths"]), scores, low)
    if "segments" in further:
        segments = further["segments"]
        same = segments[..., :, None] == further.get("kv_segments", segments)[..., None, :]
        scores = jnp.where(same[..., None, :, :], scores, low)
    return scores


def _by_batch(array):
    return array[..., None, None, None]


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


def _softmax_with_sinks(scores, sinks):
    """The same beside one more score, which has a weight and no value."""
    wide = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return _softmax(jnp.concatenate([scores, wide], -1))[..., :-1]


def in_sight(row, column, causal: bool, window: int):
    """Which keys a query sees, by positions. Computed: an array would be an operand of the composite."""
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
    sinks=None,
    slopes=None,
    segment_ids=None,
    kv_segment_ids=None,
    kv_lengths=None,
    offset=None,
):
    """`softmax(scale * query @ key^T + mask) @ value`.

    `batch` is any number of dimensions before the heads, or none.

    Args:
        query: `[batch, heads, length, size]`, or `[length, size]`; floating. Scores and softmax are in f32 (f64 for f64).
        key: `[batch, kv_heads, kv_length, size]`; `kv_heads` divides `heads`.
        value: `[batch, kv_heads, kv_length, value_size]`.
        mask: broadcasts to `[batch, heads, length, kv_length]`; bool (True is visible) or added. Of one that is no traced
            array, and alike for all heads and batches, kernels skip the blocks that it hides.
        causal: position `i` sees key positions up to `i`.
        window: position `i` sees key positions nearer than `window` alone (a sliding window, arXiv 2004.05150).
        softcap: scores become `softcap * tanh(scores / softcap)` before they are masked (arXiv 2408.00118).
        scale: `1 / sqrt(size)` by default.
        sinks: `[heads]`, floating; a further score of each query, which has a weight and no value (arXiv 2309.17453).
        slopes: `[heads]`, floating; each score loses `slope * |i - j|` by its positions (ALiBi, arXiv 2108.12409).
        segment_ids: `[batch, length]`, integers; a query sees keys of its own segment alone.
        kv_segment_ids: `[batch, kv_length]`; those of the queries by default.
        kv_lengths: `[batch]`, integers; keys from there on are not seen (a cache that is not full yet).
        offset: an integer, or `[batch]` of them: the position of the first query (of a step over a cache), 0 by default.

    Returns:
        `[batch, heads, length, value_size]`, of the query's dtype. A row that sees nothing is zero.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if query.ndim == 2:
        return attention(
            query[None], key[None], value[None], mask=mask, causal=causal, window=window, softcap=softcap, scale=scale,
            sinks=sinks, slopes=slopes, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, kv_lengths=kv_lengths,
            offset=offset,
        )[0]  # fmt: skip
    _check(query, key, value, window, softcap)
    lead = jnp.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (jnp.broadcast_to(a, (*lead, *a.shape[-3:])) for a in (query, key, value))
    if not key.shape[-2]:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)  # nothing to see
    attributes: dict[str, Any] = {"causal": bool(causal)}
    if window is not None and window < max(query.shape[-2], key.shape[-2]):
        attributes["window"] = int(window)
    if softcap is not None:
        attributes["softcap"] = float(softcap)
    arrays = {
        "mask": mask, "sinks": sinks, "slopes": slopes, "kv_lengths": kv_lengths, "offset": offset,
        "segments": segment_ids, "kv_segments": kv_segment_ids,
    }  # fmt: skip
    arrays = {name: jnp.asarray(a) for name, a in arrays.items() if a is not None}
    _check_arrays(arrays, query, key)
    arrays = {name: _whole(name, a, lead) for name, a in arrays.items()}
    # Else no kernel is chosen, or what is causal in the mask is not as positions are.
    worth = mask is not None and isinstance(query, jax.core.Tracer) and offset is None
    if worth and (known := described(mask, query.shape[-2], key.shape[-2])):
        attributes["visible"] = known
    if arrays and tuple(arrays) != ("mask",):
        attributes["given"] = " ".join(arrays)
    return attention_kernel(query, key, value, *arrays.values(), scale=scale, **attributes)


def described(mask, length: int, kv_length: int) -> str:
    """What is known of a mask while compiling, in words; "" of one that is traced, not of bools, or not alike for all heads."""
    if isinstance(mask, jax.core.Tracer):
        return ""
    mask = np.asarray(mask)
    if mask.dtype != bool or any(n != 1 for n in mask.shape[:-2]):
        return ""
    if mask.ndim < 2 or mask.shape[-2:] != (length, kv_length):
        return ""
    return visible.describe(mask.reshape(length, kv_length))


def _whole(name: str, array, lead: tuple[int, ...]):
    if name in ("kv_lengths", "offset"):
        return jnp.broadcast_to(array.astype(jnp.int32), lead)
    if name in ("segments", "kv_segments"):
        return jnp.broadcast_to(array.astype(jnp.int32), (*lead, array.shape[-1]))
    return array


def _check_arrays(arrays: dict[str, Any], query, key) -> None:
    """Raises InputError where an array that was given beside queries, keys and values does not go with them."""
    lead, heads, length, kv_length = query.shape[:-3], *query.shape[-3:-1], key.shape[-2]
    wanted = {
        "sinks": ((), (heads,)), "slopes": ((), (heads,)), "kv_lengths": (lead, ()), "offset": (lead, ()),
        "segments": (lead, (length,)), "kv_segments": (lead, (kv_length,)), "mask": ((*lead, heads, length, kv_length), ()),
    }  # fmt: skip
    for name, array in arrays.items():
        broadcast, last = wanted[name]
        rest, fits = array.shape[: array.ndim - len(last)], True
        try:
            fits = jnp.broadcast_shapes(rest, broadcast) == broadcast
        except ValueError:
            fits = False
        if not fits or array.shape[array.ndim - len(last) :] != last:
            raise InputError(
                f"Attention of queries {query.shape} and keys {key.shape} was given {name} {array.shape}. They must be "
                f"{ARRAYS[name]}, here {[*broadcast, *last]}."
            )
        floating = name in ("sinks", "slopes") or (name == "mask" and array.dtype != bool)
        kind = jnp.floating if floating else jnp.bool_ if name == "mask" else jnp.integer
        if not jnp.issubdtype(array.dtype, kind):
            raise InputError(f"Attention was given {name} of {array.dtype}. They must be of a {kind.__name__} dtype.")
    if "kv_segments" in arrays and "segments" not in arrays:
        raise InputError("Attention was given kv_segment_ids without segment_ids. Give those of the queries too.")
    if "segments" in arrays and "kv_segments" not in arrays and length != kv_length:
        raise InputError(
            f"Attention of {length} queries and {kv_length} keys was given segment_ids alone. Give kv_segment_ids too."
        )


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
