"""ATen's neural-network ops, kept whole: linear, convolution, normalization, attention, pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch.aten.common import sizes, sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers
from kpx.kernels import attention, norm

# Matrix products -------------------------------------------------------------------------------


@lowers(aten.linear.default)
def linear(x, weight, bias=None):
    wide = sum_dtype(x.dtype)
    y = jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())), preferred_element_type=wide)
    return (y if bias is None else y + bias.astype(wide)).astype(x.dtype)


@lowers(aten.mm.default, aten.bmm.default, aten.matmul.default)
def matmul(x, y):
    return jnp.matmul(x, y, preferred_element_type=sum_dtype(x.dtype)).astype(x.dtype)


@lowers(aten.addmm.default, aten.baddbmm.default)
def addmm(bias, x, y, *, beta=1, alpha=1):
    wide = sum_dtype(x.dtype)
    product = jnp.matmul(x, y, preferred_element_type=wide)
    if alpha != 1:
        product = product * jnp.asarray(alpha, wide)
    if beta == 0:  # PyTorch ignores the bias then, NaN included.
        return product.astype(x.dtype)
    bias = bias.astype(wide)
    return (product + (bias if beta == 1 else bias * jnp.asarray(beta, wide))).astype(x.dtype)


@lowers(aten.dot.default, aten.mv.default)
def dot(x, y):
    return jnp.dot(x, y, preferred_element_type=sum_dtype(x.dtype)).astype(x.dtype)


@lowers(aten.vdot.default)
def vdot(x, y):
    return jnp.vdot(x, y)


@lowers(aten.addbmm.default)
def addbmm(bias, x, y, *, beta=1, alpha=1):
    joined = jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1), y.reshape(-1, y.shape[2])
    return addmm(bias, *joined, beta=beta, alpha=alpha)


@lowers(aten._int_mm.default)
def int_mm(x, y):
    return jnp.matmul(x, y, preferred_element_type=jnp.int32)


@lowers(aten._trilinear.default)
def trilinear(x, y, z, expand1, expand2, expand3, sumdim, unroll_dim=1):
    x, y, z = (jnp.expand_dims(a, tuple(e)) for a, e in ((x, expand1), (y, expand2), (z, expand3)))
    product = x * y * z
    # A dimension that no operand has is of size 0 to PyTorch, and its loop over `unroll_dim` then runs no time.
    for dim in {*expand1} & {*expand2} & {*expand3}:
        if dim not in sumdim:
            product = jax.lax.slice_in_dim(product, 0, 0, axis=dim)
        elif dim == unroll_dim:
            product = jnp.zeros_like(product)
    return jnp.sum(product, tuple(sumdim))


# Distances -------------------------------------------------------------------------------------


def _norm(difference, p):
    """The p-norm along the last axis, whose gradient at zero is zero."""
    size = jnp.abs(difference)
    if p == 0:
        return jnp.sum(difference != 0, -1).astype(difference.dtype)
    if p == float("inf"):
        return jnp.max(size, -1, initial=0)
    if p == 1:
        return jnp.sum(size, -1)
    powers = jnp.square(difference) if p == 2 else jnp.where(size == 0, 0, jnp.where(size == 0, 1, size) ** p)
    total = jnp.sum(powers, -1)
    return jnp.where(total == 0, 0, jnp.where(total == 0, 1, total) ** (1 / p))


@lowers(aten._cdist_forward.default)
def cdist(x, y, p, compute_mode):
    return _norm(x[..., :, None, :] - y[..., None, :, :], p)


@lowers(aten._pdist_forward.default)
def pdist(x, p=2.0):
    rows, columns = np.triu_indices(x.shape[0], 1)
    return _norm(x[rows] - x[columns], p)


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    return attention.attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale)


# Convolution -----------------------------------------------------------------------------------


def _conv(x, weight, bias, stride, padding, dilation, groups):
    n = weight.ndim - 2
    unbatched = x.ndim == n + 1
    x = x[None] if unbatched else x
    if not isinstance(padding, str):
        padding = [(p, p) for p in sizes(padding, n)]
    y = _convolved(x, weight, sizes(stride, n), padding, [1] * n, sizes(dilation, n), groups)
    return _biased(y, bias, x.dtype, unbatched)


def _convolved(x, weight, stride, padding, base, dilation, groups):
    return jax.lax.conv_general_dilated(
        x,
        weight,
        stride,
        padding.upper() if isinstance(padding, str) else padding,
        lhs_dilation=base,
        rhs_dilation=dilation,
        feature_group_count=groups,
        preferred_element_type=sum_dtype(x.dtype),
    )


def _biased(y, bias, dtype, unbatched):
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(-1, *(1,) * (y.ndim - 2))
    y = y.astype(dtype)
    return y[0] if unbatched else y


@lowers(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
)  # fmt: skip
def conv(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return _conv(x, weight, bias, stride, padding, dilation, groups)


@lowers(aten.convolution.default)
def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    if not transposed:
        return _conv(x, weight, bias, stride, padding, dilation, groups)
    return _transposed_conv(x, weight, bias, stride, padding, dilation, output_padding, groups)


@lowers(aten._convolution.default, aten._convolution.deprecated)
def internal_convolution(
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, benchmark, deterministic,
    cudnn_enabled, allow_tf32=True,
):  # fmt: skip
    return convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@lowers(aten.conv_tbc.default)
def conv_tbc(x, weight, bias, pad=0):
    """A 1-d convolution of `[time, batch, channels]` with `[width, in, out]`."""
    y = _conv(jnp.transpose(x, (1, 2, 0)), jnp.transpose(weight, (2, 1, 0)), bias, [1], [pad], [1], 1)
    return jnp.transpose(y, (2, 0, 1))


def _transposed_conv(x, weight, bias, stride, padding, dilation, output_padding, groups):
    """The gradient of a convolution: of x, spread out by the stride, with the flipped kernel (arXiv 1603.07285)."""
    n = weight.ndim - 2
    unbatched = x.ndim == n + 1
    x = x[None] if unbatched else x
    stride, padding, dilation, extra = (sizes(v, n) for v in (stride, padding, dilation, output_padding))
    spatial = weight.shape[2:]
    # [in, out / groups, ...] becomes [out, in / groups, ...].
    kernel = jnp.flip(weight, range(2, 2 + n)).reshape(groups, -1, weight.shape[1], *spatial)
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(groups * weight.shape[1], -1, *spatial)
    reach = [d * (k - 1) for d, k in zip(dilation, spatial, strict=True)]
    pads = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
    y = _convolved(x, kernel, [1] * n, pads, stride, dilation, groups)
    return _biased(y, bias, x.dtype, unbatched)


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
    wide = variance.astype(sum_dtype(variance.dtype))
    scale = jax.lax.rsqrt(wide + np.asarray(eps, wide.dtype))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (x.ndim - 2))
    y = x.astype(scale.dtype) * scale.reshape(shape) + shift.reshape(shape)
    empty = jnp.zeros((0,), x.dtype)
    return y.astype(x.dtype), empty, empty


@lowers(aten.native_layer_norm.default)
def native_layer_norm(x, normalized_shape, weight, bias, eps):
    """The norm, whole, with the mean and the reciprocal deviation that its backward op takes."""
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    wide = x.astype(sum_dtype(x.dtype))
    mean = jnp.mean(wide, axes, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), axes, keepdims=True) + np.asarray(eps, wide.dtype))
    return layer_norm(x, normalized_shape, weight, bias, eps), mean.astype(x.dtype), rstd.astype(x.dtype)


@lowers(aten.group_norm.default)
def group_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    if not x.size:
        return x
    grouped = x.reshape(x.shape[0], groups, -1).astype(sum_dtype(x.dtype))
    mean = grouped.mean(-1, keepdims=True)
    centred = grouped - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = (centred * jax.lax.rsqrt(variance + np.asarray(eps, variance.dtype))).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y.astype(x.dtype)
