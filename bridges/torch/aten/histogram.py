"""ATen's histograms of one and of several dimensions."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from kpx.bridges.torch import checks
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers
from kpx.errors import UnsupportedError


def _even_edges(low, high, bins: int, dtype):
    """`torch.linspace`: from either end, whichever is nearer."""
    step, i = (high - low) / bins, jnp.arange(bins + 1).astype(dtype)
    return jnp.where(i < (bins + 1) // 2, low + step * i, high - step * (bins - i))


def _edges_of(x, bins: int, limits):
    """Even edges between limits, or between the smallest and the largest value."""
    if limits is not None:
        low, high = (jnp.asarray(v, x.dtype) for v in limits)
    elif not x.size:
        low, high = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
    else:
        low, high = jnp.min(x), jnp.max(x)
    none = low == high  # an empty range is made one wide, as NumPy does
    return _even_edges(jnp.where(none, low - 0.5, low), jnp.where(none, high + 0.5, high), bins, x.dtype)


def _counts(points, edges, weight, density):
    """How many of the points [n, d] lie between edges, one list a dimension; the last edge belongs to the last bin."""
    shape = [e.shape[0] - 1 for e in edges]
    weight = jnp.ones(points.shape[:1], points.dtype) if weight is None else weight.reshape(-1).astype(points.dtype)
    places, inside = [], jnp.ones(points.shape[:1], bool)
    for d, edge in enumerate(edges):
        x = points[:, d]
        place = jnp.searchsorted(edge, x, side="right") - 1
        places.append(jnp.where(x == edge[-1], shape[d] - 1, place))
        inside &= (x >= edge[0]) & (x <= edge[-1])
    places[0] = jnp.where(inside, places[0], shape[0])
    counts = jnp.zeros(shape, points.dtype).at[tuple(places)].add(weight, mode="drop")
    if not density:
        return counts
    widths = functools.reduce(jnp.multiply.outer, [jnp.diff(e) for e in edges])
    return counts / counts.sum() / widths


@lowers(aten.bincount.default)
def bincount(x, weights=None, minlength=0):
    """Counts of 0 to `minlength - 1`. PyTorch's result is longer where a value is larger: an error here."""
    if not isinstance(minlength, int) or minlength <= 0:
        raise UnsupportedError(
            "The length of `torch.bincount`'s result depends on values, and a compiled program's shapes are fixed. "
            "Pass `minlength=n`, n above the largest value."
        )
    values = x.reshape(-1)
    if values.size:
        message = f"a value is not within [0, {minlength}). Pass a larger `minlength` to `torch.bincount`"
        checks.holds(jnp.all((values >= 0) & (values < minlength)), message, "RuntimeError")
    one = jnp.ones((), jnp.int64) if weights is None else weights.reshape(-1).astype(_weight_dtype(weights.dtype))
    return jnp.zeros((minlength,), one.dtype).at[values].add(one, mode="drop", wrap_negative_indices=False)


def _weight_dtype(dtype):
    return dtype if dtype == jnp.float32 else jnp.float64


@lowers(aten.histogram.bin_ct)
def histogram(x, bins=100, *, range=None, weight=None, density=False):
    edges = _edges_of(x, bins, range)
    return _counts(x.reshape(-1, 1), [edges], weight, density), edges


@lowers(aten.histogram.bins_tensor)
def histogram_between(x, bins, *, weight=None, density=False):
    return _counts(x.reshape(-1, 1), [bins], weight, density), bins


@lowers(aten._histogramdd_bin_edges.default)
def histogramdd_edges(x, bins, *, range=None, weight=None, density=False):
    points = x.reshape(-1, x.shape[-1])
    limits = [None if range is None else range[2 * d : 2 * d + 2] for d, _ in enumerate(bins)]
    return tuple(_edges_of(points[:, d], n, limits[d]) for d, n in enumerate(bins))


@lowers(aten._histogramdd_from_bin_cts.default)
def histogramdd(x, bins, *, range=None, weight=None, density=False):
    edges = histogramdd_edges(x, bins, range=range)
    return _counts(x.reshape(-1, x.shape[-1]), edges, weight, density)


@lowers(aten._histogramdd_from_bin_tensors.default)
def histogramdd_between(x, bins, *, weight=None, density=False):
    return _counts(x.reshape(-1, x.shape[-1]), bins, weight, density)
