"""ATen's pooling: maxima and means over windows, with the places of maxima where they are asked for."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten.common import is_float, lowest, sizes, sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import is_read, lowers


def _window(x, kernel, stride, padding, dilation, ceil_mode):
    """Window, strides, dilations and padding over all of x's dimensions, the last n pooled."""
    n = len(kernel)
    lead = x.ndim - n
    pads = []
    for size, k, s, p, d in zip(x.shape[lead:], kernel, stride, padding, dilation, strict=True):
        high = p
        if ceil_mode:
            reach = size + 2 * p - (d * (k - 1) + 1)
            out = -(-reach // s) + 1
            out -= (out - 1) * s >= size + p  # a window must start inside the input or left padding
            high = max(p, (out - 1) * s + d * (k - 1) + 1 - size - p)
            if (out - 1) * s + d * (k - 1) + 1 < size + p + high:  # rows that no window reaches
                high = (out - 1) * s + d * (k - 1) + 1 - size - p
        pads.append((p, high))
    return [1] * lead + kernel, [1] * lead + stride, [1] * lead + dilation, [(0, 0)] * lead + pads


def _settings(kernel_size, stride, padding, dilation, n):
    kernel = sizes(kernel_size, n)
    return kernel, (sizes(stride, n) if stride else kernel), sizes(padding, n), sizes(dilation, n)


# Maxima ----------------------------------------------------------------------------------------


def max_pool(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False, *, n):
    kernel, stride, padding, dilation = _settings(kernel_size, stride, padding, dilation, n)
    window, strides, dilations, pads = _window(x, kernel, stride, padding, dilation, ceil_mode)
    return jax.lax.reduce_window(x, lowest(x.dtype), jax.lax.max, window, strides, pads, None, dilations)


_UNROLLED = 9  # elements of a window that are compared in one step; a larger window goes one dimension at a time


def max_pool_with_places(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False, *, n):
    """Return maxima, and where in the flattened spatial dimensions each stands: the first of equals, the last NaN."""
    if not is_read(1):
        best = max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, n=n)
        return best, jnp.zeros(best.shape, jnp.int64)
    kernel, stride, padding, dilation = _settings(kernel_size, stride, padding, dilation, n)
    _, _, _, pads = _window(x, kernel, stride, padding, dilation, ceil_mode)
    lead, spatial = x.ndim - n, x.shape[x.ndim - n :]
    place = jnp.arange(math.prod(spatial), dtype=jnp.int64).reshape(spatial)
    best, place = x, jnp.broadcast_to(place, x.shape)
    windows = list(zip(kernel, stride, dilation, pads[lead:], strict=True))
    if math.prod(kernel) <= _UNROLLED:
        return _largest(best, place, range(lead, x.ndim), windows)
    # The first of equals in row-major order is the first row that has it, and the first in that row.
    for d in reversed(range(n)):
        best, place = _largest(best, place, [lead + d], [windows[d]])
    return best, place


def _largest(x, place, dims, windows):
    """Return the largest value in each window of some dimensions, and its place.

    Args:
        place: the place of each value of `x`, of the same shape.
        windows: `(size, stride, dilation, (low, high))` for each dimension; padding never counts.
    """
    config, out = [(0, 0, 0)] * x.ndim, list(x.shape)
    for dim, (k, s, d, (low, high)) in zip(dims, windows, strict=True):
        config[dim] = (low, high, 0)
        out[dim] = (x.shape[dim] + low + high - d * (k - 1) - 1) // s + 1
    values = jax.lax.pad(x, lowest(x.dtype), config)
    places = jax.lax.pad(place, jnp.asarray(-1, place.dtype), config)
    best = found = None
    for offset in itertools.product(*(range(k) for k, _, _, _ in windows)):
        start, step = [0] * x.ndim, [1] * x.ndim
        for dim, o, (_, s, d, _) in zip(dims, offset, windows, strict=True):
            start[dim], step[dim] = o * d, s
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, out, step, strict=True)]
        seen, here = (jax.lax.slice(a, start, stop, step) for a in (values, places))
        if best is None or found is None:
            best, found = seen, here
            continue
        takes = (seen > best) | (jnp.isnan(seen) if is_float(x) else False)
        takes |= found < 0  # nothing but padding was seen yet
        takes &= here >= 0
        best, found = jnp.where(takes, seen, best), jnp.where(takes, here, found)
    return best, found


