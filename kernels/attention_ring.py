"""Attention whose sequence is split over devices: by a ring, or by exchanging sequences for heads.

Ring attention (arXiv 2310.01889): keys and values go round, and each device keeps the softmax's running maximum and sum of its
own queries (arXiv 2205.14135); backward, the gradients of keys and values go round with them. Ulysses (arXiv 2309.14509):
all-to-all exchanges give each device whole sequences of a part of the heads, which its own kernel computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kpx.kernels.attention import attention_kernel, in_sight, named
from kpx.kernels.visible import narrowed

_SCORES = 1 << 22  # of a batch's head, at most so many are in memory at once
_LOW = -1e30  # of what is hidden: finite, so that a row that has seen nothing yet stays a number


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""
):
    seen, _, _, bits = narrowed(named(arrays, given), causal, window, visible)
    if seen or bits:
        return f"over a split sequence it takes causality and windows alone, not {', '.join(seen) or 'a mask'}"
    if softcap:
        return "over a split sequence it takes no softcap"
    if query.ndim != 4:
        return "over a split sequence it takes one dimension before the heads"
    return None


def _ulysses_supports(query, key, value, *arrays, parts, **attributes):
    if reason := _supports(query, key, value, *arrays, **attributes):
        return reason
    if query.shape[1] % parts or key.shape[1] % parts:
        return f"{parts} devices do not divide {query.shape[1]} heads of queries and {key.shape[1]} of keys"
    return None


@attention_kernel.over_sequence(supports=_ulysses_supports)
def ulysses(query, key, value, *arrays, scale, causal, window=0, visible="", axes, kernel: Callable, **_):
    """Whole sequences of a part of the heads on each device, by the target's own kernel."""

    def by_heads(array):
        return jax.lax.all_to_all(array, axes, split_axis=1, concat_axis=2, tiled=True)

    _, causal, window, _ = narrowed({}, causal, window, visible)
    further = {"window": window} if window else {}
    out = kernel(*map(by_heads, (query, key, value)), scale=scale, causal=causal, **further)
    return jax.lax.all_to_all(out, axes, split_axis=2, concat_axis=1, tiled=True)


@attention_kernel.over_sequence(supports=lambda *arrays, parts, **attributes: _supports(*arrays, **attributes))
def ring(query, key, value, *arrays, scale, causal, window=0, visible="", axes, kernel: Callable, **_):
    """Keys and values of every device in turn, those that no query sees passed over."""
    _, causal, window, _ = narrowed({}, causal, window, visible)
    return _ring(query, key, value, float(scale), causal, window, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _ring(query, key, value, scale, causal, window, axes):
    return _forward(query, key, value, scale, causal, window, axes)[0]


def _forward(query, key, value, scale, causal, window, axes):
    """The result, and of each row the logarithm of its softmax's sum."""
    parts, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    rows, wide = _grouped(query, key.shape[1]), jnp.promote_types(query.dtype, jnp.float32)
    most = jnp.full(rows.shape[:-1], _LOW, wide)
    start = most, jnp.zeros_like(most), jnp.zeros((*rows.shape[:-1], value.shape[-1]), wide)

    def turn(number, held):
        stats, key, value = held
        there = (here - number) % parts
        places = _Places(here * query.shape[2], there * key.shape[2], causal, window)
        stats = _where_seen(
            places, query, key, lambda: _attended(rows, key, value, stats, scale, places), lambda: stats
        )
        return stats, *_passed((key, value), axes)

    (most, total, out), _, _ = jax.lax.fori_loop(0, parts, turn, (start, key, value))
    safe = jnp.where(total == 0, 1, total)
    return (out / safe[..., None]).astype(query.dtype).reshape(*query.shape[:-1], value.shape[-1]), most + jnp.log(safe)


def _saved(query, key, value, scale, causal, window, axes):
    out, logarithms = _forward(query, key, value, scale, causal, window, axes)
    return out, (query, key, value, out, logarithms)


def _backward(scale, causal, window, axes, saved, cotangent):
    query, key, value, out, logarithms = saved
    parts, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    rows, given = _grouped(query, key.shape[1]), _grouped(cotangent, key.shape[1])
    wide = logarithms.dtype
    shares = jnp.sum(given.astype(wide) * _grouped(out, key.shape[1]).astype(wide), -1)
    zeros = jnp.zeros(rows.shape, wide), jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)

    def turn(number, held):
        (by_query, by_key, by_value), key, value = held
        there = (here - number) % parts
        places = _Places(here * query.shape[2], there * key.shape[2], causal, window)
        sums = by_query, by_key, by_value
        sums = _where_seen(
            places, query, key,
            lambda: _pulled(rows, key, value, given, logarithms, shares, sums, scale, places), lambda: sums,
        )  # fmt: skip
        # The gradients of keys and values go on with them, and are home after a whole round.
        by_key, by_value, key, value = _passed((*sums[1:], key, value), axes)
        return (sums[0], by_key, by_value), key, value

    (by_query, by_key, by_value), _, _ = jax.lax.fori_loop(0, parts, turn, (zeros, key, value))
    return by_query.reshape(query.shape).astype(query.dtype), by_key.astype(key.dtype), by_value.astype(value.dtype)


_ring.defvjp(_saved, _backward)


