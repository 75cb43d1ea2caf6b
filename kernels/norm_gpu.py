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
from kpx.kernels.norm import LARGEST, carried_kernel, fused_norm_kernel, norm_kernel

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
    return None


def _prefers(x, *parameters, where, eps, centred, affine) -> str | None:
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
        _kernel.on(_platform, supports=_supports, prefers=_prefers)(
            functools.wraps(normalized)(functools.partial(normalized, carried=_is_carried, platform=_platform))
        )


# With what comes before and after ---------------------------------------------------------------------

# Rounded by AMD's own form of f8, which is another on each of its generations: by XLA there.
_OUT = {"cuda": ("", "int8", "float8_e4m3fn", "float8_e5m2"), "rocm": ("", "int8")}


def _supports_fused(platform: str, x, *arrays, eps, centred, given, out="", total=False, fill=False) -> str | None:
    further = dict(zip(given.split(), arrays, strict=True))
    if out not in _OUT[platform]:
        return f"it quantizes to {', '.join(_OUT[platform][1:])} on {platform}, not to {out}"
    for name in ("weight", "bias"):
        if name in further and further[name].dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"it takes a {name} of bf16, f16 or f32 alone, not {further[name].dtype}"
    if "residual" in further and further["residual"].dtype != x.dtype:
        return f"it takes a residual of {x.dtype} with an array of that, not of {further['residual'].dtype}"
    if not math.prod(x.shape) or ("index" in further and not math.prod(further["index"].shape)):
        return "an array is empty"
    return _supports(x, eps=eps, centred=centred, affine="none")


def _prefers_fused(x, *arrays, where, eps, centred, given, out="", total=False, fill=False) -> str | None:
    if where.differentiated:
        return "it has no gradient of its own"
    if out.startswith("float8") and "A100" in where.kind:
        return "an A100 converts to no f8"
    further = dict(zip(given.split(), arrays, strict=True))
    rows = further["index"].shape if "index" in further else x.shape[:-1]
    return _prefers(
        jax.ShapeDtypeStruct((*rows, x.shape[-1]), x.dtype), where=where, eps=eps, centred=centred, affine=""
    )


def _fused(platform: str, attributes: dict, x, *arrays):
    from kpx.kernels import norm_triton as kernels

    given, out = attributes["given"].split(), attributes.get("out", "")
    further = dict(zip(given, arrays, strict=True))
    shape = (*(further["index"].shape if "index" in further else x.shape[:-1]), x.shape[-1])
    rows, size = math.prod(shape[:-1]), shape[-1]
    blocks, warps = cut(size)
    by_row, total = bool(out) and "scale" not in further, bool(attributes.get("total", False))
    one = functools.partial(jax.ShapeDtypeStruct, (1,))
    flat = {
        "residual": lambda a: a.reshape(rows, size),
        "index": lambda a: _rows_of(a, x.shape[0], attributes),
        "scale": lambda a: a.reshape(1),
    }
    operands = [
        flat.get(name, lambda a: a)(further[name]) if name in further else triton_call.nothing()
        for name in ("residual", "index", "weight", "bias", "scale")
    ]
    made = triton_call.triton_call(
        kernels.fused, x.reshape(-1, size), *operands,
        out=(
            jax.ShapeDtypeStruct((rows, size), jnp.dtype(out) if out else x.dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32) if by_row else one(jnp.float32),
            jax.ShapeDtypeStruct((rows, size), x.dtype) if total else one(x.dtype),
        ),
        grid=-(-rows // blocks["BR"]), warps=warps, ROWS=rows, SIZE=size, EPS=float(attributes["eps"]),
        CENTRED=bool(attributes["centred"]), RESIDUAL="residual" in further, INDEX="index" in further,
        TABLE=x.shape[0], TOTAL=total, WEIGHT="weight" in further, BIAS="bias" in further, QUANTIZED=bool(out),
        LARGEST=LARGEST[out] if out else 0.0, ROUND=out == "int8", BY_ROW=by_row, **blocks,
    )  # fmt: skip
    found = [made[0].reshape(shape)]
    if by_row:
        found.append(made[1].reshape(*shape[:-1], 1))
    if total:
        found.append(made[2].reshape(shape))
    return tuple(found)


def _rows_of(index, rows: int, attributes: dict):
    """An index of rows; as JAX reads it (from the end if negative, and bounded), or less than 0 where outside is filled."""
    index = index.reshape(-1)
    if attributes.get("fill", False):
        return jnp.where((index >= 0) & (index < rows), index, -1).astype(jnp.int32)
    return jnp.clip(jnp.where(index < 0, index + rows, index), 0, rows - 1).astype(jnp.int32)


def fused_norm(x, *arrays, platform: str, **attributes):
    """One pass over memory, whatever comes before and after."""
    plain = functools.partial(fused_norm_kernel.decomposition, **attributes)
    function = jax.custom_vjp(functools.partial(_fused, platform, attributes))
    function.defvjp(lambda *a: (function(*a), a), lambda saved, cotangents: jax.vjp(plain, *saved)[1](cotangents))
    return function(x, *arrays)


for _platform in _PROGRAMS:
    fused_norm_kernel.on(
        _platform,
        supports=functools.partial(_supports_fused, _platform),
        prefers=_prefers_fused,
        name=f"fused_norm_{_platform}",
    )(functools.partial(fused_norm, platform=_platform))
