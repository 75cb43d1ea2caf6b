"""Attention on the CPU by oneDNN's products: some queries of a head at a time, whose scores stay in a core's cache."""

from __future__ import annotations

import math
import struct

import jax
import jax.numpy as jnp
import numpy as np

from kpx.hardware import cpu
from kpx.kernels import onednn
from kpx.kernels.attention import attention_kernel, named
from kpx.kernels.visible import narrowed

_MOST_KEYS = 8192  # whose scores of sixteen queries are half of a core's second cache
# From how much work on it is faster than XLA's plain form.
_LEAST, _LEAST_FLOPS = 16, 1 << 22


def _supports(
    query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-jnp.inf, given="mask", visible=""
) -> str | None:
    if (reason := onednn.missing()) is not None:
        return reason
    further = named(arrays, given)
    _, _, window, _ = narrowed(further, causal, window, visible)
    if window or softcap or set(further) - {"mask"}:
        return "it takes causality and a mask, and nothing else"
    if query.ndim not in (3, 4) or not {a.dtype for a in (query, key, value)} <= {jnp.dtype("f4")} | {
        jnp.dtype(jnp.bfloat16)
    }:
        return "it takes f32 and bf16, and one dimension before the heads or none"
    if query.dtype == jnp.bfloat16 and not cpu.has_wide_vectors():
        return "oneDNN has no bf16 kernels for a CPU without AVX-512"
    if len({a.dtype for a in (query, key, value)}) > 1 or key.shape[-2] > _MOST_KEYS:
        return f"it takes one dtype, and {_MOST_KEYS} keys at most"
    return None


def _no_gradient(query, key, value, *arrays, **attributes) -> str:
    return "it computes no gradients"


def _prefers(query, key, value, *arrays, where, **attributes) -> str | None:
    flops = 2 * query.size * key.shape[-2] * 2
    if where.kind != "cpu":
        return "instruction sets are limited, and oneDNN's kernels are for this machine's"
    if query.shape[-2] < _LEAST or flops < _LEAST_FLOPS:
        return f"from {_LEAST} queries and {_LEAST_FLOPS >> 20} MFLOP on it is faster than plain products"
    return None


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of the batch, of heads and of rows, in elements; 0 where there is no batch."""
    found = [math.prod(shape[i + 1 :]) for i in range(len(shape) - 1)]
    return [0] * (3 - len(found)) + found


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", float(number)))[0]


@attention_kernel.on("cpu", name="onednn", supports=_supports, gradient=_no_gradient, prefers=_prefers, least=_LEAST)
def attention(query, key, value, *arrays, scale, causal, window=0, softcap=0.0, low=-jnp.inf, given="mask", visible=""):
    """The products by oneDNN, the softmax between by code of ours, in f32."""
    further = named(arrays, given)
    seen, causal, _, bits = narrowed(further, causal, window, visible)
    mask = (further if bits else seen).get("mask")
    batch = query.shape[0] if query.ndim == 4 else 1
    sizes = [batch, query.shape[-3], key.shape[-3], query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1]]
    attributes = {"sizes": sizes, "numbers": [_bits(scale), _bits(low), int(causal)]}
    out = (*query.shape[:-1], value.shape[-1])
    for name, shape in (("query", query.shape), ("key", key.shape), ("value", value.shape), ("out", out)):
        attributes[name] = _strides(shape)
    operands = [query, key, value]
    if mask is not None:
        operands.append(mask if mask.dtype in (bool, jnp.bfloat16) else mask.astype(jnp.float32))
        shape = (1,) * (4 - mask.ndim) + mask.shape
        strides = [math.prod(shape[i + 1 :]) for i in range(4)]
        attributes["mask"] = [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
    call = jax.ffi.ffi_call("kpx_onednn_attention", jax.ShapeDtypeStruct(out, query.dtype))
    return call(*operands, **{name: np.array(numbers, np.int64) for name, numbers in attributes.items()})
