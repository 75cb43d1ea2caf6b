"""Attention on NVIDIA's and AMD's GPUs: the kernels of `attention_triton`, forward and backward."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels import triton_call
from kpx.kernels.attention import attention_kernel, in_sight

_MOST_SIZE = 256
_LEAST = 16  # rows and columns of a product on tensor cores


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: rows of queries and of keys at a time, warps of a program, loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Settings:
    """What attention is computed: see `attention`. `heads` are those of queries in each batch."""

    platform: str
    heads: int
    scale: float
    causal: bool
    window: int
    softcap: float


def _supports(query, key, value, *mask, scale, causal, window=0, softcap=0.0) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MOST_SIZE:
        return f"heads must be of {_MOST_SIZE} at most, and are of {query.shape[-1]} and {value.shape[-1]}"
    if query.shape[-2] < _LEAST:
        return (
            f"queries must be {_LEAST} at least, and are {query.shape[-2]}: scores of few are small, and plain products"
        )
    if not math.prod(query.shape + key.shape + value.shape):
        return "an array is empty"
    return None


def _power(size: int) -> int:
    return max(_LEAST, 1 << (size - 1).bit_length())


# By the bytes of a head's row, as much as on-chip memory holds of what is under way. Not measured: no device was at hand.


def forward_blocks(platform: str, row_bytes: int) -> Blocks:
    """How the forward kernel is cut, of heads whose rows take so many bytes."""
    if platform == "rocm":
        return Blocks(128, 64, 4, 1) if row_bytes <= 256 else Blocks(64, 32, 4, 1)
    if row_bytes <= 256:
        return Blocks(128, 64, 4 if row_bytes <= 128 else 8, 3)
    return Blocks(128, 64, 8, 2) if row_bytes <= 512 else Blocks(64, 32, 8, 1)


def backward_blocks(platform: str, row_bytes: int) -> Blocks:
    """How the backward kernels are cut."""
    if platform == "rocm":
        return Blocks(64, 64, 4, 1) if row_bytes <= 256 else Blocks(32, 32, 4, 1)
    if row_bytes <= 256:
        return Blocks(64, 64, 4 if row_bytes <= 128 else 8, 2)
    return Blocks(64, 64, 8, 1) if row_bytes <= 512 else Blocks(32, 32, 8, 1)


def sizes(query, key, value, mask, settings: Settings, blocks: Blocks) -> dict[str, Any]:
    """The kernels' constants, of arrays `[heads of all batches, length, size]` and a mask `[batch, heads, length, keys]`."""
    length, kv_length = query.shape[-2], key.shape[-2]
    strides = [0, 0, 0]
    if mask is not None:
        rest = [math.prod(mask.shape[axis + 1 :]) for axis in range(3)]
        strides = [stride if size > 1 else 0 for stride, size in zip(rest, mask.shape, strict=False)]
    return {
        "LENGTH": length, "KV_LENGTH": kv_length, "SIZE": query.shape[-1], "VALUE_SIZE": value.shape[-1],
        "HEADS": settings.heads, "GROUP": query.shape[0] // key.shape[0], "SCALE": settings.scale,
        "SOFTCAP": settings.softcap, "CAUSAL": settings.causal, "WINDOW": settings.window,
        "MASK": 0 if mask is None else 1 if mask.dtype == bool else 2,
        "MASK_BATCH": strides[0], "MASK_HEAD": strides[1], "MASK_ROW": strides[2],
        "BQ": min(blocks.queries, _power(length)), "BK": min(blocks.keys, _power(kv_length)),
        "BD": _power(query.shape[-1]), "BV": _power(value.shape[-1]),
        "PRECISION": "ieee" if settings.platform == "rocm" else "tf32",  # what XLA computes f32 products in
    }  # fmt: skip


def _row_bytes(query, value) -> int:
    return max(_power(query.shape[-1]), _power(value.shape[-1])) * query.dtype.itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(query, key, value, mask, settings: Settings):
    return _forward(query, key, value, mask, settings)[0]