@dataclass(frozen=True)
class _Places:
    """Where the first row and the first key of two parts are in the whole sequence, and what a row sees."""

    row: jax.Array
    key: jax.Array
    causal: bool
    window: int

    def hidden(self, scores, first):
        """Scores `[..., rows, keys]`, low where they are not seen; their first row is `first` rows after `row`."""
        if not self.causal and not self.window:
            return scores
        row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
        row, column = row + self.row + first, column + self.key
        seen = in_sight(row, column, self.causal, self.window)
        return jnp.where(seen, scores, jnp.asarray(_LOW, scores.dtype))


def _grouped(array, kv_heads: int):
    """`[batch, heads, length, size]` as `[batch, kv_heads, group, length, size]`."""
    batch, heads, length, size = array.shape
    return array.reshape(batch, kv_heads, heads // kv_heads, length, size)


def _passed(arrays, axes):
    """Arrays of the device before this one."""
    parts = jax.lax.axis_size(axes)
    return tuple(jax.lax.ppermute(a, axes, [(n, (n + 1) % parts) for n in range(parts)]) for a in arrays)


def _where_seen(places: _Places, query, key, computed: Callable, otherwise: Callable):
    """What is computed of keys where any row may see one of them."""
    if not places.causal and not places.window:
        return computed()
    last, end = places.row + query.shape[2] - 1, places.key + key.shape[2] - 1
    seen = places.key <= last if places.causal else jnp.asarray(True)
    if places.window:
        seen &= (end > places.row - places.window) & (places.key < last + places.window)
    return jax.lax.cond(seen, computed, otherwise)


def _blocks(array, rows: int):
    """`[batch, heads, group, length, ...]` with blocks of rows first."""
    split = array.reshape(*array.shape[:3], array.shape[3] // rows, rows, *array.shape[4:])
    return jnp.moveaxis(split, 3, 0)


def _joined(array):
    whole = jnp.moveaxis(array, 0, 3)
    return whole.reshape(*whole.shape[:3], whole.shape[3] * whole.shape[4], *whole.shape[5:])


def _rows_at_once(length: int, keys: int) -> int:
    rows = length
    while rows % 2 == 0 and rows * keys > _SCORES:
        rows //= 2
    return rows


def _scores(rows, key, scale, places, first):
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    scores = jnp.einsum("bkgqd,bkmd->bkgqm", rows, key, preferred_element_type=wide) * jnp.asarray(scale, wide)
    return places.hidden(scores, first)


def _attended(rows, key, value, stats, scale, places: _Places):
    """The statistics of rows with some more keys."""
    size = _rows_at_once(rows.shape[3], key.shape[2])

    def block(given):
        number, rows, most, total, out = given
        scores = _scores(rows, key, scale, places, number * size)
        higher = jnp.maximum(most, jnp.max(scores, -1))
        weights = jnp.where(scores <= _LOW / 2, 0, jnp.exp(scores - higher[..., None]))
        shrunk = jnp.exp(most - higher)
        added = jnp.einsum("bkgqm,bkme->bkgqe", weights.astype(value.dtype), value, preferred_element_type=out.dtype)
        return higher, total * shrunk + jnp.sum(weights, -1), out * shrunk[..., None] + added

    count = rows.shape[3] // size
    if count == 1:
        return block((jnp.zeros((), jnp.int32), rows, *stats))
    given = jnp.arange(count, dtype=jnp.int32), *(_blocks(a, size) for a in (rows, *stats))
    return tuple(map(_joined, jax.lax.map(block, given)))


def _pulled(rows, key, value, given, logarithms, shares, sums, scale, places: _Places):
    """The gradients with those by some more keys: of all rows, and of these keys and values."""
    size, wide = _rows_at_once(rows.shape[3], key.shape[2]), logarithms.dtype
    by_query, by_key, by_value = sums

    def block(sums, taken):
        by_key, by_value = sums
        number, rows, given, logarithms, shares = taken
        scores = _scores(rows, key, scale, places, number * size)
        weights = jnp.where(scores <= _LOW / 2, 0, jnp.exp(scores - logarithms[..., None]))
        narrow = weights.astype(given.dtype)
        by_value = by_value + jnp.einsum("bkgqm,bkgqe->bkme", narrow, given, preferred_element_type=wide)
        by_weights = jnp.einsum("bkgqe,bkme->bkgqm", given, value, preferred_element_type=wide)
        by_scores = (weights * (by_weights - shares[..., None]) * jnp.asarray(scale, wide)).astype(rows.dtype)
        by_key = by_key + jnp.einsum("bkgqm,bkgqd->bkmd", by_scores, rows, preferred_element_type=wide)
        return (by_key, by_value), jnp.einsum("bkgqm,bkmd->bkgqd", by_scores, key, preferred_element_type=wide)

    count = rows.shape[3] // size
    if count == 1:
        (by_key, by_value), added = block(
            (by_key, by_value), (jnp.zeros((), jnp.int32), rows, given, logarithms, shares)
        )
        return by_query + added, by_key, by_value
    taken = jnp.arange(count, dtype=jnp.int32), *(_blocks(a, size) for a in (rows, given, logarithms, shares))
    (by_key, by_value), added = jax.lax.scan(block, (by_key, by_value), taken)
    return by_query + _joined(added), by_key, by_value
