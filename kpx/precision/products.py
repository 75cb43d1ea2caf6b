"""Matrix products of numbers in eight bits and fewer, in JAX: what a pass puts in a product's place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kpx.precision import formats

Dimensions = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class How:
    """How a product is computed.

    Attributes:
        scheme: `fp8`, or a name of `formats.BLOCKS`.
        formats: of the two factors, for `fp8`.
        by_row: whether each row of the first factor, and each column of the second, has a scale of its own, else each
            factor has one (`fp8`).
        native: whether the target has units for the scheme; else numbers that are as the scheme has them are multiplied in
            bf16, which holds them exactly.
        stochastic: which of the factors are rounded by chance.
        static: the first factor's scale, known beforehand (`fp8`); None: as its numbers are.
    """

    scheme: str
    formats: tuple[str, str] = ("e4m3", "e4m3")
    by_row: bool = False
    native: bool = False
    stochastic: tuple[bool, bool] = (False, False)
    static: float | None = None


def product(lhs: jax.Array, rhs: jax.Array, *, contracting: Dimensions, how: How) -> jax.Array:
    """`lax.dot_general` without batch dimensions, both factors in few bits, sums in f32.

    Args:
        lhs, rhs: of any floating dtype.
        contracting: the dimensions of each that are summed over.

    Returns:
        f32, the free dimensions of `lhs` and then those of `rhs`.
    """
    a, b = (_rows(x.astype(jnp.float32), dims) for x, dims in zip((lhs, rhs), contracting, strict=True))
    found = _fp8(a, b, how) if how.scheme == "fp8" else _blocks(a, b, how)
    return found.reshape(_free_shape(lhs, rhs, contracting))


@dataclass(frozen=True, eq=False)
class Emulated:
    """A product as a precision has it, computed in f32: to find out what rounding costs.

    Attributes:
        precision: a name of `kpx.precision.PRECISIONS`.
        balance: by which the weight's input channels are multiplied, and the other factor's divided, or None.
        scale: of the other factor's numbers, where it is known.
    """

    precision: str
    balance: np.ndarray | None = None
    scale: float | None = None

    def __call__(self, lhs: jax.Array, rhs: jax.Array, *, dimensions: tuple[Dimensions, Dimensions]) -> jax.Array:
        """`lax.dot_general`, f32; what is not for stacks of products is bf16 there, as in the pass."""
        contracting, batching = dimensions
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
        if self.precision in ("f32", "bf16", "f16") or batching[0] or lhs.ndim < 1 or len(contracting[0]) != 1:
            name = {"f32": jnp.float32, "f16": jnp.float16}.get(self.precision, jnp.bfloat16)
            return jax.lax.dot_general(*(x.astype(name).astype(jnp.float32) for x in (lhs, rhs)), dimensions)
        a, b = (_rows(x, dims) for x, dims in zip((lhs, rhs), contracting, strict=True))
        if self.balance is not None:
            a, b = a / self.balance, b * self.balance
        found = _dot(_as_read(a, self.precision, self.scale), _as_kept(b, self.precision))
        return found.reshape(_free_shape(lhs, rhs, contracting))


def _as_read(x: jax.Array, precision: str, scale: float | None) -> jax.Array:
    if precision.endswith("-weights"):
        return x
    if precision in ("int8", "fp8"):
        if scale is None:
            return formats.quantize_dequantize(x, "e4m3" if precision == "fp8" else "int8", -1)
        numbers = x * np.float32(1 / scale)
        near = formats.rounded(numbers, "e4m3") if precision == "fp8" else jnp.clip(jnp.rint(numbers), -127, 127)
        return near * np.float32(scale)
    return _in_blocks(x, precision)


def _as_kept(w: jax.Array, precision: str) -> jax.Array:
    if precision == "int4-weights":
        parts = w.reshape(w.shape[0], -1, 32) if w.shape[1] % 32 == 0 else w[:, None, :]
        return formats.quantize_dequantize(parts, "int4", -1).reshape(w.shape)
    if precision in ("int8", "int8-weights", "fp8"):
        return formats.quantize_dequantize(w, "e4m3" if precision == "fp8" else "int8", -1)
    return _in_blocks(w, precision)


def _in_blocks(x: jax.Array, scheme: str) -> jax.Array:
    short = -x.shape[1] % formats.BLOCKS[scheme][1]
    return formats.quantize_dequantize(jnp.pad(x, ((0, 0), (0, short))), scheme)[:, : x.shape[1]]


def in_f16(lhs: jax.Array, rhs: jax.Array, *, dimensions: tuple[Dimensions, Dimensions], gradient: int) -> jax.Array:
    """`lax.dot_general` of f32 arrays rounded to f16, sums in f32, one of which is a gradient.

    Gradients are often smaller than f16 goes: they are scaled by a power of two as they are read, and the result back. It is
    loss scaling, product by product, with nothing to choose and nothing that can overflow.
    """
    factors = [lhs, rhs]
    by = formats.power_of_two(factors[gradient], 2.0**14)
    factors[gradient] = factors[gradient] * by
    narrow = [x.astype(jnp.float16) for x in factors]
    return jax.lax.dot_general(*narrow, dimensions, preferred_element_type=jnp.float32) * (1 / by)


def _rows(x: jax.Array, inner: tuple[int, ...]) -> jax.Array:
    """An array as a matrix whose last dimension is summed over."""
    free = [d for d in range(x.ndim) if d not in inner]
    size = math.prod(x.shape[d] for d in inner)
    return jnp.transpose(x, (*free, *inner)).reshape(-1, size)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _fp8(a: jax.Array, b: jax.Array, how: How) -> jax.Array:
    x, of_a = _narrow(a, 0, how)
    y, of_b = _narrow(b, 1, how)
    # Scales come after the product: before it, a scale that is not one number for all keeps XLA from FP8 units.
    return _dot(x, y) * (of_a * (of_b.T if how.by_row else of_b))


def _narrow(x: jax.Array, factor: int, how: How) -> tuple[jax.Array, jax.Array]:
    name, stochastic = how.formats[factor], how.stochastic[factor]
    fmt = formats.FORMATS[name]
    if factor == 0 and how.static is not None:
        scale = jnp.where(jnp.isfinite(x).all(1, keepdims=True), np.float32(how.static), jnp.nan)
        numbers = formats.rounded(jnp.nan_to_num(x) * np.float32(1 / how.static), name)
    else:
        axis = 1 if how.by_row else None
        numbers, scale = formats.scaled(x, name, axis, stochastic=stochastic, rounds=not how.native)
    return numbers.astype(fmt.dtype if how.native else jnp.bfloat16), scale


def delayed_product(
    lhs: jax.Array, rhs: jax.Array, seen: jax.Array, *, contracting: Dimensions, how: How
) -> tuple[jax.Array, jax.Array]:
    """A product in FP8 whose scales are made of the largest numbers that each factor had before.

    Args:
        seen: f32 `[2, history]`. A factor that has seen zeros alone is scaled by its own largest.

    Returns:
        The product, as `product` gives it, and each factor's largest now, f32 `[2]`.
    """
    narrow, scales, largest = [], [], []
    for factor, (x, dims) in enumerate(zip((lhs, rhs), contracting, strict=True)):
        rows = _rows(x.astype(jnp.float32), dims)
        fmt, now = formats.FORMATS[how.formats[factor]], jnp.max(formats.magnitudes(rows))
        before = jnp.max(seen[factor])
        scale = jnp.maximum(jnp.where(before > 0, before, now), 1e-30) / np.float32(fmt.largest)
        scale = jnp.where(jnp.isfinite(now), scale, jnp.nan)
        numbers = formats.rounded(jnp.nan_to_num(rows / jnp.where(jnp.isnan(scale), 1.0, scale)), how.formats[factor])
        narrow.append(numbers.astype(fmt.dtype if how.native else jnp.bfloat16))
        scales.append(scale)
        largest.append(jnp.where(jnp.isfinite(now), now, before))
    found = _dot(narrow[0], narrow[1]) * (scales[0] * scales[1])
    return found.reshape(_free_shape(lhs, rhs, contracting)), jnp.stack(largest)


def _free_shape(lhs: jax.Array, rhs: jax.Array, contracting: Dimensions) -> list[int]:
    return [n for x, dims in zip((lhs, rhs), contracting, strict=True) for d, n in enumerate(x.shape) if d not in dims]


def _blocks(a: jax.Array, b: jax.Array, how: How) -> jax.Array:
    name, block = formats.BLOCKS[how.scheme]
    short = -a.shape[1] % block
    parts = [
        formats.in_blocks(jnp.pad(x, ((0, 0), (0, short))), how.scheme, stochastic=s)
        for x, s in zip((a, b), how.stochastic, strict=True)
    ]
    if how.native:
        found = _by_units(parts, name)
    else:
        found = _dot(*(formats.widened(q, s, how.scheme).astype(jnp.bfloat16) for q, s, _ in parts))
    for _, _, whole in parts:
        found = found if whole is None else found * whole
    return found


def _by_units(parts, name: str) -> jax.Array:
    """A product that Blackwell's units compute by blocks."""
    (x, of_x, whole), (y, of_y, _) = parts
    dtype = formats.FORMATS[name].dtype
    x, y = x.astype(dtype), y.astype(dtype)
    if whole is not None:  # XLA hands NVFP4 to cuDNN in this form alone
        scales = (s.astype(jnp.float8_e4m3fn)[None] for s in (of_x, of_y))
        return jax.nn.scaled_matmul(x[None], y[None], *scales, preferred_element_type=jnp.float32)[0]
    # A scale of e8m0 is the bits of its exponent.
    scales = [jax.lax.bitcast_convert_type((s + 127).astype(jnp.uint8), jnp.float8_e8m0fnu) for s in (of_x, of_y)]
    return jax.lax.scaled_dot(
        x, y, lhs_scale=scales[0], rhs_scale=scales[1], dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
