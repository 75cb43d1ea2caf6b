"""Grouped products on NVIDIA's GPUs, where XLA's own multiplies every row with every matrix.

On AMD's, XLA calls hipBLASLt's grouped product, and is left to it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kpx.kernels import triton_call
from kpx.kernels.grouped_matmul import Blocks, rows_kernel, sums_kernel
from kpx.kernels.triton_call import LEAST, Tiles


def tiles(rows: int, columns: int, inner: int, itemsize: int) -> Tiles:
    """Of a product `[rows, inner]` by `[inner, columns]`. Not measured: no device was at hand."""
    down, across = (min(128, max(LEAST, 1 << (n - 1).bit_length())) for n in (rows, columns))
    deep = min(128 // itemsize, max(LEAST, 1 << (inner - 1).bit_length()))
    return Tiles(down, across, deep, 8 if down * across >= 128 * 128 else 4, 3)


def _supports(x, other, sizes, *, transposed: bool = False) -> str | None:
    if (reason := triton_call.unavailable()) is not None:
        return reason
    if x.dtype != other.dtype or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {x.dtype} and {other.dtype}"
    if not math.prod(x.shape + other.shape + sizes.shape):
        return "an array is empty"
    return None


@rows_kernel.on("cuda", supports=_supports)
def grouped_triton(x, weight, sizes, *, transposed):
    """A program for each tile of rows of one group and of columns."""
    from kpx.kernels import grouped_matmul_triton as kernels

    (rows, inner), groups = x.shape, weight.shape[0]
    width = weight.shape[1 if transposed else 2]
    cut = tiles(-(-rows // groups), width, inner, x.dtype.itemsize)
    blocks = Blocks(rows, sizes, cut.rows)
    out = jax.ShapeDtypeStruct((rows, width), x.dtype)
    (result,) = triton_call.triton_call(
        kernels.rows_by_group, x, weight, blocks.group, blocks.first, blocks.end, out=(out,),
        grid=blocks.count * -(-width // cut.columns), warps=cut.warps, stages=cut.stages, SIZE=inner, WIDTH=width,
        GROUPS=groups, TRANSPOSED=bool(transposed), BM=cut.rows, BN=cut.columns, BK=cut.inner, PRECISION="tf32",
    )  # fmt: skip
    return result


@sums_kernel.on("cuda", supports=_supports)
def grouped_sums_triton(x, y, sizes):
    """A program for each block of each group's product, which reads the group's rows alone."""
    from kpx.kernels import grouped_matmul_triton as kernels

    (rows, size), width, groups = x.shape, y.shape[1], sizes.shape[0]
    cut = tiles(size, width, -(-rows // groups), x.dtype.itemsize)
    blocks = Blocks(rows, sizes, 1)
    out = jax.ShapeDtypeStruct((groups, size, width), x.dtype)
    (result,) = triton_call.triton_call(
        kernels.sums_by_group, x, y, blocks.starts, blocks.ends, out=(out,),
        grid=groups * -(-size // cut.rows) * -(-width // cut.columns), warps=cut.warps, stages=cut.stages, SIZE=size,
        WIDTH=width, BM=cut.rows, BN=cut.columns, BK=cut.inner, PRECISION="tf32",
    )  # fmt: skip
    return result
