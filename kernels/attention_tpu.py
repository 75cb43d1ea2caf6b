"""Attention on TPUs: JAX's splash attention, a flash attention in Pallas (arXiv 2205.14135), forward and backward."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.attention import attention_kernel, in_sight, named
from kpx.kernels.visible import mask_of, narrowed

_LANES = 128
_BLOCK = 512  # rows of queries, and of keys, at a time
_MOST_SIZE = 256
_MOST_PADDED = 1.25  # scores that are computed, over those that are wanted
_NOWHERE = -(2**31)  # the segment of keys that no query sees


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


@dataclass(frozen=True)
class Sight:
    """Which keys queries see as far as it is known while compiling; `bits` are a mask, [length, kv_length]."""

    causal: bool
    window: int
    bits: str

    def mask(self, length: int, kv_length: int) -> np.ndarray:
        """All of it in one array of bools."""
        row, column = np.arange(length)[:, None], np.arange(kv_length)
        seen = mask_of(self.bits, (length, kv_length)) if self.bits else np.ones((length, kv_length), bool)
        return seen & in_sight(row, column, self.causal, self.window) if self.causal or self.window else seen


def _sight(causal: bool, window: int, description: str) -> Sight:
    return Sight(*narrowed({}, causal, window, description)[1:])


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-np.inf, given="mask", visible=""
) -> str | None:
    further = named(arrays, given)
    mask = further.get("mask")
    if mask is not None and not visible and (mask.dtype != bool or any(size != 1 for size in mask.shape[-3:-1])):
        shape = f"{mask.dtype}{list(mask.shape)}"
        return f"of arrays as masks it takes bools that are alike for all heads and queries, and not {shape}"
    for name in ("slopes", "offset"):
        if name in further:
            return f"it takes no {name}"
    if low > -np.inf and (causal or window or further.keys() - {"mask"}):
        return "what a mask hides must be out of sight wholly where something else hides too"
    if {query.dtype, key.dtype, value.dtype} > {query.dtype} or query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes f32 or bf16 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    length, kv_length = query.shape[-2], key.shape[-2]
    if _sight(causal, window, visible).window and length > kv_length:
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
def splash(
    query,
    key,
    value,
    *arrays,
    scale,
    causal,
    window=0,
    softcap=0.0,
    low=-np.inf,
    given="mask",
    visible="",
    interpret: bool = False,
):
    """Never holds the scores: blocks of them are computed, used and forgotten."""
    lengths, sight = (query.shape[-2], key.shape[-2]), _sight(causal, window, visible)
    further = named(arrays, given)
    if visible:
        del further["mask"]
    segments, sees = _segments(query, key, further, sight)
    query = _pad((query * jnp.asarray(scale, jnp.float32)).astype(query.dtype), -2)
    out = _splash(
        query, _pad(key, -2), _pad(value, -2), segments, further.get("sinks"), sight, (lengths, softcap, interpret)
    )
    out = out[..., : lengths[0], :]
    if sees is None:
        return out
    # Where all scores are alike, weights are.
    instead = jnp.mean(_of_heads(value, query.shape[-3]), -2, keepdims=True) if low > -np.inf else 0
    return jnp.where(sees[..., None, :, None], out, instead)


def _of_heads(value, heads: int):
    """Values `[..., kv_heads, kv_length, size]` for each head of queries."""
    return jnp.repeat(value, heads // value.shape[-3], -3)


def _segments(query, key, further, sight: Sight):
    """What of a mask is an input, as segments of the padded queries and keys `[..., length]`, or None where nothing is; and
    which queries see a key at all, or None where all do."""
    lead, length, kv_length = query.shape[:-3], query.shape[-2], key.shape[-2]
    seen = jnp.ones((*lead, kv_length), bool)
    hides = {"mask", "kv_lengths"} & further.keys()
    if (mask := further.get("mask")) is not None:
        seen = seen & jnp.broadcast_to(mask.reshape(*mask.shape[:-3], -1), seen.shape)
    if (lengths := further.get("kv_lengths")) is not None:
        seen = seen & (jnp.arange(kv_length) < lengths[..., None])
    some = None  # queries that see a key, where not all do
    if (of_queries := further.get("segments")) is not None:
        of_keys = further.get("kv_segments", of_queries)
        if hides or sight.bits or "kv_segments" in further:
            known = sight.mask(length, kv_length)
            some = jnp.any((of_queries[..., :, None] == of_keys[..., None, :]) & seen[..., None, :] & known, -1)
        of_keys = jnp.where(seen, of_keys, _NOWHERE)
        return (_pad(of_queries, -1), _pad(of_keys, -1, _NOWHERE)), some
    if sight.bits:
        known = sight.mask(length, kv_length)
        if hides or not known.any(1).all():
            some = jnp.any(known & seen[..., None, :], -1)
    elif hides:
        some = _any_in_sight(seen, length, kv_length, sight.causal, sight.window)
    sees_padding = kv_length % _LANES and not sight.bits and not (sight.causal and length <= kv_length)
    if not hides and not sees_padding:
        return None, some
    # Keys that are seen are of the queries' segment.
    return (jnp.ones((*lead, _padded(length)), jnp.int32), _pad(seen, -1).astype(jnp.int32)), some


def _any_in_sight(seen, length: int, kv_length: int, causal: bool, window: int):
    """Which queries see a key at all, `[..., length]`."""
    before = jnp.pad(jnp.cumsum(seen, -1), [(0, 0)] * (seen.ndim - 1) + [(1, 0)])  # how many of the first keys are seen
    position = np.arange(length)
    end = position + 1 if causal else position + window if window else np.full(length, kv_length)
    begin = position - window + 1 if window else np.zeros(length, int)
    return before[..., np.clip(end, 0, kv_length)] > before[..., np.clip(begin, 0, kv_length)]


def _pad(array, axis: int, value=0):
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % _LANES)
    return jnp.pad(array, width, constant_values=value) if width[axis][1] else array


def _splash(query, key, value, segments, sinks, sight: Sight, settings: tuple[tuple[int, int], float, bool]):
    """The kernel over lengths that it takes. Of `settings`: lengths without padding, the cap, whether to interpret."""
    # Pallas takes half a second to import, and most programs are not for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    *lead, heads, length, _ = query.shape
    kv_length, (given, softcap, interpret) = key.shape[-2], settings
    if sight.bits:
        known = sight.mask(*given)
        known[:, 0] |= ~known.any(1)  # of a query that sees nothing, what comes out is not used
        known = np.pad(known, [(0, length - given[0]), (0, 0)], mode="edge")
        mask = masks.NumpyMask(np.pad(known, [(0, 0), (0, kv_length - given[1])]))
    elif sight.window:
        after = 0 if sight.causal else sight.window - 1
        mask = masks.LocalMask((length, kv_length), (sight.window - 1, after), 0)
    else:
        mask = (masks.CausalMask if sight.causal else masks.FullMask)((length, kv_length))
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
    if segments is not None:
        operands.append(splash_kernel.SegmentIds(*segments))
    if sinks is not None:
        call = functools.partial(call, sinks=sinks.astype(jnp.float32))
    for _ in lead:
        call = jax.vmap(call)
    return call(*operands)


def interpreted(query, key, value, *arrays, **attributes):
    """The same without a TPU, slowly: what the tests run."""
    return splash(query, key, value, *arrays, **attributes, interpret=True)