def _forward(query, key, value, mask, settings):
    from kpx.kernels import attention_triton as kernels

    heads, length, _ = query.shape
    blocks = forward_blocks(settings.platform, _row_bytes(query, value))
    constants = sizes(query, key, value, mask, settings, blocks)
    outputs = (
        jax.ShapeDtypeStruct((heads, length, value.shape[-1]), query.dtype),
        jax.ShapeDtypeStruct((heads, length), jnp.float32),
    )
    out, log_total = triton_call.triton_call(
        kernels.forward, query, key, value, query if mask is None else mask, out=outputs,
        grid=heads * -(-length // constants["BQ"]), warps=blocks.warps, stages=blocks.stages, **constants,
    )  # fmt: skip
    return out, (query, key, value, mask, out, log_total)


def _backward(settings, saved, cotangent):
    from kpx.kernels import attention_triton as kernels

    query, key, value, mask, out, log_total = saved
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), -1)
    blocks = backward_blocks(settings.platform, _row_bytes(query, value))
    constants = sizes(query, key, value, mask, settings, blocks)
    call = functools.partial(triton_call.triton_call, warps=blocks.warps, stages=blocks.stages, **constants)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (query, key, value)]
    operands = query, key, value, query if mask is None else mask, cotangent, log_total, delta
    by_key, by_value = call(
        kernels.backward_keys, *operands, out=like[1:], grid=key.shape[0] * -(-key.shape[1] // constants["BK"])
    )
    (by_query,) = call(
        kernels.backward_queries, *operands, out=like[:1], grid=query.shape[0] * -(-query.shape[1] // constants["BQ"])
    )
    by_mask = None
    if mask is not None:
        by_mask = _by_mask(query, key, value, mask, cotangent, log_total, delta, settings)
    return by_query, by_key, by_value, by_mask


def _by_mask(query, key, value, mask, cotangent, log_total, delta, settings):
    """The gradient by numbers that were added, in plain JAX: it holds the scores, where it is used at all."""
    if mask.dtype == bool:
        return np.zeros(mask.shape, jax.dtypes.float0)
    wide = [a.astype(jnp.float32).reshape(-1, settings.heads, *a.shape[1:]) for a in (query, cotangent)]
    key, value = (
        jnp.repeat(a.astype(jnp.float32), query.shape[0] // a.shape[0], 0).reshape(-1, settings.heads, *a.shape[1:])
        for a in (key, value)
    )
    log_total, delta = (a.reshape(-1, settings.heads, a.shape[-1], 1) for a in (log_total, delta))
    scores = jnp.einsum("bhqd,bhkd->bhqk", wide[0], key) * settings.scale
    if settings.softcap:
        scores = jnp.tanh(scores / settings.softcap) * settings.softcap
    if settings.causal or settings.window:
        seen = in_sight(*scores.shape[-2:], settings.causal, settings.window)
        scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores + mask.astype(jnp.float32) - log_total / math.log2(math.e))
    by_scores = weights * (jnp.einsum("bhqd,bhkd->bhqk", wide[1], value) - delta)
    whole = tuple(axis for axis, size in enumerate(mask.shape) if size == 1)
    return jnp.sum(by_scores, whole, keepdims=True).astype(mask.dtype)


_flash.defvjp(_forward, _backward)


def flash(query, key, value, *masks, platform, scale, causal, window=0, softcap=0.0):
    """Never holds the scores: blocks of them are computed, used and forgotten, and computed again for the gradient."""
    *lead, heads, _, _ = query.shape
    mask = None
    if masks:
        shape = (1,) * (query.ndim - masks[0].ndim) + masks[0].shape
        if any(size != 1 for size in shape[: len(lead)]):
            shape = (*lead, *shape[-3:])
        mask = jnp.broadcast_to(masks[0], (*shape[:-1], key.shape[-2])).reshape(-1, *shape[-3:-1], key.shape[-2])
    settings = Settings(platform, heads, float(scale), bool(causal), int(window), float(softcap))
    flat_query, flat_key, flat_value = (a.reshape(-1, *a.shape[-2:]) for a in (query, key, value))
    out = _flash(flat_query, flat_key, flat_value, mask, settings)
    return out.reshape(*query.shape[:-1], value.shape[-1])


@attention_kernel.on("cuda", supports=_supports)
def flash_cuda(query, key, value, *mask, **attributes):
    """For NVIDIA's Ampere and later."""
    return flash(query, key, value, *mask, platform="cuda", **attributes)


@attention_kernel.on("rocm", supports=_supports)
def flash_rocm(query, key, value, *mask, **attributes):
    """For AMD's CDNA."""
    return flash(query, key, value, *mask, platform="rocm", **attributes)
