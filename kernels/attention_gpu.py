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
from kpx.kernels.attention import attention_kernel, in_sight, masked, named
from kpx.kernels.triton_call import LEAST
from kpx.kernels.visible import lists, mask_of, narrowed

_MOST_SIZE = 256


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: rows of queries and of keys at a time, warps of a program, loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Settings:
    """What attention is computed: see `attention`. `heads` are those of queries in each batch, `bits` a mask that is known while compiling."""

    platform: str
    heads: int
    scale: float
    causal: bool
    window: int
    softcap: float
    low: float = -math.inf
    bits: str = ""


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""
) -> str | None:
    reason = triton_call.unavailable()
    return takes(query, key, value) if reason is None else reason


def _prefers(query, key, value, *arrays, where, **attributes) -> str | None:
    if query.shape[-2] < LEAST:
        return (
            f"queries must be {LEAST} at least, and are {query.shape[-2]}: scores of few are small, and plain products"
        )
    return None


def takes(query, key, value) -> str | None:
    """Why kernels do not take arrays of these types and sizes, or None."""
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MOST_SIZE:
        return f"heads must be of {_MOST_SIZE} at most, and are of {query.shape[-1]} and {value.shape[-1]}"
    if not math.prod(query.shape + key.shape + value.shape):
        return "an array is empty"
    return None


def power(size: int) -> int:
    """The power of two that a block of so many is of."""
    return max(LEAST, 1 << (size - 1).bit_length())


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


def sizes(query, key, value, further, settings: Settings, blocks: Blocks) -> dict[str, Any]:
    """The kernels' constants, of arrays `[heads of all batches, length, size]` and of those beside them (see `flash`)."""
    length, kv_length = query.shape[-2], key.shape[-2]
    rows, columns = min(blocks.queries, power(length)), min(blocks.keys, power(kv_length))
    kind, strides = 0, [0, 0, 0]
    if (mask := further.get("mask")) is not None:
        rest = [math.prod(mask.shape[axis + 1 :]) for axis in range(3)]
        kind = 1 if mask.dtype == bool else 2
        strides = [stride if size > 1 else 0 for stride, size in zip(rest, mask.shape, strict=False)]
    elif settings.bits:
        kind, strides = 1, [0, 0, columns]  # a block's own mask
    low = settings.low * math.log2(math.e)
    if low > -math.inf:
        low = max(low, float(np.finfo(np.float32).min))
    return {
        "LENGTH": length, "KV_LENGTH": kv_length, "SIZE": query.shape[-1], "VALUE_SIZE": value.shape[-1],
        "HEADS": settings.heads, "GROUP": query.shape[0] // key.shape[0], "SCALE": settings.scale,
        "SOFTCAP": settings.softcap, "CAUSAL": settings.causal, "WINDOW": settings.window,
        "MASK": kind, "LOW": low,
        "MASK_BATCH": strides[0], "MASK_HEAD": strides[1], "MASK_ROW": strides[2],
        "SLOPES": "slopes" in further, "BOUNDS": "bounds" in further, "SEGMENTS": "segments" in further,
        "BQ": rows, "BK": columns,
        "BD": power(query.shape[-1]), "BV": power(value.shape[-1]),
        "PRECISION": "ieee" if settings.platform == "rocm" else "tf32",  # what XLA computes f32 products in
    }  # fmt: skip


def _row_bytes(query, value) -> int:
    return max(power(query.shape[-1]), power(value.shape[-1])) * query.dtype.itemsize


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(query, key, value, further, settings: Settings):
    return _forward(query, key, value, further, settings)[0]


def _operands(further: dict[str, Any]) -> list[Any]:
    """What all kernels take after queries, keys and values."""
    return [
        further.get(name, triton_call.nothing()) for name in ("mask", "slopes", "bounds", "segments", "kv_segments")
    ]


def _lists(settings: Settings, constants: dict[str, Any], further, by_keys: bool = False):
    """The arrays beside queries, keys and values, with lists of the blocks that are seen of a mask that is known last; and
    how many numbers each list has."""
    if not settings.bits:
        return [*_operands(further), triton_call.nothing()], 0
    mask = mask_of(settings.bits, (constants["LENGTH"], constants["KV_LENGTH"]))
    if settings.causal or settings.window:
        row, column = np.arange(mask.shape[0])[:, None], np.arange(mask.shape[1])
        mask = mask & in_sight(row, column, settings.causal, settings.window)
    listed, parts = lists(mask, constants["BQ"], constants["BK"], by_columns=by_keys)
    return [*_operands(further | {"mask": jnp.asarray(parts)}), jnp.asarray(listed)], listed.shape[1]


