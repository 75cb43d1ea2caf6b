"""Quantization that is written as arithmetic: ATen's fake quantization, `quantized_decomposed` (PT2E), and scaled fp8 products.

Where the result depends on the order of roundings, the order is that of PyTorch's CPU kernels.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch.aten import elementwise as e
from kpx.bridges.torch.aten.common import is_float, sum_dtype
from kpx.bridges.torch.aten.special import cast
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers

_INT64_LIMIT = 2.0**63


# Fake quantization -----------------------------------------------------------------------------


def _along(values, x, axis):
    return values.reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])


def _faked(x, scale, zero_point, low, high, overflows):
    """The values that x is quantized to, and where it was within the range.

    Args:
        scale, zero_point: arrays that broadcast; the scale in f32.
        overflows: what lies beyond int64 becomes `low`, as where the kernel casts before it clamps.
    """
    wide = x.astype(sum_dtype(x.dtype))
    scaled = wide * (np.float32(1) / scale).astype(wide.dtype)
    shift = zero_point.astype(wide.dtype)
    level = jnp.round(scaled + shift) if is_float(zero_point) else jnp.round(scaled) + shift
    outside = jnp.isnan(level)
    if overflows:
        outside = outside | (jnp.abs(level) >= _INT64_LIMIT)
    level = jnp.where(outside, low - 1.0, level)
    within = (level >= low) & (level <= high)
    # Differences of whole numbers are exact in f32; a fractional zero point is subtracted in double precision.
    exact = jnp.float64 if is_float(zero_point) else jnp.float32
    values = (jnp.clip(level, low, high).astype(exact) - zero_point.astype(exact)) * scale.astype(exact)
    return values.astype(jnp.float32).astype(x.dtype), within


@lowers(aten.fake_quantize_per_tensor_affine_cachemask.default)
def fake_quantize(x, scale, zero_point, quant_min, quant_max):
    return _faked(x, jnp.float32(scale), jnp.asarray(zero_point, jnp.int32), quant_min, quant_max, False)


@lowers(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default)
def fake_quantize_by_tensors(x, scale, zero_point, fake_quant_enabled, quant_min, quant_max):
    scale, zero_point = scale.reshape(-1)[0].astype(jnp.float32), zero_point.reshape(-1)[0]
    values, within = _faked(x, scale, zero_point, quant_min, quant_max, False)
    enabled = fake_quant_enabled.reshape(-1)[0] != 0
    return jnp.where(enabled, values, x), jnp.where(enabled, within, True)


@lowers(aten.fake_quantize_per_channel_affine_cachemask.default)
def fake_quantize_channels(x, scale, zero_point, axis, quant_min, quant_max):
    return _faked(x, _along(scale, x, axis), _along(zero_point, x, axis), quant_min, quant_max, True)


def _rounded_zero_point(zero_point, low, high, backward):
    """A learnable zero point as a whole number within the range."""
    value = jnp.round(zero_point) if backward else zero_point + jnp.asarray(0.5, zero_point.dtype)
    return jnp.trunc(jnp.clip(value, low, high)).astype(jnp.int32)


@lowers(aten._fake_quantize_learnable_per_tensor_affine.default)
def fake_quantize_learnable(x, scale, zero_point, quant_min, quant_max, grad_factor=1.0):
    zero = _rounded_zero_point(zero_point.reshape(-1)[0], quant_min, quant_max, False)
    return _faked(x, scale.reshape(-1)[0].astype(jnp.float32), zero, quant_min, quant_max, False)[0]


@lowers(aten._fake_quantize_learnable_per_channel_affine.default)
def fake_quantize_learnable_channels(x, scale, zero_point, axis, quant_min, quant_max, grad_factor=1.0):
    zero = jnp.clip(jnp.round(zero_point), quant_min, quant_max).astype(jnp.int32)
    return _faked(x, _along(scale, x, axis), _along(zero, x, axis), quant_min, quant_max, True)[0]


def _learnable_gradient(grad, x, scale, zero, low, high, factor, reduced):
    """Gradients by x, by the scale and by the zero point (arXiv 1902.08153)."""
    inverse = np.float32(1) / scale
    level = jnp.round(x * inverse) + zero
    within = (level >= low) & (level <= high)
    by_x = jnp.where(within, grad, 0)
    clamped = jnp.clip(level, low, high) - zero
    by_scale = grad * jnp.where(within, (clamped * scale - x) * inverse, clamped) * np.float32(factor)
    by_zero = jnp.where(within, 0, -grad * scale * np.float32(factor))
    return by_x, jnp.sum(by_scale, reduced), jnp.sum(by_zero, reduced)


@lowers(aten._fake_quantize_learnable_per_tensor_affine_backward.default)
def fake_quantize_learnable_backward(grad, x, scale, zero_point, quant_min, quant_max, grad_factor=1.0):
    zero = _rounded_zero_point(zero_point.reshape(-1)[0], quant_min, quant_max, True)
    parts = grad, x, scale.reshape(-1)[0], zero, quant_min, quant_max, grad_factor
    by_x, by_scale, by_zero = _learnable_gradient(*parts, None)
    return by_x, by_scale.reshape(1), by_zero.reshape(1)


@lowers(aten._fake_quantize_learnable_per_channel_affine_backward.default)
def fake_quantize_learnable_channels_backward(grad, x, scale, zero_point, axis, quant_min, quant_max, grad_factor=1.0):
    zero = jnp.clip(jnp.round(zero_point), quant_min, quant_max)
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    scale, zero = _along(scale, x, axis), _along(zero, x, axis)
    return _learnable_gradient(grad, x, scale, zero, quant_min, quant_max, grad_factor, others)


# Observation -----------------------------------------------------------------------------------

_LEAST_SCALE = np.float32(6.1e-5)


def _parameters(low, high, quant_min, quant_max, symmetric):
    """Scale (f32) and zero point (int32) that represent [low, high], zero among it exactly."""
    low, high = jnp.minimum(low, 0).astype(jnp.float32), jnp.maximum(high, 0).astype(jnp.float32)
    levels = quant_max - quant_min
    straddles = (low < 0) & (high > 0)
    if symmetric:
        least, most = -(levels // 2 + 1), levels // 2
        step = jnp.maximum(jnp.abs(low / np.float32(least)), jnp.abs(high / np.float32(most)))
        low = jnp.where(straddles, step * np.float32(least), low)
        high = jnp.where(straddles, step * np.float32(most), high)
    scale = ((high.astype(jnp.float64) - low) / levels).astype(jnp.float32)
    scale = jnp.where((scale == 0) | jnp.isinf(np.float32(1) / scale), np.float32(0.1), scale)
    small = scale < _LEAST_SCALE
    amplifier = _LEAST_SCALE / scale
    edge = _LEAST_SCALE * np.float32(levels)
    low, high = (
        jnp.where(small, jnp.where(high == 0, -edge, low * amplifier), low),
        jnp.where(small, jnp.where(low == 0, edge, high * amplifier), high),
    )
    scale = jnp.where(small, _LEAST_SCALE, scale)
    by_low, by_high = (v.astype(jnp.float64) / scale.astype(jnp.float64) for v in (low, high))
    nearer_low = abs(quant_min) - jnp.abs(by_low) < abs(quant_max) - jnp.abs(by_high)
    zero = jnp.where(nearer_low, quant_min - by_low, quant_max - by_high)
    if symmetric:
        zero = jnp.where(straddles, (quant_min + quant_max) / 2, zero)
    return scale, jnp.round(jnp.clip(zero, quant_min, quant_max)).astype(jnp.int32)


@lowers(aten._fused_moving_avg_obs_fq_helper_functional.default)
def observe_and_fake_quantize(
    x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, averaging_const, quant_min, quant_max,
    ch_axis, per_row_fake_quant=False, symmetric_quant=False,
):  # fmt: skip
    """Moving averages of the extremes, and fake quantization by them."""
    reduced = tuple(d for d in range(x.ndim) if d != ch_axis % x.ndim) if per_row_fake_quant else None
    observes = observer_on.reshape(-1)[0] != 0

    def moved(running, now):
        now = now.reshape(running.shape if running.size else now.shape)
        running = running if running.size else jnp.full(now.shape, jnp.inf, now.dtype)
        rate = jnp.asarray(averaging_const, running.dtype)
        return jnp.where(jnp.isinf(running), now, running + rate * (now - running))

    lowest = jnp.where(observes, moved(running_min, jnp.min(x, reduced)), running_min)
    highest = jnp.where(observes, moved(running_max, jnp.max(x, reduced)), running_max)
    new_scale, new_zero = _parameters(lowest, highest, quant_min, quant_max, symmetric_quant)
    scale = jnp.where(observes, new_scale.reshape(scale.shape), scale)
    zero_point = jnp.where(observes, new_zero.reshape(zero_point.shape).astype(zero_point.dtype), zero_point)
    if per_row_fake_quant:
        values, within = fake_quantize_channels(x, scale, zero_point, ch_axis, quant_min, quant_max)
    else:
        values, within = _faked(x, scale.reshape(-1)[0], zero_point.reshape(-1)[0], quant_min, quant_max, False)
    quantizes = fake_quant_on.reshape(-1)[0] != 0
    values, within = jnp.where(quantizes, values, x), jnp.where(quantizes, within, True)
    return values, within, lowest, highest, scale, zero_point


# quantized_decomposed --------------------------------------------------------------------------


def _lowers(*names):
    """The ops are defined by a module of PyTorch's that few programs import."""
    return lowers(*(f"quantized_decomposed::{name}" for name in names))


