"""Attention to a cache of keys and values that is kept in pages (arXiv 2309.06180): one query a sequence."""

from __future__ import annotations

import math

import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels.attention import attention_kernel
from kpx.kernels.registry import kernel

_LANES = 128


@kernel("kpx.paged_attention", version=1)
def paged_attention_kernel(query, key_pages, value_pages, lengths, page_table, *, scale, softcap=0.0):
    key, value = (_gathered(pages, page_table) for pages in (key_pages, value_pages))
    given = {"scale": scale, "causal": False, "softcap": softcap, "given": "kv_lengths"}
    return attention_kernel.decomposition(query[:, :, None], key, value, lengths, **given)[:, :, 0]


def _gathered(pages, page_table):
    """`[batch, kv_heads, keys, size]` of pages `[kv_heads, pages, page_size, size]`."""
    found = jnp.moveaxis(jnp.take(pages, page_table, 1, mode="clip"), 1, 0)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


def paged_attention(query, key_pages, value_pages, lengths, page_table, *, scale=None, softcap=None):
    """`softmax(scale * query @ key^T) @ value` of each sequence's last token, its keys and values in pages.

    Args:
        query: `[batch, heads, size]`; floating.
        key_pages: `[kv_heads, pages, page_size, size]`: pages of all sequences; `kv_heads` divides `heads`.
        value_pages: `[kv_heads, pages, page_size, value_size]`.
        lengths: `[batch]`, integers: how many keys each sequence has. Of none, the result is zero.
        page_table: `[batch, pages_per_sequence]`, integers: a sequence's pages, in order; those behind its length are not
            read. A page that is not there is the nearest that is.
        scale: `1 / sqrt(size)` by default.
        softcap: scores become `softcap * tanh(scores / softcap)` (arXiv 2408.00118).

    Returns:
        `[batch, heads, value_size]`, of the query's dtype.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    shapes = f"queries {query.shape}, pages {key_pages.shape} and {value_pages.shape}"
    if (query.ndim, key_pages.ndim, value_pages.ndim) != (3, 4, 4) or key_pages.shape[:3] != value_pages.shape[:3]:
        raise InputError(
            f"Paged attention was given {shapes}. They are `[batch, heads, size]` and `[kv_heads, pages, page_size, size]`."
        )
    if query.shape[-1] != key_pages.shape[-1] or not key_pages.shape[0] or query.shape[1] % key_pages.shape[0]:
        raise InputError(
            f"Paged attention was given {shapes}. Keys are of the queries' size; their heads divide the queries'."
        )
    batch = query.shape[:1]
    if lengths.shape != batch or page_table.ndim != 2 or page_table.shape[:1] != batch:
        raise InputError(
            f"Paged attention of {shapes} was given lengths {lengths.shape} and a page table {page_table.shape}. They are "
            f"`[batch]` and `[batch, pages_per_sequence]`."
        )
    if softcap is not None and not softcap > 0:
        raise InputError(f"Paged attention was given softcap={softcap}. It is more than 0, or None.")
    if not all(jnp.issubdtype(a.dtype, jnp.integer) for a in (lengths, page_table)):
        raise InputError(
            f"Paged attention was given {lengths.dtype} and {page_table.dtype}. Lengths and pages are integers."
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, page_table.shape[1] * key_pages.shape[2])
    page_table = jnp.clip(page_table.astype(jnp.int32), 0, key_pages.shape[1] - 1)
    further = {} if softcap is None else {"softcap": float(softcap)}
    return paged_attention_kernel(query, key_pages, value_pages, lengths, page_table, scale=scale, **further)


def _supports_tpu(query, key_pages, value_pages, lengths, page_table, *, scale, softcap=0.0) -> str | None:
    if query.shape[-1] % _LANES or key_pages.shape != value_pages.shape:
        return f"keys and values must be of one size, a multiple of {_LANES}, and are {key_pages.shape} and {value_pages.shape}"
    if query.dtype not in (jnp.float32, jnp.bfloat16) or {query.dtype} != {key_pages.dtype, value_pages.dtype}:
        return f"it takes f32 or bf16 alone, not {query.dtype}, {key_pages.dtype}, {value_pages.dtype}"
    return None


@paged_attention_kernel.on("tpu", supports=_supports_tpu)
def paged_tpu(query, key_pages, value_pages, lengths, page_table, *, scale, softcap=0.0):
    """JAX's own, in Pallas: reads the pages that are a sequence's, and of those the keys that are there."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as pallas

    pages, page = page_table.shape[1], key_pages.shape[2]
    together = max(n for n in range(1, pages + 1) if pages % n == 0 and (n == 1 or n * page <= 512))
    scaled = (query * jnp.asarray(scale, jnp.float32)).astype(query.dtype)
    out = pallas(
        scaled, key_pages, value_pages, jnp.maximum(lengths, 1), page_table, attn_logits_soft_cap=softcap or None,
        pages_per_compute_block=together,
    )  # fmt: skip
    return jnp.where((lengths > 0)[:, None, None], out, 0).astype(query.dtype)
