"""Attention on the CPU: some queries at a time, whose scores stay in its caches."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from kpx.kernels.attention import attention_kernel, named
from kpx.kernels.visible import narrowed

ROWS = 128  # queries at a time
_SPANS = 4  # of queries whose keys are cut alike: of causal attention these compute 5/8 of the scores
# From where on it is faster than XLA's plain form, measured on a Xeon with 2 MiB of L2 cache a core (bench/cpu_attention.py).
_LEAST, _LEAST_BYTES = 256, 3 << 20  # causal, or in a window
_LEAST_WHOLE, _LEAST_BYTES_WHOLE = 512, 16 << 20
_LEAST_TRAINED, _LEAST_BYTES_TRAINED = 1024, 32 << 20


def _short(query, key, least: int, least_bytes: int) -> str | None:
    held = 4 * query.size // query.shape[-1] * key.shape[-2]
    if query.shape[-2] >= least and held >= least_bytes:
        return None
    return f"from {least} queries and {least_bytes >> 20} MiB of scores on it is faster than plain products"


def _prefers(
    query, key, value, *arrays, where, scale, causal, window=0, softcap=0.0, low=-jnp.inf, given="mask", visible=""
) -> str | None:
    if where.differentiated and (reason := _short(query, key, _LEAST_TRAINED, _LEAST_BYTES_TRAINED)) is not None:
        return reason
    _, causal, window, _ = narrowed(named(arrays, given), causal, window, visible)
    if (causal or window) and "offset" not in given.split():
        return _short(query, key, _LEAST, _LEAST_BYTES)
    return _short(query, key, _LEAST_WHOLE, _LEAST_BYTES_WHOLE)


@attention_kernel.on("cpu", prefers=_prefers, least=_LEAST)
def in_chunks(query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-jnp.inf, given="mask", visible=""):
    """Never holds the scores of more than some queries; computes them again for the gradient."""
    further, causal, window, bits = narrowed(named(arrays, given), causal, window, visible)
    if bits:
        further = named(arrays, given)  # the mask itself is there
    length, kv_length, start = query.shape[-2], key.shape[-2], further.pop("offset", None)
    further |= {"kv_segments": further.get("kv_segments", further["segments"])} if "segments" in further else {}
    if causal or window or start is not None or "slopes" in further:
        start = jnp.zeros(query.shape[:-3], jnp.int32) if start is None else start

    @jax.checkpoint
    def attend(rows, keys, values, others):
        return attention_kernel.decomposition(rows, keys, values, *others.values(), scale=scale, causal=causal,
            window=window, softcap=softcap, low=low, given=" ".join(others))  # fmt: skip

    def chunk(first, count, begin, end):
        """The result for `count` queries from `first` on, which see keys from `begin` to `end`."""
        others = {name: _part(name, array, (first, count), (begin, end)) for name, array in further.items()}
        if start is not None:
            others["offset"] = start + first - begin
        rows = jax.lax.dynamic_slice_in_dim(query, first, count, -2)
        return attend(rows, key[..., begin:end, :], value[..., begin:end, :], others)

    spans = [(0, length, 0, kv_length)]
    if (causal or window) and "offset" not in given.split():
        spans = list(_spans(length, kv_length, causal, window))
    found = []
    for first, last, begin, end in spans:
        whole = (last - first) // ROWS
        if whole:
            out = jax.lax.map(lambda i, s=(first, begin, end): chunk(s[0] + i * ROWS, ROWS, *s[1:]), jnp.arange(whole))
            out = jnp.moveaxis(out, 0, -3)
            found.append(out.reshape(*out.shape[:-3], whole * ROWS, out.shape[-1]))
        if rest := last - first - whole * ROWS:
            found.append(chunk(last - rest, rest, begin, end))
    return jnp.concatenate(found, -2) if len(found) > 1 else found[0]


def _part(name: str, array, rows, keys):
    """Of an array beside queries, keys and values, what belongs to some of the queries, from and how many, and of the keys."""
    if name == "segments":
        return jax.lax.dynamic_slice_in_dim(array, *rows, -1)
    if name == "kv_lengths":
        return array - keys[0]
    if name not in ("kv_segments", "mask"):
        return array
    array = array if array.shape[-1] == 1 else array[..., keys[0] : keys[1]]
    if name == "mask" and array.ndim > 1 and array.shape[-2] > 1:
        return jax.lax.dynamic_slice_in_dim(array, *rows, -2)
    return array


def _spans(length: int, kv_length: int, causal: bool, window: int):
    """Queries from, to, and the keys from, to, that these see at most."""
    cuts = sorted({min(length, -(-length * i // (_SPANS * ROWS)) * ROWS) for i in range(_SPANS + 1)})
    for first, last in itertools.pairwise(cuts):
        end = min(kv_length, last if causal else last + window - 1 if window else kv_length)
        begin = max(0, first - window + 1) if window else 0
        yield first, last, min(begin, max(0, end - 1)), end
