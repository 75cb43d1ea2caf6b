"""Attention of few queries to many keys on NVIDIA's and AMD's GPUs: a decoding step over a cache, whole or in pages."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from kpx.kernels import attention_gpu, triton_call
from kpx.kernels.attention import attention_kernel, named
from kpx.kernels.paged_attention import paged_attention_kernel

_MOST_ROWS = 64  # queries that share a key head
_LEAST_KEYS = 256
_PROGRAMS = 264  # about two for each of an H100's multiprocessors
_KEYS = 64  # at a time
_OUT_OF_SIGHT = -1e9  # a number that is added and hides


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""
) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    further, rows = named(arrays, given), query.shape[-2] * query.shape[-3] // key.shape[-3]
    if query.shape[-2] >= attention_gpu.LEAST or rows > _MOST_ROWS or key.shape[-2] < _LEAST_KEYS:
        return f"it takes fewer than {attention_gpu.LEAST} queries, {_MOST_ROWS} with those that share keys, and {_LEAST_KEYS} keys"
    if "segments" in further:
        return "it takes no segments"
    return attention_gpu.takes(query, key, value)


def _prefers(query, key, value, *arrays, where, window=0, given="mask", **attributes) -> str | None:
    if not {"mask", "kv_lengths", "offset"} & named(arrays, given).keys() and not window:
        return "every key is seen, and plain products read each once too"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(platform: str, attributes: tuple, query, key, value, *arrays):
    given = dict(attributes)
    if given.get("visible", "").startswith("bits"):
        del given["visible"]  # the mask itself is here
    settings, further = attention_gpu.settle(query, key, arrays, platform, **given)
    kv_heads, kv_length = key.shape[-3:-1]
    batch, length = math.prod(query.shape[:-3]), query.shape[-2]
    further["bounds"] = _bounds(further, settings, batch, length, kv_length)
    keys, values = (a.reshape(-1, *a.shape[-2:]) for a in (key, value))
    out = _split(query.reshape(batch * kv_heads, -1, query.shape[-1]), keys, values, further, settings, length, None)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _forward(platform, attributes, *arrays):
    return _decode(platform, attributes, *arrays), arrays


def _backward(platform, attributes, arrays, cotangent):
    return jax.vjp(functools.partial(attention_kernel.decomposition, **dict(attributes)), *arrays)[1](cotangent)


_decode.defvjp(_forward, _backward)


def _bounds(further: dict[str, Any], settings: attention_gpu.Settings, batch: int, length: int, kv_length: int):
    """For each batch, the first query's position, and how many keys are to be read: none behind the last that is seen."""
    bounds = further.get("bounds", jnp.broadcast_to(jnp.asarray([0, kv_length], jnp.int32), (batch, 2)))
    end = jnp.minimum(bounds[:, 1], kv_length)
    if settings.causal:
        end = jnp.minimum(end, bounds[:, 0] + length)
    if (mask := further.get("mask")) is not None:
        seen = mask if mask.dtype == bool else mask > _OUT_OF_SIGHT
        last = jnp.max(jnp.where(seen, jnp.arange(1, kv_length + 1), 0), (1, 2, 3))
        if mask.dtype != bool or settings.low > -math.inf:  # a query that sees nothing sees all alike
            last = jnp.where(jnp.all(jnp.any(seen, -1), (1, 2)), last, kv_length)
        end = jnp.minimum(end, last)
    return jnp.stack([bounds[:, 0], jnp.maximum(end, 0)], -1).astype(jnp.int32)


