"""ATen's gathers and scatters.

PyTorch raises on an out-of-range index and a compiled program cannot; kpx fills with NaN (or the
smallest integer) instead of reading some other row, so that a wrong index cannot look right.
"""

from __future__ import annotations

import jax.numpy as jnp
import torch

from kpx.bridges.torch.registry import lowers

aten = torch.ops.aten


@lowers(aten.embedding.default)
def embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    return weight.at[indices].get(mode="fill", wrap_negative_indices=False)


@lowers(aten.index.Tensor)
def index(x, indices):
    key = tuple(slice(None) if i is None else i for i in indices)
    return x.at[key].get(mode="fill")


@lowers(aten.index_select.default)
def index_select(x, dim, indices):
    return jnp.take(x, indices.reshape(-1), dim % max(x.ndim, 1), mode="fill") if x.ndim else x


@lowers(aten.gather.default)
def gather(x, dim, indices, *, sparse_grad=False):
    dim %= max(x.ndim, 1)
    kept = tuple(slice(n) if d != dim else slice(None) for d, n in enumerate(indices.shape))
    return jnp.take_along_axis(x[kept], indices, dim, mode="fill") if x.ndim else x


@lowers(aten.index_put.default)
def index_put(x, indices, values, accumulate=False):
    at = x.at[tuple(slice(None) if i is None else i for i in indices)]
    values = values.astype(x.dtype)
    return at.add(values) if accumulate else at.set(values)


@lowers(aten.slice_scatter.default)
def slice_scatter(x, src, dim=0, start=None, end=None, step=1):
    key = [slice(None)] * x.ndim
    key[dim] = slice(start, end, step)
    return x.at[tuple(key)].set(src)


@lowers(aten.select_scatter.default)
def select_scatter(x, src, dim, index):
    key: list = [slice(None)] * x.ndim
    key[dim] = index
    return x.at[tuple(key)].set(src)
