"""Grouped products on TPUs: JAX's megablox, a kernel in Pallas, for sums over groups of rows.

XLA has a kernel of its own for rows by group; sums by group it computes over all rows, masked, for every group.
"""

from __future__ import annotations

import importlib
import math

import jax.numpy as jnp

from kpx.kernels.grouped_matmul import sums_kernel

_TILE = 512  # rows, and columns of either operand, at a time
_LANES = 128


def _supports(x, y, sizes) -> str | None:
    if x.dtype != y.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bf16 or f32 alone, not {x.dtype} and {y.dtype}"
    if x.shape[0] % _LANES or x.shape[1] % _LANES or y.shape[1] % _LANES or not sizes.shape[0]:
        return f"sizes must be multiples of {_LANES}, and are {[*x.shape, y.shape[1]]}"
    return None


@sums_kernel.on("tpu", supports=_supports)
def megablox(x, y, sizes, *, interpret: bool = False):
    """Reads a group's rows alone."""
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    tiling = tuple(math.gcd(n, _TILE) for n in (x.shape[0], x.shape[1], y.shape[1]))
    return module.tgmm(x.T, y, sizes, x.dtype, tiling, interpret=interpret)
