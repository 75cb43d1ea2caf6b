"""ATen's resampling: interpolation as products with small matrices, and sampling at a grid of points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch.aten.common import pullback, sum_dtype
from kpx.bridges.torch.registry import lowers

aten = torch.ops.aten


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


def _antialiased(size, out, align_corners, factor, kind):
    """Each output weighs all inputs under its kernel, widened where the image shrinks."""
    scale = _scale(size, out, align_corners, factor)
    support, kernel = _KERNELS[kind]
    wide = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for i in range(out):
        centre = scale * (i + 0.5)
        low = max(int(centre - support * wide + 0.5), 0)
        high = min(int(centre + support * wide + 0.5), size)
        weights = kernel((np.arange(low, high) - centre + 0.5) / wide)
        total = weights.sum()
        matrix[i, low:high] = weights / total if total else weights
    return matrix


def _matrix(size, out, align_corners, factor, kind) -> np.ndarray:
    """`[out, size]`: how much of each input an output has along one dimension."""
    scale = _scale(size, out, align_corners, factor)
    i = np.arange(out)
    matrix = np.zeros((out, size))
    if kind in ("nearest", "nearest-exact"):
        shift = 0.5 if kind == "nearest-exact" else 0.0
        source = np.floor(((i + shift) * np.float32(scale)).astype(np.float32)).astype(np.int64)
        matrix[i, np.minimum(source, size - 1)] = 1
        return matrix
    source = scale * i if align_corners else scale * (i + 0.5) - 0.5
    if kind == "linear":
        source = np.maximum(source, 0)
        low = np.minimum(np.floor(source).astype(np.int64), size - 1)
        high = np.minimum(low + 1, size - 1)
        np.add.at(matrix, (i, low), 1 - (source - low))
        np.add.at(matrix, (i, high), source - low)
        return matrix
    low = np.floor(source).astype(np.int64)
    for offset in range(-1, 3):
        weight = _cubic(source - low - offset, -0.75)
        np.add.at(matrix, (i, np.clip(low + offset, 0, size - 1)), weight)
    return matrix


def _resized(x, matrices):
    """`x` with a matrix applied along each of its last dimensions, in f32 at least."""
    dtype, x = x.dtype, x.astype(sum_dtype(x.dtype))
    for d, matrix in enumerate(matrices):
        axis = x.ndim - len(matrices) + d
        x = jnp.moveaxis(jnp.tensordot(x, jnp.asarray(matrix, x.dtype), ((axis,), (1,))), -1, axis)
    return x.astype(dtype)


def _matrices(spatial, output_size, align, scales, kind):
    make = _antialiased if kind.endswith("_aa") else _matrix
    kind = kind.removesuffix("_aa")
    scales = [*scales, *[None] * (len(spatial) - len(scales))]
    return [make(n, o, align, s, kind) for n, o, s in zip(spatial, output_size, scales, strict=True)]


def _register(packet: str, kind: str, has_align: bool, forward: bool) -> None:
    def split(rest):
        return (bool(rest[0]), rest[1:]) if has_align else (False, rest)

    def resize(x, output_size, *rest, **named):
        align, scales = split((*rest, *named.values()))
        return _resized(x, _matrices(x.shape[2:], output_size, align, scales, kind))

    def backward(grad, output_size, input_size, *rest, **named):
        align, scales = split((*rest, *named.values()))
        return _resized(grad, [m.T for m in _matrices(input_size[2:], output_size, align, scales, kind)])

    if forward:
        lowers(getattr(aten, packet).default)(resize)
    lowers(getattr(aten, f"{packet}_backward").default)(backward)


for _n, _prefix in ((1, ""), (2, "bi"), (3, "tri")):
    _register(f"upsample_{_prefix}linear{_n}d", "linear", True, True)
    # Forward, PyTorch's decomposition gathers, which is less work.
    _register(f"upsample_nearest{_n}d", "nearest", False, False)
    _register(f"_upsample_nearest_exact{_n}d", "nearest-exact", False, False)
_register("upsample_bicubic2d", "cubic", True, True)
for _name, _kind in (("bilinear", "linear"), ("bicubic", "cubic"), ("lanczos", "lanczos")):
    _register(f"_upsample_{_name}2d_aa", f"{_kind}_aa", True, True)


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
