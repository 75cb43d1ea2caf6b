"""Number formats of eight bits and fewer: what they hold, how numbers are rounded to them, and how blocks share scales.

Everything here is JAX, in f32 arithmetic that is exact: what a format's own hardware would hold, on any target.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) Specification 1.0; for NVFP4, NVIDIA's
description of its two levels of scales (a block of 16 by an e4m3 scale, a tensor by one in f32). The formats of AMD's MI300
(`fnuz`): Noune et al., 8-bit Numerical Formats for Deep Neural Networks, 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes:
        mantissa: bits after the point.
        least_exponent: of normal numbers; below, numbers are as far apart as there.
        largest: the largest number. What is larger is rounded to it.
        dtype: what JAX calls it.
    """

    mantissa: int
    least_exponent: int
    largest: float
    dtype: Any

    @property
    def largest_exponent(self) -> int:
        """That of the largest number."""
        return int(np.floor(np.log2(self.largest)))


FORMATS = {
    "e4m3": Format(3, -6, 448.0, jnp.float8_e4m3fn),
    "e5m2": Format(2, -14, 57344.0, jnp.float8_e5m2),
    "e4m3fnuz": Format(3, -7, 240.0, jnp.float8_e4m3fnuz),
    "e5m2fnuz": Format(2, -15, 57344.0, jnp.float8_e5m2fnuz),
    "e2m1": Format(1, 0, 6.0, jnp.float4_e2m1fn),
}
"""Floating-point formats by name."""

BLOCKS = {"mxfp8": ("e4m3", 32), "mxfp8-e5m2": ("e5m2", 32), "mxfp4": ("e2m1", 32), "nvfp4": ("e2m1", 16)}
"""Block formats: what a number is held in, and how many share a scale."""

_INTEGERS = {"int8": 127, "int4": 7}

SCHEMES = (*FORMATS, *BLOCKS, *_INTEGERS)
"""What `quantize_dequantize` takes."""


def rounded(x: jax.Array, name: str, *, stochastic: bool = False) -> jax.Array:
    """Numbers in f32, rounded to those that a format holds; to nearest, ties to even, beyond the largest to that.

    Args:
        x: f32, of any shape. NaN stays NaN.
        name: of `FORMATS`.
        stochastic: round up or down by chance, so that the mean of many is the number itself. Chance is made of all of the
            array's bits: the same array is rounded in the same way, one that differs anywhere in another.
    """
    fmt = FORMATS[name]
    least = np.float32(2.0**fmt.least_exponent)
    # The power of two below a number: its exponent bits alone.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jnp.maximum(jax.lax.bitcast_convert_type(bits, jnp.float32), least)
    apart = power * np.float32(2.0**-fmt.mantissa)
    steps = x / apart
    steps = (
        jnp.floor(steps + _chance(x)) if stochastic else jax.lax.round(steps, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    )
    found = jnp.clip(steps * apart, -fmt.largest, fmt.largest)
    found = jnp.where(jnp.isinf(x), jnp.copysign(np.float32(fmt.largest), x), found)
    return jnp.where(jnp.isnan(x), x, found)


def _chance(x: jax.Array) -> jax.Array:
    """Numbers in [0, 1) of an array's own bits (MurmurHash3's finalizer, over places and the sum of all bits)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    places = jax.lax.iota(jnp.uint32, bits.size) * np.uint32(0x9E3779B9)
    mixed = _mixed(bits ^ places)
    z = _mixed(places + jnp.sum(mixed, dtype=jnp.uint32))
    return ((z >> 8).astype(jnp.float32) * np.float32(2.0**-24)).reshape(x.shape)


def _mixed(z: jax.Array) -> jax.Array:
    z = (z ^ (z >> 16)) * np.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * np.uint32(0xC2B2AE35)
    return z ^ (z >> 16)


def scaled(
    x: jax.Array, name: str, axis: int | None, *, stochastic: bool = False, rounds: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Numbers of a format, in f32, and the scales that they are to be multiplied by.

    The largest becomes the format's largest. What holds an infinity or a NaN has a scale of NaN; what is all zeros, or so
    small that no number is left of its inverse, is zeros.

    Args:
        axis: along which numbers share a scale; None: all share one.
        rounds: whether the numbers are rounded, or a conversion to the format does that.

    Returns:
        The numbers, and the scales, f32, of the same rank with 1 along the axis.
    """
    largest = FORMATS[name].largest
    by, scale = _scales(jnp.max(magnitudes(x), axis=axis, keepdims=True), largest)
    numbers = _finite(x) * by
    return rounded(numbers, name, stochastic=stochastic) if rounds or stochastic else numbers, scale


def magnitudes(x: jax.Array) -> jax.Array:
    """How large numbers are; infinite for what is not finite."""
    # XLA's maximum on the CPU need not be NaN where a number is: what is not finite counts as infinite.
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)


def in_integers(x: jax.Array, most: int, axis: int | None) -> tuple[jax.Array, jax.Array]:
    """Whole numbers in [-most, most], in f32, and the scales that they are to be multiplied by (see `scaled`)."""
    by, scale = _scales(jnp.max(magnitudes(x), axis=axis, keepdims=True), most)
    return jax.lax.round(_finite(x) * by, jax.lax.RoundingMethod.TO_NEAREST_EVEN), scale


