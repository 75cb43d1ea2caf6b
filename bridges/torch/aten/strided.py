"""ATen's views by strides: `as_strided` on the memory that an operand describes, `diagonal` and `unfold` on its values.

PyTorch's decompositions of `diagonal` and `unfold` compute strides of the tensor at hand. The arrays of a compiled
program have none, so these ops have rules of their own, and `as_strided` works on the strides noted at capture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten.common import axis, sum_dtype
from kpx.bridges.torch.operators import aten, prims
from kpx.bridges.torch.registry import lowers, memory_layout
from kpx.errors import UnsupportedError

# Strides and memory ----------------------------------------------------------------------------


def _positions(size: Sequence[int], stride: Sequence[int], offset: int, xp: Any = jnp) -> Any:
    """The position in memory of each element: computed by the program, or with `xp=np` now."""
    positions = xp.full(tuple(size), offset, xp.int64)
    for d, (n, s) in enumerate(zip(size, stride, strict=True)):
        along = [n if e == d else 1 for e in range(len(size))]
        positions = positions + (xp.arange(n, dtype=xp.int64) * s).reshape(along)
    return positions


def _by_stride(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The dimensions from the one that is outermost in memory to the innermost; those of size 1 first."""
    return sorted(range(len(size)), key=lambda d: (size[d] != 1, -stride[d], d))


