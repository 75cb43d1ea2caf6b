"""Products of groups of rows, each with a matrix of its own: the experts of a mixture.

Rows are sorted by group and `ends` says where each group ends. The rows of a group are cut into blocks of equal size,
so that every product has a fixed shape while no row is multiplied with another group's matrix (the layout of
MegaBlocks, Gale et al., MLSys 2023, with its padding made of zeros here).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import torch

from kpx.bridges.torch.aten.common import sum_dtype
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.registry import lowers

_LARGEST_BLOCK = 64  # rows; above it a block's matrix is read often enough


class _Blocks:
    """Rows [S] of groups that end at `ends` [G], cut into blocks of one group each."""

    def __init__(self, rows: int, ends: jax.Array):
        groups = ends.shape[0]
        self.size = 1
        while self.size < _LARGEST_BLOCK and 2 * self.size * groups <= rows:
            self.size *= 2
        filled = min(groups, rows)
        self.count = (rows - filled) // self.size + filled  # the most that any division into groups needs
        ends = ends.astype(jnp.int32)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        blocks = -(-(ends - starts) // self.size)
        last = jnp.cumsum(blocks)
        block = jnp.arange(self.count, dtype=jnp.int32)
        self.group = jnp.minimum(jnp.searchsorted(last, block, side="right"), groups - 1)
        first = starts[self.group] + (block - (last - blocks)[self.group]) * self.size
        row = first[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        inside = (row < ends[self.group][:, None]) & (block < last[-1])[:, None]
        self._row = jnp.where(inside, row, rows)  # beyond the last: read as zero
        position = jnp.arange(rows, dtype=jnp.int32)
        group = jnp.minimum(jnp.searchsorted(ends, position, side="right"), groups - 1)
        place = (last - blocks)[group] * self.size + position - starts[group]
        self._place = jnp.where(position < ends[-1], place, self.count * self.size)

    def cut(self, x: jax.Array) -> jax.Array:
        """[S, K] as [blocks, size, K], zeros where a block has no row."""
        return x.at[self._row].get(mode="fill", fill_value=0)

    def joined(self, blocks: jax.Array) -> jax.Array:
        """[blocks, size, N] as [S, N], zeros for rows of no group."""
        flat = blocks.reshape(-1, blocks.shape[-1])
        return flat.at[self._place].get(mode="fill", fill_value=0)


def rows_by_group(x: jax.Array, weight: jax.Array, ends: jax.Array, dtype=None) -> jax.Array:
    """[S, K] by [G, K, N], each row with its group's matrix: [S, N]. Rows of no group give zeros."""
    blocks, wide = _Blocks(x.shape[0], ends), sum_dtype(x.dtype)

    def product(_, block):
        rows, group = block
        return None, jnp.matmul(rows, weight[group], preferred_element_type=wide).astype(dtype or x.dtype)

    return blocks.joined(jax.lax.scan(product, None, (blocks.cut(x), blocks.group))[1])


def sums_by_group(x: jax.Array, y: jax.Array, ends: jax.Array, dtype=None) -> jax.Array:
    """[M, S] by [S, N], summed over each group apart: [G, M, N]."""
    blocks, wide = _Blocks(y.shape[0], ends), sum_dtype(x.dtype)

    def add(sums, block):
        left, right, group = block
        product = jnp.matmul(left.T, right, preferred_element_type=wide)
        return sums.at[group].add(product), None

    empty = jnp.zeros((ends.shape[0], x.shape[0], y.shape[1]), wide)
    sums, _ = jax.lax.scan(add, empty, (blocks.cut(x.T), blocks.cut(y), blocks.group))
    return sums.astype(dtype or x.dtype)


@lowers(torch.ops.aten._grouped_mm.default)
def grouped_mm(x, y, offs=None, bias=None, out_dtype=None):
    dtype = x.dtype if out_dtype is None else to_jax(out_dtype)
    if bias is not None:
        raise ValueError("PyTorch itself takes no bias here yet")
    if offs is None:
        return jnp.matmul(x, y, preferred_element_type=sum_dtype(x.dtype)).astype(dtype)
    if x.ndim == 2 and y.ndim == 3:
        return rows_by_group(x, y, offs, dtype)
    if x.ndim == 2:
        return sums_by_group(x, y, offs, dtype)
    return rows_by_group(y.T, jnp.swapaxes(x, 1, 2), offs, dtype).T  # groups of columns


# transformers' own op for the dtypes that PyTorch's does not take under a compiler.
@lowers("transformers::grouped_mm_fallback")
def grouped_mm_fallback(x, weight, offs):
    return rows_by_group(x, weight, offs)


@lowers("transformers::grouped_mm_fallback_backward")
def grouped_mm_fallback_backward(x, weight, offs, gradient):
    return rows_by_group(gradient, jnp.swapaxes(weight, 1, 2), offs), sums_by_group(x.T, gradient, offs)
