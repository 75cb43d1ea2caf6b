"""Norms in training steps on NVIDIA's and AMD's GPUs, where XLA reads an array once for sums and again to use them.

Forward alone XLA normalizes in one pass, and with what comes before, and is left to it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kpx.kernels import triton_call
from kpx.kernels.norm import carried_kernel, norm_kernel

MOST_SIZE = 8192  # twice as much spills registers, backward
_LEAST_ELEMENTS = 1 << 20
_BLOCK = 4096  # elements that a program has at a time, where a row is no longer
_PROGRAMS = {"cuda": 264, "rocm": 608}  # two for each multiprocessor of an H100 and an MI300X


@dataclass(frozen=True)
class Settings:
    """What norm is computed, and where. `affine`: "w" for a weight, "b" for a bias."""

    platform: str
    eps: float
    centred: bool
    affine: str


def _supports(x, *parameters, eps, centred, affine) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {x.dtype}"
    if x.shape[-1] > MOST_SIZE:
        return f"rows must be of {MOST_SIZE} at most, and are of {x.shape[-1]}"
    if math.prod(x.shape) < _LEAST_ELEMENTS:
        return f"an array {x.shape} is small: a pass less over it saves less than a launch takes"
    return None


def cut(size: int) -> tuple[dict[str, int], int]:
    """Blocks of rows of a size, and warps. Not measured: no device was at hand."""
    columns = 1 << (size - 1).bit_length()
    return {"BR": max(1, _BLOCK // columns), "BS": columns}, min(16, max(4, columns // 512))


def _forward(x, weight, bias, settings: Settings):
    from kpx.kernels import norm_triton as kernels

    (rows, size), (blocks, warps) = x.shape, cut(x.shape[1])
    statistics = jax.ShapeDtypeStruct((rows,), jnp.float32)
    out, mean, scale = triton_call.triton_call(
        kernels.forward, x, x if weight is None else weight, x if bias is None else bias,
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), statistics, statistics), grid=-(-rows // blocks["BR"]), warps=warps,
        ROWS=rows, SIZE=size, EPS=settings.eps, CENTRED=settings.centred, WEIGHT=weight is not None,
        BIAS=bias is not None, **blocks,
    )  # fmt: skip
    return out, (x, weight, bias, mean, scale)


def _backward(settings: Settings, saved, cotangent, further=None):
    from kpx.kernels import norm_triton as kernels

    x, weight, bias, mean, scale = saved
    (rows, size), (blocks, warps) = x.shape, cut(x.shape[1])
    programs = min(_PROGRAMS[settings.platform], -(-rows // blocks["BR"]))
    parts = jax.ShapeDtypeStruct((programs, size), jnp.float32)
    by_x, by_weight, by_bias = triton_call.triton_call(
        kernels.backward, x, x if weight is None else weight, cotangent, x if further is None else further, mean, scale,
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), parts, parts), grid=programs, warps=warps, ROWS=rows, SIZE=size,
        CENTRED=settings.centred, WEIGHT=weight is not None, FURTHER=further is not None, PROGRAMS=programs, **blocks,
    )  # fmt: skip
    return (
        by_x,
        None if weight is None else by_weight.sum(0).astype(weight.dtype),
        None if bias is None else by_bias.sum(0).astype(bias.dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalized(x, weight, bias, settings: Settings):
    return _forward(x, weight, bias, settings)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _carried(x, weight, bias, settings: Settings):
    return _forward(x, weight, bias, settings)[0], x


def _carried_forward(x, weight, bias, settings: Settings):
    out, saved = _forward(x, weight, bias, settings)
    return (out, x), saved


_normalized.defvjp(_forward, _backward)
_carried.defvjp(_carried_forward, lambda settings, saved, cotangents: _backward(settings, saved, *cotangents))


def normalized(x, *parameters, carried: bool, platform: str, eps, centred, affine):
    """One pass over memory forward, and one backward: the sums are kept, and nothing is read twice."""
    rest = list(parameters)
    weight = rest.pop(0) if "w" in affine else None
    bias = rest.pop(0) if "b" in affine else None
    rows = x.reshape(-1, x.shape[-1])
    function = _carried if carried else _normalized
    made = function(rows, weight, bias, Settings(platform, float(eps), bool(centred), affine))
    return jax.tree.map(lambda a: a.reshape(x.shape), made)


for _platform in _PROGRAMS:
    for _kernel, _is_carried in ((norm_kernel, False), (carried_kernel, True)):
        _kernel.on(_platform, supports=_supports)(
            functools.wraps(normalized)(functools.partial(normalized, carried=_is_carried, platform=_platform))
        )
