"""Attention on TPUs: JAX's splash attention, a flash attention in Pallas (arXiv 2205.14135), forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kpx.kernels.attention import attention_kernel

_LANES = 128
_BLOCK = 512  # rows of queries, and of keys, at a time
_MOST_SIZE = 256


def _supports(query, key, value, *mask, scale, causal, window=0, softcap=0.0) -> str | None:
    if mask and (mask[0].dtype != bool or any(size != 1 for size in mask[0].shape[-3:-1])):
        shape = f"{mask[0].dtype}{list(mask[0].shape)}"
        return f"of arrays as masks it takes bools that are alike for all heads and queries, and not {shape}"
    if {query.dtype, key.dtype, value.dtype} > {query.dtype} or query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes f32 or bf16 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    length, kv_length = query.shape[-2], key.shape[-2]
    if window and length > kv_length:
        return f"with a window, queries must be no more than keys, and are {length} and {kv_length}"
    if length % _LANES or kv_length % _LANES:
        return f"lengths must be multiples of {_LANES}, and are {length} and {kv_length}"
    if query.shape[-1] != value.shape[-1]:
        return f"keys and values must be of one size, and are of {query.shape[-1]} and {value.shape[-1]}"
    if query.shape[-1] > _MOST_SIZE:
        return f"heads must be of {_MOST_SIZE} at most, and are of {query.shape[-1]}"
    return None


@attention_kernel.on("tpu", supports=_supports)
def splash(query, key, value, *hidden, scale, causal, window=0, softcap=0.0, interpret: bool = False):
    """Never holds the scores: blocks of them are computed, used and forgotten."""
    # Pallas takes half a second to import, and most programs are not for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = query.shape[-3:-1]
    kv_length = key.shape[-2]
    if window:
        mask = masks.LocalMask((length, kv_length), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = (masks.CausalMask if causal else masks.FullMask)((length, kv_length))
    rows, columns = math.gcd(length, _BLOCK), math.gcd(kv_length, _BLOCK)
    sizes = splash_kernel.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=columns,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=columns, block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip
    call = splash_kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret,
        attn_logits_soft_cap=softcap or None,
    )  # fmt: skip
    query = (query * jnp.asarray(scale, jnp.float32)).astype(query.dtype)
    if not hidden:
        for _ in query.shape[:-3]:
            call = jax.vmap(call)
        return call(query, key, value)
    # Keys that are seen are of the queries' segment.
    seen = jnp.broadcast_to(hidden[0].reshape(*hidden[0].shape[:-3], -1), (*query.shape[:-3], kv_length))
    segments = splash_kernel.SegmentIds(jnp.ones((*query.shape[:-3], length), jnp.int32), seen.astype(jnp.int32))
    for _ in query.shape[:-3]:
        call = jax.vmap(call)
    return jnp.where(seen.any(-1)[..., None, None, None], call(query, key, value, segments), 0)


def interpreted(query, key, value, *mask, **attributes):
    """The same without a TPU, slowly: what the tests run."""
    return splash(query, key, value, *mask, **attributes, interpret=True)
