"""ATen's resampling: interpolation by gathers and weights, and sampling at a grid of points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten.common import pullback, sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers

# Interpolation ---------------------------------------------------------------------------------


def _scale(size: int, out: int, align_corners: bool, factor: float | None) -> float:
    """Input positions per output position, as PyTorch computes it."""
    if align_corners:
        return (size - 1) / (out - 1) if out > 1 else 0.0
    return 1 / factor if factor else size / out


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (IEEE TASSP 29(6), 1981)."""
    t = np.abs(t)
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))


_KERNELS: dict[str, tuple[int, Callable]] = {
    "linear": (1, lambda t: np.maximum(1 - np.abs(t), 0)),
    "cubic": (2, lambda t: _cubic(t, -0.5)),
    "lanczos": (3, lambda t: np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)),
}


@dataclass(frozen=True)
class _Taps:
    """Which inputs each output reads along one dimension, and by which weights.

    Attributes:
        places: `[out, k]` input positions.
        weights: `[out, k]`, or None for a copy.
        valid: `[out, k]`; where False, there is no such tap.
    """

    places: np.ndarray
    weights: np.ndarray | None
    valid: np.ndarray

    def transposed(self, size: int) -> _Taps:
        """Return the taps of the gradient: which outputs each of `size` inputs went to."""
        outputs, _ = np.nonzero(self.valid)
        weights = np.ones(self.places.shape) if self.weights is None else self.weights
        inputs, weights = self.places[self.valid], weights[self.valid]
        order = np.argsort(inputs, kind="stable")
        counts = np.bincount(inputs, minlength=size)
        slots = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = (size, max(int(counts.max(initial=0)), 1))
        places, scales, valid = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, bool)
        at = inputs[order], slots
        places[at], scales[at], valid[at] = outputs[order], weights[order], True
        return _Taps(places, scales, valid)


def _copies(places) -> _Taps:
    return _Taps(places[:, None], None, np.ones((len(places), 1), bool))


def _antialiased(size, out, align_corners, factor, kind, gradient: bool) -> _Taps:
    """Weigh for each output all inputs under its kernel, widened where the image shrinks."""
    if size == out and not gradient:  # PyTorch's forward kernels leave such a dimension alone, whatever the scale
        return _copies(np.arange(out))
    scale = _scale(size, out, align_corners, factor)
    support, kernel = _KERNELS[kind]
    wide = max(scale, 1.0)
    centres = scale * (np.arange(out) + 0.5)
    low = np.maximum((centres - support * wide + 0.5).astype(np.int64), 0)
    high = np.minimum((centres + support * wide + 0.5).astype(np.int64), size)
    steps = np.arange(max(int((high - low).max(initial=1)), 1))
    places = low[:, None] + steps
    valid = places < high[:, None]
    weights = np.where(valid, kernel((places - centres[:, None] + 0.5) / wide), 0.0)
    total = weights.sum(1, keepdims=True)
    return _Taps(np.minimum(places, size - 1), weights / np.where(total == 0, 1.0, total), valid)