def _forward(query, key, value, further, settings):
    from kpx.kernels import attention_triton as kernels

    heads, length, _ = query.shape
    blocks = forward_blocks(settings.platform, _row_bytes(query, value))
    constants = sizes(query, key, value, further, settings, blocks)
    outputs = (
        jax.ShapeDtypeStruct((heads, length, value.shape[-1]), query.dtype),
        jax.ShapeDtypeStruct((heads, length), jnp.float32),
    )
    (*operands, listed), numbers = _lists(settings, constants, further)
    out, log_total = triton_call.triton_call(
        kernels.forward, query, key, value, *operands, further.get("sinks", triton_call.nothing()), listed, out=outputs,
        grid=heads * -(-length // constants["BQ"]), warps=blocks.warps, stages=blocks.stages, BLOCKS=numbers,
        SINKS="sinks" in further, **constants,
    )  # fmt: skip
    return out, (query, key, value, further, out, log_total)


def _backward(settings, saved, cotangent):
    from kpx.kernels import attention_triton as kernels

    query, key, value, further, out, log_total = saved
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), -1)
    blocks = backward_blocks(settings.platform, _row_bytes(query, value))
    constants = sizes(query, key, value, further, settings, blocks)
    call = functools.partial(triton_call.triton_call, warps=blocks.warps, stages=blocks.stages, **constants)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (query, key, value)]
    rest = cotangent, log_total, delta
    rows, columns = -(-query.shape[1] // constants["BQ"]), -(-key.shape[1] // constants["BK"])
    operands, numbers = _lists(settings, constants, further, by_keys=True)
    by_key, by_value = call(
        kernels.backward_keys, query, key, value, *operands, *rest, out=like[1:], grid=key.shape[0] * columns,
        BLOCKS=numbers,
    )  # fmt: skip
    operands, numbers = _lists(settings, constants, further)
    (by_query,) = call(
        kernels.backward_queries, query, key, value, *operands, *rest, out=like[:1], grid=query.shape[0] * rows,
        BLOCKS=numbers,
    )  # fmt: skip
    by_further = _by_others(query, key, value, further, cotangent, log_total, delta, settings)
    if (mask := further.get("mask")) is not None and _has_rows(mask):
        (by_further["mask"],) = call(
            kernels.backward_mask, query, key, value, *operands[:-1], *rest,
            out=[jax.ShapeDtypeStruct(mask.shape, mask.dtype)], grid=math.prod(mask.shape[:2]) * rows * columns, BATCHES=query.shape[0] // settings.heads,
        )  # fmt: skip
    return by_query, by_key, by_value, by_further


def _has_rows(mask) -> bool:
    """Whether a mask is of numbers of each query's own: the gradient by those has a kernel."""
    return mask.dtype != bool and mask.shape[-2] > 1


def _by_others(query, key, value, further, cotangent, log_total, delta, settings) -> dict[str, Any]:
    """The gradients by arrays beside queries, keys and values; those that need all scores hold them, where they are used."""
    found = {
        name: np.zeros(a.shape, jax.dtypes.float0)
        for name, a in further.items()
        if not jnp.issubdtype(a.dtype, jnp.floating)
    }
    heads = settings.heads
    log_total, delta = (a.reshape(-1, heads, a.shape[-1]) for a in (log_total / math.log2(math.e), delta))
    if (sinks := further.get("sinks")) is not None:
        weights = jnp.exp(sinks[:, None] - log_total)
        found["sinks"] = -jnp.sum(weights * delta, (0, 2))
    if (slopes := further.get("slopes")) is not None:
        by_scores = _scores_gradient(query, key, value, further, cotangent, log_total, delta, settings)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, by_scores.shape[-2:], axis) for axis in (0, 1))
        if "bounds" in further:
            row = row + further["bounds"][:, 0, None, None, None]
        found["slopes"] = -jnp.sum(by_scores * jnp.abs(row - column), (0, 2, 3)).astype(slopes.dtype)
    if (mask := further.get("mask")) is not None and mask.dtype != bool and not _has_rows(mask):
        by_scores = _scores_gradient(query, key, value, further, cotangent, log_total, delta, settings)
        whole = tuple(axis for axis, size in enumerate(mask.shape) if size == 1)
        found["mask"] = jnp.sum(by_scores, whole, keepdims=True).astype(mask.dtype)
    return found


