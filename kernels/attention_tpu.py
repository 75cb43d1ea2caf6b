"""Attention on TPUs: JAX's splash attention, a flash attention in Pallas (arXiv 2205.14135), forward and backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.attention import attention_kernel

_LANES = 128
_BLOCK = 512  # rows of queries, and of keys, at a time
_MOST_SIZE = 256
_MOST_PADDED = 1.25  # scores that are computed, over those that are wanted


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _supports(query, key, value, *mask, scale, causal, window=0, softcap=0.0) -> str | None:
    if mask and (mask[0].dtype != bool or any(size != 1 for size in mask[0].shape[-3:-1])):
        shape = f"{mask[0].dtype}{list(mask[0].shape)}"
        return f"of arrays as masks it takes bools that are alike for all heads and queries, and not {shape}"
    if {query.dtype, key.dtype, value.dtype} > {query.dtype} or query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes f32 or bf16 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    length, kv_length = query.shape[-2], key.shape[-2]
    if window and length > kv_length:
        return f"with a window, queries must be no more than keys, and are {length} and {kv_length}"
    if not _MOST_PADDED * length * kv_length >= _padded(length) * _padded(kv_length):
        return (
            f"lengths are padded to multiples of {_LANES}, by which {length} queries and {kv_length} keys would become more "
            f"than {_MOST_PADDED:g} times the work"
        )
    if query.shape[-1] != value.shape[-1]:
        return f"keys and values must be of one size, and are of {query.shape[-1]} and {value.shape[-1]}"
    if query.shape[-1] > _MOST_SIZE:
        return f"heads must be of {_MOST_SIZE} at most, and are of {query.shape[-1]}"
    return None


@attention_kernel.on("tpu", supports=_supports)
def splash(query, key, value, *hidden, scale, causal, window=0, softcap=0.0, interpret: bool = False):
    """Never holds the scores: blocks of them are computed, used and forgotten."""
    *lead, _, length, _ = query.shape
    kv_length, seen = key.shape[-2], None
    if hidden:
        seen = jnp.broadcast_to(hidden[0].reshape(*hidden[0].shape[:-3], -1), (*lead, kv_length))
    elif kv_length % _LANES and not (causal and length <= kv_length):  # else no query sees what is padded
        seen = jnp.ones((*lead, kv_length), bool)
    query = _pad((query * jnp.asarray(scale, jnp.float32)).astype(query.dtype), -2)
    key, value, seen = _pad(key, -2), _pad(value, -2), None if seen is None else _pad(seen, -1)
    out = _splash(query, key, value, seen, causal, window, softcap, interpret)[..., :length, :]
    if not hidden:
        return out
    sees = _any_in_sight(seen, length, kv_length, causal, window)
    return jnp.where(sees[..., None, :, None], out, 0)


def _any_in_sight(seen, length: int, kv_length: int, causal: bool, window: int):
    """Which queries see a key at all, `[..., length]`."""
    before = jnp.pad(jnp.cumsum(seen, -1), [(0, 0)] * (seen.ndim - 1) + [(1, 0)])  # how many of the first keys are seen
    position = np.arange(length)
    end = position + 1 if causal else position + window if window else np.full(length, kv_length)
    begin = position - window + 1 if window else np.zeros(length, int)
    return before[..., np.clip(end, 0, kv_length)] > before[..., np.clip(begin, 0, kv_length)]


def _pad(array, axis: int):
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % _LANES)
    return jnp.pad(array, width) if width[axis][1] else array


def _splash(query, key, value, seen, causal: bool, window: int, softcap: float, interpret: bool):
    """The kernel over lengths that it takes; `seen` are keys `[..., kv_length]` that any query may see, or None for all."""
    # Pallas takes half a second to import, and most programs are not for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    *lead, heads, length, _ = query.shape
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
    operands = [query, key, value]
    if seen is not None:  # keys that are seen are of the queries' segment
        operands.append(splash_kernel.SegmentIds(jnp.ones((*lead, length), jnp.int32), seen.astype(jnp.int32)))
    for _ in lead:
        call = jax.vmap(call)
    return call(*operands)


def interpreted(query, key, value, *mask, **attributes):
    """The same without a TPU, slowly: what the tests run."""
    return splash(query, key, value, *mask, **attributes, interpret=True)