def _is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether elements fill a stretch of memory without gaps or overlap, in some order of the dimensions."""
    wanted = 1
    for d in reversed(_by_stride(size, stride)):
        if size[d] != 1 and stride[d] != wanted:
            return False
        wanted *= size[d]
    return True


def _last(size: Sequence[int], stride: Sequence[int], offset: int) -> int:
    return offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


class _Memory:
    """The memory that a tensor of given strides describes, as a 1-d array of a program.

    Attributes:
        values: its elements from the tensor's first one on; zeros where the tensor holds none.
    """

    def __init__(self, x: jax.Array, stride: Sequence[int], offset: int):
        # Along a dimension of stride 0 all elements are one.
        self._size = [1 if s == 0 else n for n, s in zip(x.shape, stride, strict=True)]
        self._shape, self._stride, self._offset = x.shape, list(stride), offset
        self._order = _by_stride(self._size, self._stride)
        self._is_dense = not x.size or _is_dense(self._size, self._stride)
        x = jax.lax.slice(x, [0] * x.ndim, [min(n, m) for n, m in zip(x.shape, self._size, strict=True)])
        if self._is_dense:
            self.values = jnp.transpose(x, self._order).reshape(-1)
        else:
            where = _positions(self._size, self._stride, 0)
            self.values = jnp.zeros(_last(self._size, self._stride, 0) + 1, x.dtype).at[where].set(x)

    def start(self, size: Sequence[int], stride: Sequence[int], offset: int) -> int:
        """Where a view starts in `values`.

        Raises:
            UnsupportedError: the view has elements that are none of the tensor's.
        """
        start = offset - self._offset
        inside = start >= 0 and _last(size, stride, start) < self.values.size
        if inside and not self._is_dense:
            held = np.zeros(self.values.size, bool)
            held[_positions(self._size, self._stride, 0, np)] = True
            inside = bool(held[_positions(size, stride, start, np)].all())
        if inside:
            return start
        raise UnsupportedError(
            f"`as_strided` to size {tuple(size)}, stride {tuple(stride)} and offset {offset} reads or writes memory "
            f"outside of its operand, which has size {tuple(self._shape)}, stride {tuple(self._stride)} and offset "
            f"{self._offset}: a compiled program has the operand's elements alone. Apply it to the tensor that the "
            "operand is a view of, or write it with indexing, `unfold` or `expand`."
        )

    def tensor(self, values: jax.Array) -> jax.Array:
        """The tensor, with this content of its memory."""
        if self._is_dense:
            shape = [self._size[d] for d in self._order]
            x = jnp.transpose(values.reshape(shape), np.argsort(self._order))
        else:
            x = values[_positions(self._size, self._stride, 0)]
        return jnp.broadcast_to(x, self._shape)


def _viewed(memory: jax.Array, size: Sequence[int], stride: Sequence[int], start: int) -> jax.Array:
    """Elements of a 1-d array by strides: slices and reshapes where dimensions nest, else a gather."""
    steps = list(stride)
    inner = [1 if s == 0 else n for n, s in zip(size, steps, strict=True)]
    order = [d for d in _by_stride(inner, steps) if inner[d] != 1]
    nested = all(steps[a] >= inner[b] * steps[b] for a, b in itertools.pairwise(order))
    if not nested:
        positions = _positions(inner, steps, start)
        return jnp.broadcast_to(memory[positions], size)
    x = memory[start:]
    for d in order:
        length = inner[d] * steps[d]
        if x.shape[-1] < length:  # after the last element
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
        x = x[..., :length].reshape(*x.shape[:-1], inner[d], steps[d])
    x = x[..., 0]
    x = jnp.transpose(x, np.argsort(order)).reshape(inner)
    return jnp.broadcast_to(x, size)


@lowers(aten.as_strided.default, aten.as_strided_copy.default)
def as_strided(x, size, stride, storage_offset=None):
    """Elements by strides in the memory that the operand described when the graph was captured."""
    offset, strides = memory_layout(0, x.shape)
    if not math.prod(size):
        return jnp.zeros(size, x.dtype)
    memory = _Memory(x, strides, offset)
    start = memory.start(size, stride, offset if storage_offset is None else storage_offset)
    return _viewed(memory.values, size, stride, start)


@lowers(aten.as_strided_scatter.default, prims.as_strided_scatter.default)
def as_strided_scatter(x, src, size, stride, storage_offset=None):
    """The operand with `src` written into its memory by strides."""
    offset, strides = memory_layout(0, x.shape)
    if not math.prod(size):
        return x
    memory = _Memory(x, strides, offset)
    start = memory.start(size, stride, offset if storage_offset is None else storage_offset)
    where = _positions(size, stride, start)
    return memory.tensor(memory.values.at[where].set(jnp.broadcast_to(src.astype(x.dtype), tuple(size))))


# Diagonals -------------------------------------------------------------------------------------


@lowers(aten.diagonal.default, aten.diagonal_copy.default)
def diagonal(x, offset=0, dim1=0, dim2=1):
    return jnp.diagonal(x, offset, dim1 % x.ndim, dim2 % x.ndim)


@lowers(aten.diagonal_backward.default)
def diagonal_backward(grad, input_sizes, offset, dim1, dim2):
    return diagonal_scatter(jnp.zeros(input_sizes, grad.dtype), grad, offset, dim1, dim2)


@lowers(aten.diagonal_scatter.default)
def diagonal_scatter(x, src, offset=0, dim1=0, dim2=1):
    dim1, dim2 = dim1 % x.ndim, dim2 % x.ndim
    moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    rows = jnp.arange(src.shape[-1]) + max(-offset, 0)
    columns = jnp.arange(src.shape[-1]) + max(offset, 0)
    return jnp.moveaxis(moved.at[..., rows, columns].set(src), (-2, -1), (dim1, dim2))


# Windows ---------------------------------------------------------------------------------------


@lowers(aten.unfold.default, aten.unfold_copy.default)
def unfold(x, dimension, size, step):
    """Windows of `size` elements, `step` apart; a new last dimension runs within a window.

    Each part of at most `step` elements of all windows is a slice and a reshape: nothing is gathered.
    """
    if not x.ndim:
        return jnp.broadcast_to(x, (size,))
    dim = axis(x, dimension)
    x = jnp.moveaxis(x, dim, -1)
    count = (x.shape[-1] - size) // step + 1
    step = step if count > 1 else max(size, 1)
    parts = [] if size else [jnp.zeros((*x.shape[:-1], count, 0), x.dtype)]
    for first in range(0, size, step):
        width = min(step, size - first)
        part = x[..., first : first + (count - 1) * step + width]
        part = jnp.pad(part, [(0, 0)] * (x.ndim - 1) + [(0, step - width)])
        parts.append(part.reshape(*x.shape[:-1], count, step)[..., :width])
    windows = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
    return jnp.moveaxis(windows, -2, dim)


@lowers(aten.unfold_backward.default)
def unfold_backward(grad_in, input_sizes, dim, size, step):
    """Return the sum over the windows that hold an element."""
    dtype = grad_in.dtype
    if input_sizes:  # PyTorch's `istft` gives one row of windows for a batch
        shape = [*input_sizes, size]
        shape[dim] = grad_in.shape[dim]
        grad_in = jnp.broadcast_to(grad_in, shape)
    wide = jnp.int32 if dtype == jnp.bool_ else sum_dtype(dtype)
    like = jax.ShapeDtypeStruct(tuple(input_sizes), wide)
    (total,) = jax.linear_transpose(lambda x: unfold(x, dim, size, step), like)(grad_in.astype(wide))
    return total.astype(dtype)
