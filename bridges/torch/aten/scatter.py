"""ATen's scatters and what is built of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.common import axis, highest, lowest, sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers


def accumulated(at, how, values, dtype, **options):
    """`x.at[...]` with values brought in by `set`, `add`, `multiply`, `max` or `min`; of bools, sums are "or"."""
    if dtype == jnp.bool_:
        how = "max" if how == "add" else "min" if how == "multiply" else how
    return getattr(at, how)(values, **options)


def _places(x, dim, index):
    """Indices into every dimension of x for each element of `index`, which stands for dimension `dim`."""
    grid = [jax.lax.broadcasted_iota(index.dtype, index.shape, d) for d in range(x.ndim)]
    grid[dim] = index
    return tuple(grid)


def _scattered(x, dim, index, src, how):
    """`x` with `src` brought in at `index` along a dimension; `how` names a method of `x.at[...]`."""
    if not x.ndim:
        x1, src1 = x[None], src.reshape(-1)[:1] if hasattr(src, "reshape") else src
        return _scattered(x1, 0, index.reshape(-1)[:1], src1, how)[0]
    if not index.size:
        return x
    dim = axis(x, dim)
    index = index[(...,)] if index.ndim else index[None]
    checks.in_range(index, 0, x.shape[dim], dim)
    if hasattr(src, "ndim") and src.ndim:
        src = src[tuple(slice(n) for n in index.shape)]
    at = x.at[_places(x, dim, index)]
    return accumulated(at, how, src, x.dtype, mode="drop", wrap_negative_indices=False)


@lowers(aten.scatter.src, aten.scatter.value)
def scatter(x, dim, index, src):
    return _scattered(x, dim, index, src if hasattr(src, "dtype") else jnp.asarray(src, x.dtype), "set")


@lowers(aten.scatter_add.default)
def scatter_add(x, dim, index, src):
    return _scattered(x, dim, index, src, "add")


@lowers(aten.scatter.reduce, aten.scatter.value_reduce)
def scatter_with(x, dim, index, src, *, reduce):
    src = src if hasattr(src, "dtype") else jnp.asarray(src, x.dtype)
    return _scattered(x, dim, index, src, {"add": "add", "multiply": "multiply"}[reduce])


_METHODS = {"sum": "add", "prod": "multiply", "amax": "max", "amin": "min"}


def _neutral(reduce, dtype):
    if reduce == "amax":
        return lowest(dtype)
    return highest(dtype) if reduce == "amin" else jnp.asarray(reduce == "prod", dtype)


def _reduced(x, scattered, count_of, reduce, include_self):
    """A reduction by scattering; `scattered(base, how)` and `count_of(base)` bring values and ones in."""
    dtype, wide = x.dtype, sum_dtype(x.dtype)
    base = x.astype(wide)
    how = "sum" if reduce == "mean" else reduce
    counts = count_of(jnp.zeros(x.shape, jnp.int32))
    touched = counts > 0
    start = base if include_self else jnp.where(touched, _neutral(how, wide), base)
    result = scattered(start, _METHODS[how])
    if how in ("amax", "amin") and jnp.issubdtype(wide, jnp.floating):
        result = jnp.where(scattered(jnp.isnan(start).astype(wide), "nan") > 0, jnp.nan, result)
    if reduce == "mean":
        total = counts + (1 if include_self else 0)
        total = jnp.maximum(total, 1).astype(wide)
        mean = result / total if jnp.issubdtype(wide, jnp.inexact) else jnp.floor_divide(result, total)
        result = mean if include_self else jnp.where(touched, mean, base)
    return result.astype(dtype)


@lowers(aten.scatter_reduce.two)
def scatter_reduce(x, dim, index, src, reduce, *, include_self=True):
    wide = sum_dtype(x.dtype)

    def scattered(base, how):
        if how == "nan":
            return _scattered(base, dim, index, jnp.isnan(src).astype(base.dtype), "add")
        return _scattered(base, dim, index, src.astype(wide), how)

    return _reduced(
        x, scattered, lambda b: _scattered(b, dim, index, jnp.ones(index.shape, b.dtype), "add"), reduce, include_self
    )


def _along(x, dim, index):
    return (*[slice(None)] * axis(x, dim), index.reshape(-1))


def _at(x, dim, index):
    checks.in_range(index, 0, x.shape[axis(x, dim)] if x.ndim else 1, axis(x, dim))
    return x.at[_along(x, dim, index)] if x.ndim else x[None].at[index.reshape(-1)]


@lowers(aten.index_add.default)
def index_add(x, dim, index, source, *, alpha=1):
    source = source * jnp.asarray(alpha, source.dtype) if alpha != 1 else source
    source = source if source.ndim or not x.ndim else source.reshape(1)
    return accumulated(_at(x, dim, index), "add", source.astype(x.dtype), x.dtype, mode="drop").reshape(x.shape)


@lowers(aten.index_copy.default)
def index_copy(x, dim, index, source):
    source = source if source.ndim or not x.ndim else source.reshape(1)
    return _at(x, dim, index).set(source, mode="drop").reshape(x.shape)


@lowers(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(x, dim, index, value):
    return _at(x, dim, index).set(jnp.asarray(value, x.dtype), mode="drop").reshape(x.shape)


@lowers(aten.index_reduce.default)
def index_reduce(x, dim, index, source, reduce, *, include_self=True):
    wide = sum_dtype(x.dtype)
    source = source if source.ndim or not x.ndim else source.reshape(1)

    def scattered(base, how):
        at = _at(base, dim, index)
        if how == "nan":
            return at.add(jnp.isnan(source).astype(base.dtype)).reshape(x.shape)
        return accumulated(at, how, source.astype(wide), wide).reshape(x.shape)

    return _reduced(x, scattered, lambda b: _at(b, dim, index).add(1).reshape(x.shape), reduce, include_self)


@lowers(aten.masked_scatter.default)
def masked_scatter(x, mask, source):
    """Values of `source`, in order, where the mask holds."""
    shape = jnp.broadcast_shapes(x.shape, mask.shape)
    mask = jnp.broadcast_to(mask, shape)
    x = jnp.broadcast_to(x, shape)
    if not source.size:
        return x
    order = jnp.cumsum(mask.reshape(-1)) - 1
    taken = source.reshape(-1)[jnp.clip(order, 0, source.size - 1)].reshape(shape)
    return jnp.where(mask, taken, x)


@lowers(aten.put.default)
def put(x, index, source, accumulate=False):
    checks.in_range(index, -x.size, x.size, 0)
    at = x.reshape(-1).at[index.reshape(-1)]
    source = source.reshape(-1)
    return accumulated(at, "add" if accumulate else "set", source, x.dtype).reshape(x.shape)


@lowers(aten.take.default)
def take(x, index):
    checks.in_range(index, -x.size, x.size, 0)
    return x.reshape(-1).at[index].get(mode="fill")


@lowers(aten.segment_reduce.default)
def segment_reduce(data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    """Reductions of consecutive runs along the last dimension of `lengths` (or between `offsets`)."""
    if lengths is None:
        lengths = jnp.diff(offsets, axis=-1)
    lead = lengths.ndim - 1
    if lead:
        return jax.vmap(lambda d, n: segment_reduce(d, reduce, lengths=n, axis=axis - 1, initial=initial))(
            data, lengths
        )
    count = lengths.shape[0]
    owner = jnp.searchsorted(jnp.cumsum(lengths), jnp.arange(data.shape[axis]), side="right")
    how = {"sum": "sum", "mean": "sum", "max": "amax", "min": "amin", "prod": "prod"}[reduce]
    start = _neutral(how, data.dtype) if initial is None else jnp.asarray(initial, data.dtype)
    shape = (*data.shape[:axis], count, *data.shape[axis + 1 :])
    base = jnp.full(shape, start, data.dtype)
    result = getattr(base.at[(*[slice(None)] * axis, owner)], _METHODS[how])(data, mode="drop")
    if reduce == "mean":
        n = lengths.reshape(-1, *[1] * (data.ndim - axis - 1))
        empty = jnp.asarray(jnp.nan if initial is None else initial, data.dtype)
        result = jnp.where(n > 0, result / jnp.maximum(n, 1).astype(data.dtype), empty)
    return result