for _n in (1, 2, 3):
    lowers(getattr(aten, f"max_pool{_n}d").default)(
        lambda x, *args, _n=_n, **kwargs: max_pool(x, *args, n=_n, **kwargs)
    )
for _n in (2, 3):
    lowers(getattr(aten, f"max_pool{_n}d_with_indices").default)(
        lambda x, *args, _n=_n, **kwargs: max_pool_with_places(x, *args, n=_n, **kwargs)
    )


def spread_to_places(grad, x, places, n):
    """The gradient of a maximum: each cotangent goes to the place that its maximum stood in."""
    lead = x.shape[: x.ndim - n]
    rows = math.prod(lead)
    wide = sum_dtype(grad.dtype)
    flat = jnp.zeros((rows, math.prod(x.shape[x.ndim - n :])), wide)
    places = places.reshape(rows, math.prod(places.shape[places.ndim - n :]))
    values = grad.reshape(places.shape).astype(wide)
    return flat.at[jnp.arange(rows)[:, None], places].add(values).reshape(x.shape).astype(grad.dtype)


def _windows_of(size, out):
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _flat_from(x, dim):
    """An array whose dimensions from `dim` on are one; empty ones too, whose sizes `-1` cannot tell."""
    return x.reshape(*x.shape[:dim], math.prod(x.shape[dim:]))


def _gathered_maximum(x, starts, lengths, n):
    """Maxima over windows that start anywhere: `starts[d]` is `[..., out]`, `lengths[d]` an int or `[out]` of them."""
    spatial = x.shape[x.ndim - n :]
    place = jnp.zeros((), jnp.int64)
    valid = jnp.ones((), bool)
    for d, size in enumerate(spatial):
        longest = int(np.max(lengths[d]))
        along = starts[d][..., :, None] + jnp.arange(longest, dtype=jnp.int64)
        within = jnp.broadcast_to(jnp.arange(longest) < jnp.asarray(lengths[d])[..., None], along.shape)
        along = jnp.minimum(along, size - 1)
        expand = (*[1] * 2 * d, *along.shape[-2:], *[1] * 2 * (n - d - 1))
        place = place * size + along.reshape(*along.shape[:-2], *expand)
        valid = valid & within.reshape(*within.shape[:-2], *expand)
    order = [*range(0, 2 * n, 2), *range(1, 2 * n, 2)]
    lead = place.ndim - 2 * n
    order = [*range(lead), *(lead + o for o in order)]
    place = jnp.transpose(place, order)
    valid = jnp.transpose(valid, [valid.ndim - place.ndim + o for o in order] if valid.ndim == place.ndim else order)
    out = place.shape[lead : lead + n]
    place, valid = (_flat_from(a, lead + n) for a in (place, valid))
    rows = _flat_from(x, x.ndim - n)
    full = (*x.shape[: x.ndim - n], *place.shape[lead:])
    place, valid = jnp.broadcast_to(place, full), jnp.broadcast_to(valid, full)
    flat = _flat_from(place, x.ndim - n)
    seen = jnp.take_along_axis(rows, flat, -1).reshape(full)
    seen = jnp.where(valid, seen, lowest(x.dtype))
    chosen = jnp.argmax(seen, -1, keepdims=True)
    value, where = (jnp.take_along_axis(a, chosen, -1)[..., 0] for a in (seen, place))
    assert value.shape[-n:] == out
    return value, where


def _adaptive_max(x, output_size, n):
    out = sizes(output_size, n)
    pairs = [_windows_of(size, o) for size, o in zip(x.shape[x.ndim - n :], out, strict=True)]
    starts = [jnp.asarray([a for a, _ in p], jnp.int64) for p in pairs]
    return _gathered_maximum(x, starts, [np.array([b - a for a, b in p]) for p in pairs], n)