def _scalar(value, dtype):
    return jnp.asarray(value, dtype).reshape(())


@_lowers("quantize_per_tensor", "quantize_per_tensor.tensor", "quantize_per_tensor.tensor2")
def quantize(x, scale, zero_point, quant_min, quant_max, dtype):
    inverse = (1.0 / _scalar(scale, jnp.float64)).astype(jnp.float32)
    level = jnp.round(x.astype(jnp.float32) * inverse) + _scalar(zero_point, jnp.float32)
    low, high = _scalar(quant_min, jnp.float32), _scalar(quant_max, jnp.float32)
    return cast(jnp.clip(level, low, high), to_jax(dtype))


@_lowers("dequantize_per_tensor", "dequantize_per_tensor.tensor", "dequantize_per_tensor.tensor2")
def dequantize(x, scale, zero_point, quant_min, quant_max, dtype, *, out_dtype=None):
    kind = to_jax(out_dtype or torch.float32)
    wide = sum_dtype(kind)
    shifted = (x.astype(wide) - _scalar(zero_point, wide)).astype(kind).astype(wide)
    return (shifted * _scalar(scale, wide)).astype(kind)


@_lowers("quantize_per_channel")
def quantize_channels(x, scales, zero_points, axis, quant_min, quant_max, dtype):
    scales, zero_points = _along(scales, x, axis), _along(zero_points, x, axis)
    level = e.add(jnp.round(e.mul(x.astype(jnp.float32), e.div(1.0, scales))), zero_points)
    return cast(jnp.clip(level, quant_min, quant_max), to_jax(dtype))