def _nearest(size, out, factor, exact: bool, halves: bool) -> _Taps:
    """`halves`: PyTorch's 2-d kernel copies an equal size, and repeats for a double one, whatever the scale."""
    i = np.arange(out)
    if halves and not exact and out in (size, 2 * size):
        return _copies(i * size // out)
    scale = np.float32(_scale(size, out, False, factor))
    source = np.floor(((i + (0.5 if exact else 0.0)) * scale).astype(np.float32)).astype(np.int64)
    return _copies(np.minimum(source, size - 1))


def _taps(size, out, align_corners, factor, kind) -> _Taps:
    if kind == "linear" and size == out:  # whatever the scale; PyTorch multiplies by 1, and adds 0 times the same
        same = np.repeat(np.arange(out)[:, None], 2, 1)
        return _Taps(same, np.tile([1.0, 0.0], (out, 1)), np.ones(same.shape, bool))
    scale = _scale(size, out, align_corners, factor)
    i = np.arange(out)
    source = scale * i if align_corners else scale * (i + 0.5) - 0.5
    if kind == "linear":
        source = np.maximum(source, 0)
        low = np.minimum(np.floor(source).astype(np.int64), size - 1)
        far = np.minimum(source - low, 1.0)
        places, weights = np.stack([low, np.minimum(low + 1, size - 1)], 1), np.stack([1 - far, far], 1)
    else:
        low = np.floor(source).astype(np.int64)
        offsets = np.arange(-1, 3)
        places = np.clip(low[:, None] + offsets, 0, size - 1)
        weights = _cubic((source - low)[:, None] - offsets, -0.75)
    return _Taps(places, weights, np.ones(places.shape, bool))


_UNROLLED = 4  # taps that are sliced out one by one


def _along(x, axis: int, taps: _Taps):
    """Apply taps along an axis. What an output does not read never reaches it, NaN and infinities neither."""
    if taps.weights is None:
        return jnp.take(x, taps.places[:, 0], axis)
    count, shape = taps.places.shape[1], [1] * (x.ndim + 1)
    shape[axis], shape[axis + 1] = taps.places.shape
    if count > _UNROLLED:
        read = jnp.take(x, taps.places, axis) * jnp.asarray(taps.weights.reshape(shape), x.dtype)
        return jnp.sum(jnp.where(taps.valid.reshape(shape), read, 0), axis + 1)
    total = 0
    for k in range(count):
        of_one = [n for d, n in enumerate(shape) if d != axis + 1]
        read = jnp.take(x, taps.places[:, k], axis) * jnp.asarray(taps.weights[:, k].reshape(of_one), x.dtype)
        total = total + (read if taps.valid[:, k].all() else jnp.where(taps.valid[:, k].reshape(of_one), read, 0))
    return total


def _resized(x, taps):
    """`x` with taps applied along each of its last dimensions, in f32 at least; integers are rounded at the end."""
    dtype, first = x.dtype, x.ndim - len(taps)
    copies = all(t.weights is None for t in taps)
    whole = jnp.issubdtype(dtype, jnp.integer)
    if not copies:
        x = x.astype(jnp.float32 if whole else sum_dtype(dtype))
    for d, of_axis in enumerate(taps):
        x = _along(x, first + d, of_axis)
    if whole and not copies:
        limits = jnp.iinfo(dtype)
        x = jnp.clip(jnp.round(x), limits.min, limits.max)
    return x.astype(dtype)


def _all_taps(spatial, output_size, align, scales, kind, *, gradient: bool = False) -> list[_Taps]:
    scales = [*(scales or []), *[None] * len(spatial)]
    found = []
    for n, o, s in zip(spatial, output_size, scales, strict=False):
        if kind.startswith("nearest"):
            halves = gradient or len(spatial) == 2  # so has PyTorch it, for gradients in any dimension
            found.append(_nearest(n, o, s, kind == "nearest-exact", halves))
        elif kind.endswith("_aa"):
            found.append(_antialiased(n, o, align, s, kind.removesuffix("_aa"), gradient))
        else:
            found.append(_taps(n, o, align, s, kind))
    return found


def _register(packet: str, kind: str, has_align: bool) -> None:
    def split(rest):
        return (bool(rest[0]), rest[1:]) if has_align else (False, rest)

    def resize(x, output_size, *rest, **named):
        align, scales = split((*rest, *named.values()))
        return _resized(x, _all_taps(x.shape[2:], output_size, align, scales, kind))

    def by_factors(x, output_size, *rest, **named):
        align, (factors,) = split((*rest, *named.values()))
        if output_size is None:
            output_size = [int(n * f) for n, f in zip(x.shape[2:], factors, strict=True)]
        return _resized(x, _all_taps(x.shape[2:], output_size, align, factors, kind))

    def backward(grad, output_size, input_size, *rest, **named):
        align, scales = split((*rest, *named.values()))
        if kind == "cubic" and list(output_size) == list(input_size[2:]):
            return grad  # eager's kernel takes such sizes for an identity, whatever the scale
        taps = _all_taps(input_size[2:], output_size, align, scales, kind, gradient=True)
        return _resized(grad, [t.transposed(n) for t, n in zip(taps, input_size[2:], strict=True)])

    lowers(getattr(aten, packet).default)(resize)
    lowers(getattr(aten, packet).vec)(by_factors)
    lowers(getattr(aten, f"{packet}_backward").default)(backward)


for _n, _prefix in ((1, ""), (2, "bi"), (3, "tri")):
    _register(f"upsample_{_prefix}linear{_n}d", "linear", True)
    _register(f"upsample_nearest{_n}d", "nearest", False)
    _register(f"_upsample_nearest_exact{_n}d", "nearest-exact", False)
_register("upsample_bicubic2d", "cubic", True)
for _name, _kind in (("bilinear", "linear"), ("bicubic", "cubic"), ("lanczos", "lanczos")):
    _register(f"_upsample_{_name}2d_aa", f"{_kind}_aa", True)


# Sampling at points ----------------------------------------------------------------------------

_NEAREST, _CUBIC = 1, 2
_BORDER, _REFLECTION = 1, 2


def _unnormalized(g, size, align_corners):
    return (g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2


def _reflected(p, size, align_corners):
    low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
    span = high - low
    if span == 0:
        return jnp.zeros_like(p)
    distance = jnp.abs(p - low)
    flips = jnp.floor(distance / span)
    extra = distance - flips * span
    return jnp.where(flips % 2 == 0, extra + low, span - extra + low)


def _placed(p, size, padding, align_corners):
    """Positions brought inside, where the padding mode asks for it."""
    if padding == _REFLECTION:
        p = _reflected(p, size, align_corners)
    return jnp.clip(p, 0, size - 1) if padding in (_BORDER, _REFLECTION) else p


def _fetched(x, corner):
    """Values at integer positions `[batch, ...]` in each spatial dimension; zero outside."""
    inside = jnp.ones((), bool)
    place = jnp.zeros((), jnp.int64)
    for c, size in zip(corner, x.shape[2:], strict=True):
        inside = inside & (c >= 0) & (c < size)
        place = place * size + jnp.clip(jnp.nan_to_num(c), 0, size - 1).astype(jnp.int64)
    flat = x.reshape(*x.shape[:2], -1)
    out = place.shape[1:]
    taken = jnp.take_along_axis(
        flat, jnp.broadcast_to(place.reshape(place.shape[0], 1, -1), (*x.shape[:2], math.prod(out))), -1
    )
    return jnp.where(inside[:, None], taken.reshape(*x.shape[:2], *out), 0)


def _grid_sample(x, grid, mode, padding, align_corners):
    """`x` `[batch, channels, ...]` at `grid` `[batch, ..., n]`, whose last dimension counts from the last of x's."""
    n = grid.shape[-1]
    raw = [_unnormalized(grid[..., n - 1 - d], x.shape[2 + d], align_corners) for d in range(n)]
    if mode == _CUBIC:
        return _cubic_sample(x, raw, padding, align_corners)
    at = [_placed(p, size, padding, align_corners) for p, size in zip(raw, x.shape[2:], strict=True)]
    if mode == _NEAREST:
        return _fetched(x, [jnp.round(p) for p in at])
    low = [jnp.floor(p) for p in at]
    total = jnp.zeros((), x.dtype)
    for corner in itertools.product((0, 1), repeat=n):
        weight = jnp.ones((), x.dtype)
        for bit, p, start in zip(corner, at, low, strict=True):
            weight = weight * (p - start if bit else start + 1 - p)
        total = total + _fetched(x, [start + bit for bit, start in zip(corner, low, strict=True)]) * weight[:, None]
    return total


def _cubic_sample(x, raw, padding, align_corners):
    low = [jnp.floor(p) for p in raw]

    def weights(t, a=-0.75):
        def near(s):
            return ((a + 2) * s - (a + 3)) * s * s + 1

        def far(s):
            return ((a * s - 5 * a) * s + 8 * a) * s - 4 * a

        return far(t + 1), near(t), near(1 - t), far(2 - t)

    along = [weights(p - start) for p, start in zip(raw, low, strict=True)]
    total = jnp.zeros((), x.dtype)
    for i, j in itertools.product(range(4), repeat=2):
        corner = [
            _placed(start + o - 1, size, padding, align_corners)
            for start, o, size in zip(low, (i, j), x.shape[2:], strict=True)
        ]
        total = total + _fetched(x, corner) * (along[0][i] * along[1][j])[:, None]
    return total


def _grid_gradient(grad, x, grid, mode, padding, align_corners, output_mask):
    back = pullback(lambda x, grid: _grid_sample(x, grid, mode, padding, align_corners), x, grid)
    return back(grad)


for _n in (2, 3):
    lowers(getattr(aten, f"grid_sampler_{_n}d").default)(_grid_sample)
    lowers(getattr(aten, f"grid_sampler_{_n}d_backward").default)(_grid_gradient)
