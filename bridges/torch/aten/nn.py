"""ATen's neural-network ops, kept whole: linear, convolution, normalization, attention, pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch.registry import lowers, refuse_dropout
from kpx.kernels import attention, norm

aten = torch.ops.aten


# Matrix products -------------------------------------------------------------------------------


def _sum_dtype(dtype):
    """What products are summed in: f32 for 16-bit floats, as PyTorch does; the bias is added before rounding."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


@lowers(aten.linear.default)
def linear(x, weight, bias=None):
    wide = _sum_dtype(x.dtype)
    y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())), preferred_element_type=wide)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)


@lowers(aten.mm.default, aten.bmm.default, aten.matmul.default)
def matmul(x, y):
    return jnp.matmul(x, y, preferred_element_type=_sum_dtype(x.dtype)).astype(x.dtype)


@lowers(aten.addmm.default, aten.baddbmm.default)
def addmm(bias, x, y, *, beta=1, alpha=1):
    wide = _sum_dtype(x.dtype)
    product = jnp.matmul(x, y, preferred_element_type=wide)
    if alpha != 1:
        product = product * jnp.asarray(alpha, wide)
    if beta == 0:  # PyTorch ignores the bias then, NaN included.
        return product.astype(x.dtype)
    bias = bias.astype(wide)
    return (product + (bias if beta == 1 else bias * jnp.asarray(beta, wide))).astype(x.dtype)


@lowers(aten.dot.default, aten.mv.default)
def dot(x, y):
    return jnp.dot(x, y)


@lowers(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    refuse_dropout(dropout_p)
    return attention.attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale)


# Convolution -----------------------------------------------------------------------------------


def _tuple(value, n):
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value


def _conv(x, weight, bias, stride, padding, dilation, groups):
    n = weight.ndim - 2
    unbatched = x.ndim == n + 1
    x = x[None] if unbatched else x
    if not isinstance(padding, str):
        padding = [(p, p) for p in _tuple(padding, n)]
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        _tuple(stride, n),
        padding.upper() if isinstance(padding, str) else padding,
        rhs_dilation=_tuple(dilation, n),
        feature_group_count=groups,
        preferred_element_type=_sum_dtype(x.dtype),
    )
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(-1, *(1,) * n)
    y = y.astype(x.dtype)
    return y[0] if unbatched else y


@lowers(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return _conv(x, weight, bias, stride, padding, dilation, groups)


# Normalization ---------------------------------------------------------------------------------


@lowers(aten.layer_norm.default)
def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return norm.layer_norm(x, weight, bias, axes=len(normalized_shape), eps=eps)


@lowers(aten.rms_norm.default)
def rms_norm(x, normalized_shape, weight=None, eps=None):
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    return norm.rms_norm(x, weight, axes=len(normalized_shape), eps=eps)


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm(x, weight, bias, mean, variance, momentum, eps):
    """Inference only, as one multiply and one add per element: what is left depends on weights alone."""
    scale = jax.lax.rsqrt(variance.astype(jnp.float32) + np.float32(eps))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (x.ndim - 2))
    y = x.astype(scale.dtype) * scale.reshape(shape) + shift.reshape(shape)
    empty = jnp.zeros((0,), x.dtype)
    return y.astype(x.dtype), empty, empty


@lowers(aten.group_norm.default)
def group_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    grouped = x.reshape(x.shape[0], groups, -1).astype(jnp.float32)
    mean = grouped.mean(-1, keepdims=True)
    centred = grouped - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = (centred * jax.lax.rsqrt(variance + np.float32(eps))).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y.astype(x.dtype)


# Pooling ---------------------------------------------------------------------------------------


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
        pads.append((p, high))
    return [1] * lead + kernel, [1] * lead + stride, [1] * lead + dilation, [(0, 0)] * lead + pads


@lowers(aten.max_pool2d.default)
def max_pool2d(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    kernel = _tuple(kernel_size, 2)
    stride = _tuple(stride, 2) if stride else kernel
    window, strides, dilations, pads = _window(x, kernel, stride, _tuple(padding, 2), _tuple(dilation, 2), ceil_mode)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    low = jnp.asarray(-jnp.inf if floating else jnp.iinfo(x.dtype).min, x.dtype)
    return jax.lax.reduce_window(x, low, jax.lax.max, window, strides, pads, None, dilations)


@lowers(aten.avg_pool2d.default)
def avg_pool2d(x, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    kernel = _tuple(kernel_size, 2)
    stride = _tuple(stride, 2) if stride else kernel
    padding = _tuple(padding, 2)
    window, strides, _, pads = _window(x, kernel, stride, padding, [1, 1], ceil_mode)
    dtype, x = x.dtype, x.astype(_sum_dtype(x.dtype))
    zero = np.zeros((), x.dtype)
    total = jax.lax.reduce_window(x, zero, jax.lax.add, window, strides, pads)
    if divisor_override:
        return (total / jnp.asarray(divisor_override, x.dtype)).astype(dtype)
    counted = jnp.ones(x.shape[-2:], x.dtype)
    border = [(p, p) for p in padding]
    if count_include_pad:  # the padding counts, what ceil_mode adds past it does not
        counted = jnp.pad(counted, border, constant_values=1)
        border = [(low - p, high - p) for (low, high), p in zip(pads[-2:], padding, strict=True)]
    else:
        border = pads[-2:]
    count = jax.lax.reduce_window(counted, zero, jax.lax.add, kernel, stride, border)
    return (total / count).astype(dtype)


@lowers(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(x, output_size):
    """Each output is the mean of its own, possibly overlapping, window; summed in f32 at least."""
    dtype, x = x.dtype, x.astype(_sum_dtype(x.dtype))
    for axis, out in zip((x.ndim - 2, x.ndim - 1), _tuple(output_size, 2), strict=True):
        size = x.shape[axis]
        out = size if out is None else out
        if size % out == 0:
            split = (*x.shape[:axis], out, size // out, *x.shape[axis + 1 :])
            x = x.reshape(split).mean(axis + 1)
        else:
            windows = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
            parts = [jax.lax.slice_in_dim(x, a, b, 1, axis).mean(axis, keepdims=True) for a, b in windows]
            x = jnp.concatenate(parts, axis)
    return x.astype(dtype)
