"""ATen's ops of order: sort, top k, quantiles, searching, and running extremes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten.common import axis, is_float
from kpx.bridges.torch.aten.scan import associative_scan
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers


@lowers(aten.sort.default)
def sort(x, dim=-1, descending=False):
    return sort_stable(x, stable=True, dim=dim, descending=descending)


@lowers(aten.sort.stable)
def sort_stable(x, *, stable=True, dim=-1, descending=False):
    """NaN is the largest value; equal values keep their order, whichever way the sort goes."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int64)
    dim = axis(x, dim)
    order = jnp.argsort(x, dim, stable=True, descending=descending).astype(jnp.int64)
    return jnp.take_along_axis(x, order, dim), order


@lowers(aten.topk.default)
def topk(x, k, dim=-1, largest=True, sorted=True):
    if not x.ndim:
        return x, jnp.zeros((), jnp.int64)
    dim = axis(x, dim)
    if largest and is_float(x):
        values, order = jax.lax.top_k(jnp.moveaxis(x, dim, -1), k)
        return jnp.moveaxis(values, -1, dim), jnp.moveaxis(order, -1, dim).astype(jnp.int64)
    values, order = sort_stable(x, dim=dim, descending=largest)
    return tuple(jax.lax.slice_in_dim(a, 0, k, 1, dim) for a in (values, order))


@lowers(aten.kthvalue.default)
def kthvalue(x, k, dim=-1, keepdim=False):
    values, order = sort_stable(x, dim=dim)
    return _picked(values, order, k - 1, axis(x, dim), keepdim)


def _picked(values, order, position, dim, keepdim):
    if not values.ndim:
        return values, order
    found = tuple(jax.lax.dynamic_index_in_dim(a, position, dim, keepdims=keepdim) for a in (values, order))
    return found


@lowers(aten.median.dim)
def median_dim(x, dim=-1, keepdim=False):
    """The lower of two middle values; NaN where there is one."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int64)
    dim = axis(x, dim)
    values, order = _picked(*sort_stable(x, dim=dim), (x.shape[dim] - 1) // 2, dim, True)
    if is_float(x):
        missing = jnp.isnan(x)
        first = jnp.argmax(missing, dim, keepdims=True)
        any_missing = jnp.any(missing, dim, keepdims=True)
        values = jnp.where(any_missing, jnp.asarray(jnp.nan, x.dtype), values)
        order = jnp.where(any_missing, first, order)
    return (values, order) if keepdim else (values.squeeze(dim), order.squeeze(dim))


@lowers(aten.median.default)
def median(x):
    if not x.size:
        return jnp.full((), jnp.nan, x.dtype)
    return median_dim(x.reshape(-1), 0)[0]


@lowers(aten.nanmedian.dim)
def nanmedian_dim(x, dim=-1, keepdim=False):
    if not x.ndim or not is_float(x):
        return median_dim(x, dim, keepdim)
    dim = axis(x, dim)
    count = jnp.sum(~jnp.isnan(x), dim, keepdims=True)
    values, order = sort_stable(x, dim=dim)
    middle = jnp.maximum(count - 1, 0) // 2
    found = tuple(jnp.take_along_axis(a, middle, dim) for a in (values, order))
    return found if keepdim else tuple(a.squeeze(dim) for a in found)


@lowers(aten.nanmedian.default)
def nanmedian(x):
    if not x.size:
        return jnp.full((), jnp.nan, x.dtype)
    return nanmedian_dim(x.reshape(-1), 0)[0]


@lowers(aten.mode.default)
def mode(x, dim=-1, keepdim=False):
    """The smallest of the most frequent values, and the last place it stands in."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int64)
    dim = axis(x, dim)
    moved = jnp.moveaxis(x, dim, -1)
    ordered = jnp.sort(moved, -1)
    counts = jnp.sum(ordered[..., :, None] == ordered[..., None, :], -1)  # NaN equals nothing
    value = jnp.take_along_axis(ordered, jnp.argmax(counts, -1, keepdims=True), -1)
    place = moved.shape[-1] - 1 - jnp.argmax(jnp.flip(moved == value, -1), -1, keepdims=True)
    if is_float(x):  # PyTorch takes the first NaN where no value stands twice
        is_nan = jnp.isnan(moved)
        takes_nan = is_nan.any(-1, keepdims=True) & (counts.max(-1, keepdims=True) <= 1)
        value = jnp.where(takes_nan, jnp.asarray(jnp.nan, x.dtype), value)
        place = jnp.where(takes_nan, jnp.argmax(is_nan, -1, keepdims=True), place)
    value, place = jnp.moveaxis(value, -1, dim), jnp.moveaxis(place, -1, dim).astype(jnp.int64)
    return (value, place) if keepdim else (value.squeeze(dim), place.squeeze(dim))


@lowers(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def searchsorted(boundaries, values, *, out_int32=False, right=False, side=None, sorter=None):
    right = right if side is None else side == "right"
    if sorter is not None:
        boundaries = jnp.take_along_axis(boundaries, sorter, -1)
    dtype = jnp.int32 if out_int32 else jnp.int64
    if not hasattr(values, "dtype"):
        values = np.asarray(values).astype(boundaries.dtype)  # NumPy wraps integers around, as PyTorch does
    values = jnp.asarray(values)
    side = "right" if right else "left"
    if boundaries.ndim == 1:
        return jnp.searchsorted(boundaries, values, side=side).astype(dtype)
    length = boundaries.shape[-1]
    if not length or not values.size:
        return jnp.zeros(values.shape, dtype)
    flat = boundaries.reshape(-1, length), values.reshape(-1, values.shape[-1])
    found = jax.vmap(lambda b, v: jnp.searchsorted(b, v, side=side))(*flat)
    return found.reshape(values.shape).astype(dtype)


@lowers(aten.bucketize.Tensor, aten.bucketize.Scalar)
def bucketize(values, boundaries, *, out_int32=False, right=False):
    return searchsorted(boundaries, values, out_int32=out_int32, right=right)


def _running(x, dim, keeps_new):
    """Return the extreme values so far, and where each was last met; `keeps_new(new, old)`: a value takes over."""
    if not x.ndim:
        return x, jnp.zeros((), jnp.int64)
    dim = axis(x, dim)
    places = jax.lax.broadcasted_iota(jnp.int64, x.shape, dim)

    def later(a, b):
        (old, i), (new, j) = a, b
        takes = keeps_new(new, old)
        if is_float(x):
            takes = jnp.isnan(new) | (takes & ~jnp.isnan(old))
        return jnp.where(takes, new, old), jnp.where(takes, j, i)

    return associative_scan(later, (x, places), dim)


@lowers(aten.cummax.default)
def cummax(x, dim):
    return tuple(_running(x, dim, lambda new, old: new >= old))


@lowers(aten.cummin.default)
def cummin(x, dim):
    return tuple(_running(x, dim, lambda new, old: new <= old))


@lowers(aten.histc.default)
def histc(x, bins=100, min=0, max=0):
    x = x.reshape(-1)
    if min == max:
        low, high = (jnp.min(x), jnp.max(x)) if x.size else (jnp.zeros((), x.dtype), jnp.ones((), x.dtype))
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    else:
        low, high = jnp.asarray(min, x.dtype), jnp.asarray(max, x.dtype)
    place = jnp.floor((x - low) * bins / (high - low)).astype(jnp.int64)
    inside = (x >= low) & (x <= high)
    place = jnp.where(inside, jnp.minimum(place, bins - 1), bins)
    return jnp.zeros(bins, x.dtype).at[place].add(1, mode="drop")