@_lowers("dequantize_per_channel")
def dequantize_channels(x, scales, zero_points, axis, quant_min, quant_max, dtype, *, out_dtype=None):
    shifted = x if zero_points is None else e.sub(x, _along(zero_points, x, axis))
    return e.mul(shifted, _along(scales, x, axis)).astype(to_jax(out_dtype or torch.float32))


@_lowers("fake_quant_per_channel")
def fake_quant_channels(x, scales, zero_points, axis, quant_min, quant_max):
    scales, zero = (_along(v, x, axis).astype(k) for v, k in ((scales, jnp.float32), (zero_points, jnp.int32)))
    level = e.add(jnp.round(x * (np.float32(1) / scales)), zero)
    return e.mul(e.sub(jnp.clip(level, quant_min, quant_max), zero), scales)


def _extremes(x):
    return jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)


def _at_least(scale, eps):
    return jnp.maximum(scale.astype(jnp.float32), np.float32(eps)).reshape(1)


@_lowers("choose_qparams.tensor")
def choose(x, quant_min, quant_max, eps, dtype):
    low, high = _extremes(x)
    scale = _at_least(e.div(e.sub(high, low), float(quant_max - quant_min)), eps)
    zero = quant_min - cast(jnp.round(low.astype(jnp.float32) / scale), jnp.int32)
    return scale.astype(jnp.float64), jnp.clip(zero, quant_min, quant_max).astype(jnp.int64)


