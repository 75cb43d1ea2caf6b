"""Products of groups of rows, each with a matrix of its own: the experts of a mixture (MegaBlocks, arXiv 2211.15841)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels.registry import kernel


def _dimensions(lhs: int, rhs: int, group: list[int]) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=group
    )


def _ragged(x, other, sizes, *, transposed=None):
    group, contracted = ([], (0, 0)) if transposed is None else ([0], (1, 2 if transposed else 1))
    return jax.lax.ragged_dot_general(x, other, sizes, _dimensions(*contracted, group))


@kernel("kpx.grouped_matmul", version=1)
def rows_kernel(x, weight, sizes, *, transposed):
    """`[m, k]` by `[groups, k, n]`, or `[groups, n, k]` where transposed: each row by its group's matrix, `[m, n]`."""
    in_blocks, ragged = (functools.partial(f, transposed=transposed) for f in (_rows_in_blocks, _ragged))
    if not x.shape[0] or not sizes.shape[0]:
        return jnp.zeros((x.shape[0], weight.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.platform_dependent(x, weight, sizes, cpu=in_blocks, default=ragged)


@kernel("kpx.grouped_matmul_sums", version=1)
def sums_kernel(x, y, sizes):
    """`[m, k]` and `[m, n]`: of each group the product over its rows, `[groups, k, n]`."""
    if not x.shape[0] or not sizes.shape[0]:
        return jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), x.dtype)
    return jax.lax.platform_dependent(x, y, sizes, cpu=_sums_in_blocks, default=_ragged)


@rows_kernel.bilinear
def _rows_transposed(cotangent, x, weight, sizes, *, transposed):
    if x is None:
        return rows_kernel(cotangent, weight, sizes, transposed=not transposed)
    return sums_kernel(cotangent, x, sizes) if transposed else sums_kernel(x, cotangent, sizes)


@sums_kernel.bilinear
def _sums_transposed(cotangent, x, y, sizes):
    return rows_kernel(y if x is None else x, cotangent, sizes, transposed=x is None)


def _sample(rng, structs, attributes):
    """Rows that are divided evenly."""
    *arrays, sizes = structs
    given = [rng.standard_normal(s.shape).astype(s.dtype) for s in arrays]
    groups = sizes.shape[0]
    return *given, np.diff(np.arange(groups + 1) * arrays[0].shape[0] // max(1, groups)).astype(np.int32)


rows_kernel.sample = sums_kernel.sample = _sample


def grouped_matmul(x, weight, group_sizes):
    """Each row of `x` by its group's matrix; `jax.lax.ragged_dot`, whose kernels are chosen by target.

    Args:
        x: `[rows, size]`, floating, sorted by group.
        weight: `[groups, size, width]`, of the dtype of `x`.
        group_sizes: `[groups]`, integers: how many rows each group has, in order. Rows beyond their sum give zeros.

    Returns:
        `[rows, width]`, of the dtype of `x`; sums are in f32 (f64 for f64).

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    shapes = f"rows {x.shape}, matrices {weight.shape}, group sizes {group_sizes.shape}"
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1] or group_sizes.shape != weight.shape[:1]:
        raise InputError(
            f"grouped_matmul was given {shapes}. They are `[rows, size]`, `[groups, size, width]` and `[groups]`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != weight.dtype:
        raise InputError(f"grouped_matmul was given {x.dtype} and {weight.dtype}. Both are one floating dtype.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(f"grouped_matmul was given group sizes of {group_sizes.dtype}. They are integers.")
    return rows_kernel(x, weight, group_sizes.astype(jnp.int32), transposed=False)


class Blocks:
    """Rows `[rows]` of groups, cut into blocks of a size, of one group each: blocks have a fixed shape, whatever groups do.

    Attributes:
        count: of blocks, as many as any division into groups needs.
        group: of each block, `[count]`; the last is of rows that are of no group, and of blocks that are not needed.
        first: the first row of each, and `end` the one after the last of its group.
    """

    def __init__(self, rows: int, sizes: jax.Array, block: int):
        groups = sizes.shape[0]
        ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
        self.ends = jnp.concatenate([ends, jnp.full(1, rows, jnp.int32)])
        self.starts = jnp.concatenate([jnp.zeros(1, jnp.int32), self.ends[:-1]])
        filled = min(groups + 1, rows)
        self.count = (rows - filled) // block + filled
        blocks = -(-(self.ends - self.starts) // block)
        last = jnp.cumsum(blocks)
        index = jnp.arange(self.count, dtype=jnp.int32)
        self.group = jnp.minimum(jnp.searchsorted(last, index, side="right"), groups).astype(jnp.int32)
        self.first = self.starts[self.group] + (index - (last - blocks)[self.group]) * block
        self.end = jnp.where(index < last[-1], self.ends[self.group], self.first)
        self._rows, self._block, self._offset = rows, block, last - blocks

    def cut(self, x: jax.Array) -> jax.Array:
        """`[rows, k]` as `[count, block, k]`, zeros where a block has no row."""
        row = self.first[:, None] + jnp.arange(self._block, dtype=jnp.int32)
        row = jnp.where(row < self.end[:, None], row, self._rows)  # beyond the last: read as zero
        return x.at[row].get(mode="fill", fill_value=0)

    def joined(self, blocks: jax.Array) -> jax.Array:
        """`[count, block, n]` as `[rows, n]`."""
        position = jnp.arange(self._rows, dtype=jnp.int32)
        group = jnp.searchsorted(self.ends, position, side="right")
        place = self._offset[group] * self._block + position - self.starts[group]
        return blocks.reshape(-1, blocks.shape[-1])[place]


_LARGEST_BLOCK = 64  # rows; above it a block's matrix is read often enough


def _block(rows: int, groups: int) -> int:
    """Rows in a block: about half of a group's, so that few are filled up."""
    size = 1
    while size < _LARGEST_BLOCK and 2 * size * groups <= rows:
        size *= 2
    return size


def _rows_in_blocks(x, weight, sizes, *, transposed):
    """On the CPU: XLA's own there masks all rows for each group, and multiplies them all with each matrix."""
    groups, wide = weight.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    blocks = Blocks(x.shape[0], sizes, _block(x.shape[0], groups))
    contracted = ((1,), (1 if transposed else 0,))

    def product(_, block):
        rows, group = block
        matrix = weight[jnp.minimum(group, groups - 1)]
        out = jax.lax.dot_general(rows, matrix, (contracted, ((), ())), preferred_element_type=wide)
        return None, jnp.where(group < groups, out, 0).astype(x.dtype)

    return blocks.joined(jax.lax.scan(product, None, (blocks.cut(x), blocks.group))[1])


def _sums_in_blocks(x, y, sizes):
    """Each block's product is added to its group's."""
    groups, wide = sizes.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    blocks = Blocks(x.shape[0], sizes, _block(x.shape[0], groups))

    def add(sums, block):
        left, right, group = block
        product = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return sums.at[group].add(product), None  # that of no group falls off the end

    empty = jnp.zeros((groups, x.shape[1], y.shape[1]), wide)
    return jax.lax.scan(add, empty, (blocks.cut(x), blocks.cut(y), blocks.group))[0].astype(x.dtype)
