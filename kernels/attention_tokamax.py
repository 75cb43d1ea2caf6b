"""Attention by tokamax (`kpx-xla[tokamax]`), an optional library of kernels: chosen by name, or where it was measured.

It asks the present device what it supports, so that it is used on one that is here alone. On NVIDIA's GPUs its kernels are
in Pallas Mosaic GPU (Hopper, Blackwell) and Triton, on TPUs in Pallas Mosaic; on the CPU it computes in chunks.
"""

from __future__ import annotations

import importlib
import importlib.util
import math

import jax
import jax.numpy as jnp

from kpx.kernels.attention import attention_kernel, named
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


def _supports(
    platform: str,
    query,
    key,
    value,
    *arrays,
    scale,
    causal,
    window=0,
    softcap=0.0,
    low=-math.inf,
    given="mask",
    visible="",
):
    if (reason := unavailable(platform)) is not None:
        return reason
    further, causal, window, bits = narrowed(named(arrays, given), causal, window, visible)
    if (rest := further.keys() - {"mask", "kv_lengths"}) or bits:
        return f"it takes masks and lengths alone, not {', '.join(rest) or 'a mask of blocks'}"
    if softcap and "mask" in further:
        return "it caps scores after a mask is added, not before"
    if low > -math.inf and "mask" in further:
        return "what its masks hide has no score of its own"
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        return f"it takes one dtype, not {query.dtype}, {key.dtype}, {value.dtype}"
    if not math.prod(query.shape + key.shape):
        return "an array is empty"
    return None


def _attend(
    platform: str,
    query,
    key,
    value,
    *arrays,
    scale,
    causal,
    window=0,
    softcap=0.0,
    low=-math.inf,
    given="mask",
    visible="",
):
    tokamax = _library()
    further, causal, window, _ = narrowed(named(arrays, given), causal, window, visible)
    mask = further.get("mask")
    if mask is not None:
        mask = mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)
    is_bias = mask is not None and mask.dtype != bool
    lead = query.shape[:-3]
    lengths = further.get("kv_lengths")
    turned = [jnp.swapaxes(a.reshape(-1, *a.shape[-3:]), 1, 2) for a in (query, key, value)]
    if mask is not None:
        wide = jnp.broadcast_to(
            mask, (*(lead if any(n != 1 for n in mask.shape[: len(lead)]) else (1,) * len(lead)), *mask.shape[-3:])
        )
        mask = wide.reshape(-1, *mask.shape[-3:])
    out = tokamax.dot_product_attention(
        *turned,
        bias=mask if is_bias else None,
        mask=None if is_bias else mask,
        scale=float(scale),
        is_causal=causal,
        local_window_size=(window - 1, window - 1) if window else None,
        logits_soft_cap=softcap or None,
        key_value_seq_lengths=None if lengths is None else lengths.reshape(-1),
        implementation=_FORMS[platform],
    )
    return jnp.swapaxes(out, 1, 2).reshape(*query.shape[:-1], value.shape[-1])


def _on(platform: str) -> None:
    def supports(*avals, **attributes):
        return _supports(platform, *avals, **attributes)

    def tokamax(*arrays, **attributes):
        return _attend(platform, *arrays, **attributes)

    attention_kernel.on(platform, supports=supports, prefers=where_measured)(tokamax)


for _platform in _FORMS:
    _on(_platform)
