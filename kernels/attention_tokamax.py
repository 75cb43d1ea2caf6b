"""Attention by tokamax (`kpx-xla[tokamax]`), an optional library of kernels: chosen by name, or where it was measured.

It asks the present device what it supports, so that it is used on one that is here alone. On NVIDIA's GPUs its kernels are
in Pallas Mosaic GPU (Hopper, Blackwell) and Triton, on TPUs in Pallas Mosaic; on the CPU it computes in chunks.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kpx.kernels.attention import attention_kernel, in_sight, named
from kpx.kernels.registry import where_measured
from kpx.kernels.visible import narrowed

_FORMS = {"cuda": ("mosaic", "triton"), "tpu": ("mosaic",), "cpu": ("xla_chunked",)}
_BACKENDS = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}


def unavailable(platform: str) -> str | None:
    """Why tokamax cannot be used for a platform here, or None."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed: `pip install 'kpx-xla[tokamax]'`"
    if jax.default_backend() != _BACKENDS[platform]:
        return "it computes for a device that is here alone"
    return None


def _library():
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # else it reads the process's arguments, which are not for it
    return importlib.import_module("tokamax")


@dataclass(frozen=True)
class Asked:
    """What attention is asked for; `further` are the arrays beside queries, keys and values, and `bits` a mask of blocks."""

    further: dict[str, Any]
    scale: float
    causal: bool
    window: int
    softcap: float
    low: float
    bits: str


def _asked(arrays, *, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible="") -> Asked:
    further, causal, window, bits = narrowed(named(arrays, given), causal, window, visible)
    return Asked(further, float(scale), causal, window, float(softcap), float(low), bits)


def _supports(platform: str, query, key, value, *arrays, **attributes) -> str | None:
    if (reason := unavailable(platform)) is not None:
        return reason
    asked = _asked(arrays, **attributes)
    if (rest := asked.further.keys() - {"mask", "kv_lengths"}) or asked.bits:
        return f"it takes masks and lengths alone, not {', '.join(rest) or 'a mask of blocks'}"
    if asked.softcap and "mask" in asked.further:
        return "it caps scores after a mask is added, not before"
    if asked.low > -math.inf and "mask" in asked.further:
        return "what its masks hide has no score of its own"
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return f"it takes one dtype, not {query.dtype}, {key.dtype}, {value.dtype}"
    if not math.prod(query.shape + key.shape):
        return "an array is empty"
    return None


def _attend(platform: str, query, key, value, *arrays, **attributes):
    tokamax = _library()
    asked = _asked(arrays, **attributes)
    mask, lengths = _by_batch(asked.further.get("mask"), query.shape[:-3]), asked.further.get("kv_lengths")
    is_bias = mask is not None and mask.dtype != bool
    seen = _seen(mask, lengths, (query.shape[-2], key.shape[-2]), asked.causal, asked.window) if asked.further else None
    if is_bias:
        mask = jnp.where(seen, mask, 0)  # else its gradient would be NaN
    turned = [jnp.swapaxes(a.reshape(-1, *a.shape[-3:]), 1, 2) for a in (query, key, value)]
    out = tokamax.dot_product_attention(
        *turned,
        bias=mask if is_bias else None,
        mask=None if is_bias else mask,
        scale=asked.scale,
        is_causal=asked.causal,
        local_window_size=(asked.window - 1, asked.window - 1) if asked.window else None,
        logits_soft_cap=asked.softcap or None,
        key_value_seq_lengths=None if lengths is None else lengths.reshape(-1),
        implementation=_FORMS[platform],
    )
    out = jnp.swapaxes(out, 1, 2)
    if seen is not None:  # what sees nothing is zero here, and not defined there
        out = jnp.where(seen, out, 0)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def _seen(mask, lengths, sizes: tuple[int, int], causal: bool, window: int):
    """Which queries see anything, `[batch, heads, length, 1]`, or what broadcasts to it."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, *sizes), axis) for axis in (2, 3))
    allowed = in_sight(row, column, causal, window) if causal or window else jnp.ones_like(row, bool)
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == bool else mask > -jnp.inf)
    if lengths is not None:
        allowed = allowed & (column < lengths.reshape(-1, 1, 1, 1))
    return jnp.any(allowed, -1, keepdims=True)


def _by_batch(mask, lead: tuple[int, ...]):
    """A mask with four dimensions, all batches in one; or one for all."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (len(lead) + 3 - mask.ndim) + mask.shape)
    first = lead if any(n != 1 for n in mask.shape[: len(lead)]) else mask.shape[: len(lead)]
    return jnp.broadcast_to(mask, (*first, *mask.shape[-3:])).reshape(-1, *mask.shape[-3:])


def _on(platform: str) -> None:
    def supports(*avals, **attributes):
        return _supports(platform, *avals, **attributes)

    def tokamax(*arrays, **attributes):
        return _attend(platform, *arrays, **attributes)

    attention_kernel.on(platform, supports=supports, prefers=where_measured)(tokamax)


for _platform in _FORMS:
    _on(_platform)