def _constants(query, key, value, further, settings, sizes: tuple[int, int], pages):
    """The kernel's constants and how it is cut, for a batch of so many, of so many queries each (`sizes`)."""
    programs, rows, _ = query.shape
    batch, length = sizes
    page = 0 if pages is None else key.shape[-2]
    kv_length = key.shape[-2] if pages is None else page * pages.shape[-1]
    blocks = attention_gpu.Blocks(rows, _KEYS, 4, 2)
    found = attention_gpu.sizes(query, key, value, further, settings, blocks)
    columns = min(_KEYS, attention_gpu.power(kv_length))
    wanted = max(1, min(-(-_PROGRAMS // programs), kv_length // (2 * columns)))
    found |= {"LENGTH": length, "KV_LENGTH": kv_length, "KV_HEADS": programs // batch, "GROUP": rows // length}
    found |= {"PAGE": page, "PAGES": 0 if pages is None else pages.shape[-1]}
    found |= {"POOL": 0 if pages is None else key.shape[-3], "BQ": attention_gpu.power(rows), "BK": columns}
    found["CHUNK"] = -(-kv_length // (wanted * columns)) * columns
    return {n: c for n, c in found.items() if n not in ("HEADS", "BOUNDS", "SEGMENTS")}, blocks


def example(platform: str, kv_length: int, size: int, group: int, page: int):
    """What the kernel is compiled with for eight sequences of eight heads of keys in bf16, whole or in pages."""

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    settings = attention_gpu.Settings(platform, 8 * group, size**-0.5, False, 0, 0.0)
    key, pages = struct(64, kv_length, size), None
    if page:
        key, pages = struct(8, 8 * kv_length // page, page, size), struct(8, kv_length // page)
    return _constants(struct(64, group, size), key, key, {}, settings, (8, 1), pages)


def _split(query, key, value, further, settings, length: int, pages):
    """Parts of all keys, put together. `query` is `[batch * kv_heads, group * length, size]`; `pages` are a table, or None."""
    from kpx.kernels import attention_decode_triton as kernels

    programs, rows, _ = query.shape
    batch = further["bounds"].shape[0]
    constants, blocks = _constants(query, key, value, further, settings, (batch, length), pages)
    parts = -(-constants["KV_LENGTH"] // constants["CHUNK"])
    sums, tops, totals = triton_call.triton_call(
        kernels.decode, query, key, value, *(further.get(name, triton_call.nothing()) for name in ("mask", "slopes", "bounds")),
        triton_call.nothing() if pages is None else pages, grid=programs * parts, warps=blocks.warps, stages=blocks.stages,
        out=[jax.ShapeDtypeStruct((parts, programs, rows, *s), jnp.float32) for s in ((value.shape[-1],), (), ())],
        **constants,
    )  # fmt: skip
    if (sinks := further.get("sinks")) is not None:
        sinks = sinks * math.log2(math.e)
        by_row = jnp.broadcast_to(
            sinks.reshape(1, -1, rows // length, 1), (batch, programs // batch, rows // length, length)
        )
        tops = jnp.concatenate([tops, by_row.reshape(1, programs, rows)])
        totals = jnp.concatenate([totals, jnp.ones((1, programs, rows), jnp.float32)])
        sums = jnp.concatenate([sums, jnp.zeros_like(sums[:1])])
    highest = jnp.max(tops, 0)
    shares = jnp.exp2(tops - jnp.where(highest == -jnp.inf, 0, highest))
    total = jnp.sum(totals * shares, 0)
    out = jnp.sum(sums * shares[..., None], 0) / jnp.where(total == 0, 1, total)[..., None]
    return out.astype(query.dtype)


def _on(platform: str):
    def decode(query, key, value, *arrays, **attributes):
        return _decode(platform, tuple(sorted(attributes.items())), query, key, value, *arrays)

    decode.__name__ = f"decode_{platform}"
    attention_kernel.on(platform, supports=_supports, prefers=_prefers)(decode)


def _supports_pages(query, key_pages, value_pages, lengths, page_table, *, scale, softcap=0.0) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if query.shape[-2] // key_pages.shape[0] > _MOST_ROWS:
        return f"at most {_MOST_ROWS} heads may share keys"
    return attention_gpu.takes(query, key_pages, value_pages)


def paged(query, key_pages, value_pages, lengths, page_table, *, platform, scale, softcap=0.0):
    """Reads the pages that are a sequence's, and of those the keys that are there."""
    batch, heads, size = query.shape
    settings = attention_gpu.Settings(platform, heads, float(scale), False, 0, float(softcap))
    bounds = jnp.stack([jnp.zeros_like(lengths), lengths], -1).astype(jnp.int32)
    rows = query.reshape(batch * key_pages.shape[0], -1, size)
    out = _split(rows, key_pages, value_pages, {"bounds": bounds}, settings, 1, page_table)
    return out.reshape(batch, heads, value_pages.shape[-1])


def _pages_on(platform: str):
    def paged_attention(*arrays, **attributes):
        return paged(*arrays, platform=platform, **attributes)

    paged_attention.__name__ = f"paged_{platform}"
    paged_attention_kernel.on(platform, supports=_supports_pages)(paged_attention)


for _platform in ("cuda", "rocm"):
    _on(_platform)
    _pages_on(_platform)
