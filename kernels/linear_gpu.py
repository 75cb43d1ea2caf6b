"""Linear layers with their epilogues on NVIDIA's and AMD's GPUs, in one kernel each; gradients are XLA's products.

A vendor's library multiplies faster than Triton where products are large, and what follows it is one pass over memory: which
of the two wins is a matter of sizes and devices. So rules leave both to XLA, and `kpx.tune` may find otherwise.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kpx.kernels import triton_call
from kpx.kernels.linear import Settings, differentiable, gated_kernel, linear_kernel
from kpx.kernels.registry import where_measured
from kpx.kernels.triton_call import LEAST, Tiles

_GROUP = 8  # tiles of rows, one after another


def tiles(platform: str, rows: int, columns: int, inner: int, itemsize: int, products: int) -> Tiles:
    """Of so many products `[rows, inner]` by `[inner, columns]` at once. Not measured: no device was at hand."""
    most = 128, 128 // products  # larger ones spill registers
    down, across = (min(m, max(LEAST, 1 << (n - 1).bit_length())) for n, m in zip((rows, columns), most, strict=True))
    deep = min((64 if platform == "rocm" else 128) // itemsize, max(LEAST, 1 << (inner - 1).bit_length()))
    return Tiles(down, across, deep, 8 if down * across * products >= 128 * 128 else 4, 2 if platform == "rocm" else 3)


def constants(x, width: int, settings: Settings, cut: Tiles) -> dict[str, object]:
    """The kernels' constants, of rows `[rows, size]`."""
    return {
        "ROWS": x.shape[0], "SIZE": x.shape[1], "WIDTH": width, "TRANSPOSED": settings.transposed,
        "ACTIVATION": settings.activation, "BM": cut.rows, "BN": cut.columns, "BK": cut.inner, "GROUP": _GROUP,
        "PRECISION": "ieee" if settings.platform == "rocm" else "tf32",  # what XLA computes f32 products in
    }  # fmt: skip


def _supports(x, *arrays, activation, transposed, given="") -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    weights = arrays[: len(arrays) - len(given.split())]
    if len({x.dtype, *(w.dtype for w in weights)}) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {', '.join(str(a.dtype) for a in (x, *weights))}"
    if not math.prod(x.shape + weights[0].shape):
        return "an array is empty"
    return None


def run(x, weights, further, settings: Settings, save: bool):
    """The result, and what is activated (of gated layers both products), in one array each, where they are to be saved."""
    from kpx.kernels import linear_triton as kernels

    gated, width = len(weights) > 1, weights[0].shape[0 if settings.transposed else 1]
    cut = tiles(settings.platform, x.shape[0], width, x.shape[1], x.dtype.itemsize, len(weights))
    whole = jax.ShapeDtypeStruct((x.shape[0], width), x.dtype)
    saved = [whole if save else jax.ShapeDtypeStruct((1,), x.dtype)] * len(weights)
    rest = [] if gated else [further.get(name, triton_call.nothing()) for name in ("bias", "residual")]
    given = {} if gated else {"BIAS": "bias" in further, "RESIDUAL": "residual" in further}
    out, *before = triton_call.triton_call(
        kernels.gated if gated else kernels.linear, x, *weights, *rest, out=(whole, *saved),
        grid=-(-x.shape[0] // cut.rows) * -(-width // cut.columns), warps=cut.warps, stages=cut.stages, SAVE=save, **given,
        **constants(x, width, settings, cut),
    )  # fmt: skip
    return out, before


linear_triton, gated_triton = differentiable(run)

for _platform in ("cuda", "rocm"):
    for _kernel, _name, _function in (
        (linear_kernel, "linear_triton", linear_triton),
        (gated_kernel, "gated_triton", gated_triton),
    ):
        _kernel.on(_platform, supports=_supports, prefers=where_measured, name=f"{_name}_{_platform}")(
            functools.partial(_function, platform=_platform)
        )
