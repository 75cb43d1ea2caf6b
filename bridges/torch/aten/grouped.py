"""Products of groups of rows, each with a matrix of its own: the experts of a mixture."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kpx.bridges.torch.aten.common import sum_dtype
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers
from kpx.kernels.grouped_matmul import rows_kernel, sums_kernel


def _sizes(ends: jax.Array) -> jax.Array:
    """How many rows each group has, of where each ends."""
    return jnp.diff(ends.astype(jnp.int32), prepend=0)


@lowers(aten._grouped_mm.default)
def grouped_mm(x, y, offs=None, bias=None, out_dtype=None):
    dtype = x.dtype if out_dtype is None else to_jax(out_dtype)
    if bias is not None:
        raise ValueError("PyTorch itself takes no bias here yet")
    if offs is None:
        return jnp.matmul(x, y, preferred_element_type=sum_dtype(x.dtype)).astype(dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    if x.ndim == 2 and y.ndim == 3:
        return rows_kernel(x, y, _sizes(offs), transposed=False)
    if x.ndim == 2:
        return sums_kernel(x.T, y, _sizes(offs))
    return rows_kernel(y.T, x, _sizes(offs), transposed=True).T  # groups of columns


# transformers' own op for the dtypes that PyTorch's does not take under a compiler.
@lowers("transformers::grouped_mm_fallback")
def grouped_mm_fallback(x, weight, offs):
    return rows_kernel(x, weight, _sizes(offs), transposed=False)


@lowers("transformers::grouped_mm_fallback_backward")
def grouped_mm_fallback_backward(x, weight, offs, gradient):
    sizes = _sizes(offs)
    return rows_kernel(gradient, weight, sizes, transposed=True), sums_kernel(x, gradient, sizes)
