"""The depthwise-separable block on NVIDIA's and AMD's GPUs, forward, as one kernel; the gradient is XLA's.

It moves the least, and computes the first convolution again for every tile of the result's channels: which is faster is a
matter of sizes, so rules leave it to XLA, and `kpx.tune` may find otherwise.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from kpx.kernels import triton_call
from kpx.kernels.registry import where_measured
from kpx.kernels.separable import reached, separable_kernel

_MOST_WINDOW = 49  # loads of a tile are written out one after another


def _supports(x, depthwise, scale, shift, pointwise, *, stride, top, bottom, left, right, activation) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if len({x.dtype, depthwise.dtype, pointwise.dtype}) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {x.dtype}, {depthwise.dtype}, {pointwise.dtype}"
    if math.prod(depthwise.shape[:2]) > _MOST_WINDOW:
        return f"windows must be of {_MOST_WINDOW} positions at most, and are of {list(depthwise.shape[:2])}"
    if not math.prod(x.shape + pointwise.shape):
        return "an array is empty"
    return None


def cut(positions: int, channels: int, depth: int) -> tuple[dict[str, int], int]:
    """Tiles of positions, of the result's channels, and channels at a time; and warps. Not measured: no device was at hand."""
    rows, columns = (min(128, max(16, 1 << (n - 1).bit_length())) for n in (positions, depth))
    return {"BM": min(64, rows), "BN": columns, "BK": min(32, max(16, 1 << (channels - 1).bit_length()))}, 4


def _forward(platform: str, attributes: dict, x, depthwise, scale, shift, pointwise):
    from kpx.kernels import separable_triton as kernels

    batch, height, width, channels = x.shape
    (kh, kw), stride = depthwise.shape[:2], int(attributes["stride"])
    top, bottom, left, right = (int(attributes[side]) for side in ("top", "bottom", "left", "right"))
    down, across = reached(height, kh, stride, top, bottom), reached(width, kw, stride, left, right)
    positions, depth = batch * down * across, pointwise.shape[1]
    blocks, warps = cut(positions, channels, depth)
    (out,) = triton_call.triton_call(
        kernels.forward, x, depthwise, scale, shift, pointwise,
        out=(jax.ShapeDtypeStruct((batch, down, across, depth), x.dtype),),
        grid=-(-positions // blocks["BM"]) * -(-depth // blocks["BN"]), warps=warps, POSITIONS=positions, HEIGHT=height,
        WIDTH=width, CHANNELS=channels, DOWN=down, ACROSS=across, DEPTH=depth, KH=kh, KW=kw, STRIDE=stride, TOP=top, LEFT=left,
        ACTIVATION=str(attributes["activation"]), PRECISION="ieee" if platform == "rocm" else "tf32", **blocks,
    )  # fmt: skip
    return out


def separable(*arrays, platform: str, **attributes):
    """What the first convolution gives is never written."""
    function = jax.custom_vjp(functools.partial(_forward, platform, attributes))
    plain = functools.partial(separable_kernel.decomposition, **attributes)
    function.defvjp(lambda *a: (function(*a), a), lambda saved, cotangent: jax.vjp(plain, *saved)[1](cotangent))
    return function(*arrays)


for _platform in ("cuda", "rocm"):
    separable_kernel.on(_platform, supports=_supports, prefers=where_measured, name=f"separable_{_platform}")(
        functools.partial(separable, platform=_platform)
    )
