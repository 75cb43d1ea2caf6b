"""Attention by cuDNN (its fused flash attention, forward and backward), on NVIDIA's Hopper.

The call is compiled into the program as it is; cuDNN plans it where the program is loaded, on the device.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kpx import jax_internals
from kpx.kernels.attention import attention_kernel, named
from kpx.kernels.visible import narrowed

_MOST_SIZE = 128
_LEAST = 2048  # queries; about where published measurements begin
# Published: 591 and 474 TFLOP/s on an H200, causal, 4096 long, which no Triton kernel reaches there; on an A100 Triton leads.
_KINDS = ("H100", "H200", "GH200", "H800", "H20")


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""
) -> str | None:
    further, causal, window, bits = narrowed(named(arrays, given), causal, window, visible)
    if further or bits or softcap:
        rest = ", ".join([*further, *(["a mask of blocks"] if bits else []), *(["softcap"] if softcap else [])])
        return f"it takes causality and windows alone, and not {rest}"
    if window and not causal:
        return "it takes windows that are causal alone"
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bf16 or f16 alone, not {query.dtype}, {key.dtype}, {value.dtype}"
    size = query.shape[-1]
    if size != value.shape[-1] or size > _MOST_SIZE or size % 8:
        return (
            f"heads must be of {_MOST_SIZE} at most, multiples of 8 and alike, and are of {size} and {value.shape[-1]}"
        )
    if causal and query.shape[-2] != key.shape[-2]:
        return f"causal, it takes as many queries as keys, not {query.shape[-2]} and {key.shape[-2]}"
    if not math.prod(query.shape + key.shape):
        return "an array is empty"
    return None


def _prefers(query, key, value, *arrays, where, **attributes) -> str | None:
    if not any(kind in where.kind for kind in _KINDS):
        return "it is preferred on Hopper alone"
    if query.shape[-2] < _LEAST:
        return f"it is preferred from {_LEAST} queries on"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(query, key, value, scale, causal, window):
    return _forward(query, key, value, scale, causal, window)[0]


def _forward(query, key, value, scale, causal, window):
    out, saved = jax_internals.cudnn_attention(query, key, value, scale, causal, window)
    return out, (query, key, value, saved, out)


def _backward(scale, causal, window, saved, cotangent):
    query, key, value, sums, out = saved
    return jax_internals.cudnn_attention_gradient(query, key, value, sums, out, cotangent, scale, causal, window)


_attend.defvjp(_forward, _backward)


@attention_kernel.on("cuda", supports=_supports, prefers=_prefers)
def cudnn(query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-math.inf, given="mask", visible=""):
    """NVIDIA's own."""
    _, causal, window, _ = narrowed(named(arrays, given), causal, window, visible)
    q, k, v = (a.reshape(-1, *a.shape[-3:]) for a in (query, key, value))
    return _attend(q, k, v, float(scale), causal, window or None).reshape(query.shape)