@_lowers("choose_qparams_symmetric.tensor")
def choose_symmetric(x, quant_min, quant_max, eps, dtype):
    low, high = _extremes(x)
    scale = _at_least(e.div(jnp.maximum(-low, high), float(quant_max - quant_min) / 2), eps)
    return scale.astype(jnp.float64), jnp.full((1,), 128 if dtype == torch.uint8 else 0, jnp.int64)


@_lowers("choose_qparams_per_token")
def choose_per_token(x, dtype):
    scales = jnp.max(jnp.abs(x), -1, keepdims=True)
    scales = scales.astype(jnp.float32) if scales.dtype == jnp.float16 else scales
    scales = e.div(e.clamp(scales, 1e-5), 127)
    return scales, jnp.zeros_like(scales)


@_lowers("choose_qparams_per_token_asymmetric", "_choose_qparams_per_token_asymmetric_impl")
def choose_per_token_asymmetric(x, dtype):
    low = jnp.minimum(jnp.min(x, -1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, -1, keepdims=True), 0)
    least, most = -128, 127
    scale = e.clamp(e.div(e.sub(high, low), float(most - least)), float(jnp.finfo(jnp.float32).eps))
    by_low, by_high = e.div(low, scale), e.div(high, scale)
    from_low = e.add(e.add(by_low, least), e.add(by_high, most)) > 0
    zero = jnp.where(from_low, e.rsub(by_low, least), e.rsub(by_high, most))
    return scale.astype(jnp.float64), jnp.round(jnp.clip(zero, least, most)).astype(jnp.int64)


@_lowers("quantize_per_token")
def quantize_tokens(x, scales, zero_points, quant_min, quant_max, dtype):
    level = jnp.round(e.add(e.mul(x, e.div(1.0, scales)), zero_points))
    return cast(jnp.clip(level, quant_min, quant_max), to_jax(dtype))


@_lowers("dequantize_per_token")
def dequantize_tokens(x, scales, zero_points, quant_min, quant_max, dtype, output_dtype=torch.float32):
    return e.mul(e.sub(x, zero_points), scales).astype(to_jax(output_dtype))


def _groups(x, scales, group_size):
    size = x.shape[-1] if group_size > x.shape[-1] and scales.shape[-1] == 1 else group_size
    return x.reshape(-1, size)


@_lowers("quantize_per_channel_group")
def quantize_groups(x, scales, zero_points, quant_min, quant_max, dtype, group_size=128):
    scaled = e.mul(_groups(x, scales, group_size), e.div(1.0, scales.reshape(-1, 1)))
    level = jnp.round(e.add(scaled, zero_points.reshape(-1, 1)))
    return cast(jnp.clip(level, quant_min, quant_max), to_jax(dtype)).reshape(x.shape)


@_lowers("dequantize_per_channel_group")
def dequantize_groups(x, scales, zero_points, quant_min, quant_max, dtype, group_size=128, output_dtype=torch.float32):
    groups = _groups(x, scales, group_size)
    zero = jnp.zeros((), jnp.int32) if zero_points is None else zero_points.reshape(-1, 1)
    return e.mul(e.sub(groups, zero), scales.reshape(-1, 1)).reshape(x.shape).astype(to_jax(output_dtype))


@_lowers("convert_element_type.no_fuse")
def convert(x, dtype):
    return cast(x, to_jax(dtype))


# Scaled products -------------------------------------------------------------------------------


@lowers(aten._scaled_mm.default)
def scaled_mm(x, y, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """A product of fp8 matrices, by one scale each or by one a row and a column; fp8 results saturate."""
    kind = x.dtype if out_dtype is None else jnp.dtype(to_jax(out_dtype))
    product = jnp.matmul(x.astype(jnp.float32), y.astype(jnp.float32)) * scale_a * scale_b
    if bias is not None:
        product = product + bias.astype(jnp.float32)
    if jnp.finfo(kind).bits > 8:
        return product.astype(kind)
    if scale_result is not None:
        product = product / scale_result
    limit = float(jnp.finfo(kind).max)
    return jnp.clip(product, -limit, limit).astype(kind)