def _fractional_max(x, kernel_size, output_size, samples, n):
    """Windows whose starts are drawn (arXiv 1412.6071); `samples` is `[batch, channels, n]`, the last dimension first."""
    kernel, out = sizes(kernel_size, n), sizes(output_size, n)
    batched = x.ndim == n + 2
    x4 = x if batched else x[None]
    starts = []
    for d, size in enumerate(x4.shape[2:]):
        u = samples[..., d if n == 3 else 1 - d].astype(jnp.promote_types(samples.dtype, jnp.float32))
        if out[d] == 1:
            starts.append(jnp.full((*u.shape, 1), size - kernel[d], jnp.int64))
            continue
        alpha = (size - kernel[d]) / (out[d] - 1)
        i = jnp.arange(out[d] - 1)
        inner = ((i + u[..., None]) * alpha).astype(jnp.int64) - (u * alpha).astype(jnp.int64)[..., None]
        last = jnp.full((*u.shape, 1), size - kernel[d], jnp.int64)
        starts.append(jnp.concatenate([inner, last], -1))
    value, where = _gathered_maximum(x4, starts, [np.full(o, k) for o, k in zip(out, kernel, strict=True)], n)
    return (value, where) if batched else (value[0], where[0])


for _n in (2, 3):
    lowers(getattr(aten, f"adaptive_max_pool{_n}d").default)(
        lambda x, output_size, _n=_n: _adaptive_max(x, output_size, _n)
    )
    lowers(getattr(aten, f"fractional_max_pool{_n}d").default)(
        lambda x, kernel, out, samples, _n=_n: _fractional_max(x, kernel, out, samples, _n)
    )


# Means -----------------------------------------------------------------------------------------


def avg_pool(
    x, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None, *, n
):
    kernel, stride, padding, _ = _settings(kernel_size, stride, padding, 1, n)
    window, strides, _, pads = _window(x, kernel, stride, padding, [1] * n, ceil_mode)
    dtype, x = x.dtype, x.astype(sum_dtype(x.dtype))
    zero = np.zeros((), x.dtype)
    total = jax.lax.reduce_window(x, zero, jax.lax.add, window, strides, pads)
    if divisor_override:
        return _divided(total, jnp.asarray(divisor_override, x.dtype)).astype(dtype)
    counted = jnp.ones(x.shape[-n:], x.dtype)
    border = [(p, p) for p in padding]
    if count_include_pad:  # the padding counts, what ceil_mode adds past it does not
        counted = jnp.pad(counted, border, constant_values=1)
        border = [(low - p, high - p) for (low, high), p in zip(pads[-n:], padding, strict=True)]
    else:
        border = pads[-n:]
    count = jax.lax.reduce_window(counted, zero, jax.lax.add, kernel, stride, border)
    return _divided(total, count).astype(dtype)


def _divided(total, count):
    """Integers divide towards zero, as C++ does."""
    return total / count if is_float(total) else jax.lax.div(*jnp.broadcast_arrays(total, count))


def adaptive_avg_pool(x, output_size, *, n):
    """Each output is the mean of its own, possibly overlapping, window; summed in f32 at least."""
    dtype, x = x.dtype, x.astype(sum_dtype(x.dtype))
    for axis, out in zip(range(x.ndim - n, x.ndim), sizes(output_size, n), strict=True):
        size = x.shape[axis]
        out = size if out is None else out
        if size and out and size % out == 0:
            split = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = x.reshape(split).mean(axis + 1)
        else:
            parts = [
                jax.lax.slice_in_dim(x, a, b, 1, axis).mean(axis, keepdims=True) for a, b in _windows_of(size, out)
            ]
            empty = jnp.zeros((*x.shape[:axis], 0, *x.shape[axis + 1 :]), x.dtype)
            x = jnp.concatenate(parts or [empty], axis)
    return x.astype(dtype)


for _n in (1, 2, 3):
    lowers(getattr(aten, f"avg_pool{_n}d").default)(
        lambda x, *args, _n=_n, **kwargs: avg_pool(x, *args, n=_n, **kwargs)
    )
    lowers(getattr(aten, f"adaptive_avg_pool{_n}d").default)(
        lambda x, output_size, _n=_n: adaptive_avg_pool(x, output_size, n=_n)
    )
for _n in (2, 3):
    lowers(getattr(aten, f"_adaptive_avg_pool{_n}d").default)(
        lambda x, output_size, _n=_n: adaptive_avg_pool(x, output_size, n=_n)
    )