def _scores_gradient(query, key, value, further, cotangent, log_total, delta, settings):
    """The gradient by masked scores, `[batch, heads, length, kv_length]`, in plain JAX."""
    wide = [a.astype(jnp.float32).reshape(-1, settings.heads, *a.shape[1:]) for a in (query, cotangent)]
    key, value = (
        jnp.repeat(a.astype(jnp.float32), query.shape[0] // a.shape[0], 0).reshape(-1, settings.heads, *a.shape[1:])
        for a in (key, value)
    )
    given = dict(further)
    if (bounds := given.pop("bounds", None)) is not None:
        given |= {"offset": bounds[:, 0], "kv_lengths": bounds[:, 1]}
    scores = jnp.einsum("bhqd,bhkd->bhqk", wide[0], key) * settings.scale
    scores = masked(scores, given, settings.causal, settings.window, settings.softcap, settings.low)
    weights = jnp.where(scores <= settings.low, 0, jnp.exp(scores - log_total[..., None]))
    return weights * (jnp.einsum("bhqd,bhkd->bhqk", wide[1], value) - delta[..., None])


_flash.defvjp(_forward, _backward)


def settle(
    query, key, arrays, platform: str, *, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""
) -> tuple[Settings, dict[str, Any]]:
    """What kernels compute, and the arrays beside queries, keys and values as they take them: the mask with four dimensions
    (of size 1 where it is broadcast, less the last), first positions and lengths together as bounds, all by batch."""
    *lead, heads, length, _ = query.shape
    further, batch, kv_length = named(arrays, given), math.prod(lead), key.shape[-2]
    # Blocks that are listed as whole are not looked at again, so nothing else may hide a part of them at run time.
    known = "" if visible.startswith("bits") and "kv_lengths" in further else visible
    further, causal, window, bits = narrowed(further, causal, window, known)
    if (mask := further.get("mask")) is not None:
        shape = (1,) * (query.ndim - mask.ndim) + mask.shape
        if any(size != 1 for size in shape[: len(lead)]):
            shape = (*lead, *shape[-3:])
        further["mask"] = jnp.broadcast_to(mask, (*shape[:-1], kv_length)).reshape(-1, *shape[-3:-1], kv_length)
    offset, kv_lengths = further.pop("offset", None), further.pop("kv_lengths", None)
    if offset is not None or kv_lengths is not None:
        offset = jnp.zeros(batch, jnp.int32) if offset is None else offset.reshape(batch)
        kv_lengths = jnp.full(batch, kv_length, jnp.int32) if kv_lengths is None else kv_lengths.reshape(batch)
        further["bounds"] = jnp.stack([offset, kv_lengths], -1)
    if "segments" in further:
        further["segments"] = further["segments"].reshape(batch, length)
        further["kv_segments"] = further.get("kv_segments", further["segments"]).reshape(batch, kv_length)
    for name in {"sinks", "slopes"} & further.keys():
        further[name] = further[name].astype(jnp.float32)
    return Settings(platform, heads, float(scale), bool(causal), int(window), float(softcap), float(low), bits), further


def flash(query, key, value, *arrays, platform, **attributes):
    """Never holds the scores: blocks of them are computed, used and forgotten, and computed again for the gradient."""
    settings, further = settle(query, key, arrays, platform, **attributes)
    flat_query, flat_key, flat_value = (a.reshape(-1, *a.shape[-2:]) for a in (query, key, value))
    out = _flash(flat_query, flat_key, flat_value, further, settings)
    return out.reshape(*query.shape[:-1], value.shape[-1])


@attention_kernel.on("cuda", supports=_supports, prefers=_prefers)
def flash_cuda(query, key, value, *arrays, **attributes):
    """For NVIDIA's Ampere and later."""
    return flash(query, key, value, *arrays, platform="cuda", **attributes)


@attention_kernel.on("rocm", supports=_supports, prefers=_prefers)
def flash_rocm(query, key, value, *arrays, **attributes):
    """For AMD's CDNA."""
    return flash(query, key, value, *arrays, platform="rocm", **attributes)