def _scales(largest: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """What numbers are multiplied by so that the largest becomes the limit, and the scale that takes that back."""
    by = np.float32(limit) / largest
    usable, finite = jnp.isfinite(by), jnp.isfinite(largest)
    scale = jnp.where(usable, largest / np.float32(limit), 0.0)
    return jnp.where(usable & finite, by, 0.0), jnp.where(finite, scale, jnp.nan)


def power_of_two(x: jax.Array, limit: float) -> jax.Array:
    """The largest power of two by which all of an array may be multiplied and stay below a limit, f32, a scalar; 1 for
    zeros and where not all is finite."""
    largest = jnp.max(magnitudes(x))
    ratio = np.float32(limit) / largest
    exponent = (jax.lax.bitcast_convert_type(ratio, jnp.int32) >> 23) - 127
    return jnp.where(jnp.isfinite(ratio) & (ratio > 0), _two_to(jnp.clip(exponent, -126, 126)), 1.0)


# Blocks -----------------------------------------------------------------------------------------


def in_blocks(x: jax.Array, scheme: str, *, stochastic: bool = False) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Numbers of a block format along the last axis, which blocks divide.

    Args:
        x: f32 `[..., n]`.
        scheme: of `BLOCKS`.

    Returns:
        The numbers `[..., n]` in f32; a block's scale `[..., n / block]`: for MX the exponent of a power of two (i32), for
        NVFP4 an e4m3 number in f32; and the scale of the whole array in f32 (NVFP4), or None.
    """
    name, block = BLOCKS[scheme]
    fmt = FORMATS[name]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    largest = jnp.max(magnitudes(parts), axis=-1)
    if scheme == "nvfp4":
        return _two_levels(parts, largest, x.shape, stochastic)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127 - fmt.largest_exponent
    exponent = jnp.clip(exponent, -127, 127)
    numbers = rounded(_finite(parts) * _two_to(-exponent)[..., None], name, stochastic=stochastic)
    numbers = jnp.where(jnp.isfinite(largest)[..., None], numbers, jnp.nan)
    return numbers.reshape(x.shape), exponent, None


def _two_to(exponent: jax.Array) -> jax.Array:
    """2 to an exponent in [-126, 127]."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _two_levels(parts: jax.Array, largest: jax.Array, shape: tuple[int, ...], stochastic: bool):
    numbers, scales = FORMATS["e2m1"], FORMATS["e4m3"]
    # The whole array's scale makes the largest block's as large as e4m3 goes.
    whole = jnp.max(largest) / np.float32(numbers.largest * scales.largest)
    inverse = jnp.where(whole > 0, 1 / whole, 0.0)
    inverse = jnp.where(jnp.isfinite(inverse), inverse, 0.0)
    level = rounded(jnp.where(jnp.isfinite(largest), largest, 0.0) * np.float32(1 / numbers.largest) * inverse, "e4m3")
    by = jnp.where(level > 0, inverse / level, 0.0)
    found = rounded(_finite(parts) * by[..., None], "e2m1", stochastic=stochastic)
    return found.reshape(shape), level, jnp.where(jnp.isfinite(whole), whole, jnp.nan)


def widened(numbers: jax.Array, scales: jax.Array, scheme: str) -> jax.Array:
    """Numbers of a block format times their blocks' scales, f32; for NVFP4 without the scale of the whole array.

    Each is a bf16 number too, so that products of them are exact in bf16 with sums in f32.
    """
    block = BLOCKS[scheme][1]
    by = jnp.repeat(scales, block, axis=-1)
    if scheme == "nvfp4":
        return numbers * by
    # In two steps: a scale may be a subnormal number where what is scaled is none.
    half = by >> 1
    return numbers * _two_to(half) * _two_to(by - half)


def quantize_dequantize(x: Any, scheme: str, axis: int | None = -1) -> jax.Array:
    """An array as a scheme holds it, in f32: what it costs in accuracy, on any machine.

    Args:
        x: numbers of any shape.
        scheme: of `SCHEMES`. `"e4m3"`, `"e5m2"`, their `fnuz` forms and `"e2m1"`, `"int8"`, `"int4"` with f32 scales;
            `"mxfp8"`, `"mxfp8-e5m2"`, `"mxfp4"` (blocks of 32, scales of e8m0) and `"nvfp4"` (blocks of 16, scales of e4m3,
            and one in f32 of the whole array).
        axis: along which numbers share scales, or lie in blocks; None (not for blocks): all share one.

    Raises:
        ConfigError: the scheme is not known, or an axis is not one, or blocks do not divide it.
    """
    x = jnp.asarray(x, jnp.float32)
    if scheme not in SCHEMES:
        raise ConfigError(f"`{scheme!r}` is not a format. Use one of {', '.join(map(repr, SCHEMES))}.")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ConfigError(f"`axis={axis!r}` is not an axis of an array of shape {list(x.shape)}.")
    if scheme in FORMATS:
        numbers, scale = scaled(x, scheme, axis)
        return numbers * scale
    if scheme in _INTEGERS:
        numbers, scale = in_integers(x, _INTEGERS[scheme], axis)
        return numbers * scale
    block = BLOCKS[scheme][1]
    if axis is None or x.shape[axis] % block:
        raise ConfigError(
            f"`{scheme}` has blocks of {block} along an axis, and was given shape {list(x.shape)}, axis {axis}. "
            "Use an axis that blocks divide, or pad it with zeros."
        )
    last = jnp.moveaxis(x, axis, -1)
    numbers, scales, whole = in_blocks(last, scheme)
    found = widened(numbers, scales, scheme)
    return jnp.moveaxis(found if whole is None else found * whole, -1, axis)
