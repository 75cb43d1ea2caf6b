"""Group normalization on NVIDIA's and AMD's GPUs, forward, where XLA passes over memory several times; channels are last.

Channels that come before positions are turned to the end around the kernel: convolutions compute so on NVIDIA's, and what is
around them with them, so that nothing is moved for it. The gradient is XLA's.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kpx.kernels import triton_call
from kpx.kernels.group_norm import group_norm_kernel
from kpx.kernels.registry import where_measured

_LEAST_ELEMENTS = 1 << 18
_BLOCK = 4096  # elements at a time


def _supports(x, weight, bias, *, groups, eps, axis, silu) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if any(a.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) for a in (x, weight, bias)):
        return f"it takes bf16, f16 or f32 alone, not {x.dtype}, {weight.dtype}, {bias.dtype}"
    if not math.prod(x.shape):
        return "an array is empty"
    return None


def _prefers(x, weight, bias, *, where, groups, eps, axis, silu) -> str | None:
    if where.differentiated:
        return "it has no gradient of its own"
    if math.prod(x.shape) < _LEAST_ELEMENTS:
        return f"an array {x.shape} is small: a pass less over it saves less than a launch takes"
    return None


def cut(own: int) -> tuple[dict[str, int], int]:
    """Blocks of positions, and of so many channels; and warps. Not measured: no device was at hand."""
    columns = 1 << (own - 1).bit_length()
    return {"BP": max(16, _BLOCK // columns), "BC": columns}, 8


def _forward(x, weight, bias, groups: int, eps: float, silu: bool):
    from kpx.kernels import group_norm_triton as kernels

    batch, channels = x.shape[0], x.shape[-1]
    flat = x.reshape(batch, -1, channels)
    blocks, warps = cut(channels // groups)
    (out,) = triton_call.triton_call(
        kernels.forward, flat, weight, bias, out=(jax.ShapeDtypeStruct(flat.shape, x.dtype),), grid=batch * groups,
        warps=warps, POSITIONS=flat.shape[1], CHANNELS=channels, GROUPS=groups, EPS=eps, SILU=silu, **blocks,
    )  # fmt: skip
    return out.reshape(x.shape)


def group_norm(x, weight, bias, *, groups, eps, axis, silu):
    """Reads twice, once of it from the cache, and writes once."""
    attributes = {"groups": int(groups), "eps": float(eps), "axis": int(axis), "silu": bool(silu)}

    @jax.custom_vjp
    def computed(x, weight, bias):
        turned = x if axis != 1 else jnp.moveaxis(x, 1, -1)
        out = _forward(turned, weight, bias, int(groups), float(eps), bool(silu))
        return out if axis != 1 else jnp.moveaxis(out, -1, 1)

    plain = functools.partial(group_norm_kernel.decomposition, **attributes)
    computed.defvjp(lambda *a: (computed(*a), a), lambda saved, cotangent: jax.vjp(plain, *saved)[1](cotangent))
    return computed(x, weight, bias)


# XLA's convolutions on AMD's GPUs compute in f32 and in another layout: there what is around the kernel would be moved for it.
for _platform, _rules in (("cuda", _prefers), ("rocm", where_measured)):
    group_norm_kernel.on(_platform, supports=_supports, prefers=_rules, name=f"group_norm_{_platform}")(group_norm)
