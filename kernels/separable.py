"""The depthwise-separable block (MobileNets, arXiv 1704.04861): a convolution of each channel by itself, then one of 1x1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels.registry import kernel

ACTIVATIONS: dict[str, Callable] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "silu": jax.nn.silu,
}


@kernel("kpx.separable_conv", version=1)
def separable_kernel(x, depthwise, scale, shift, pointwise, *, stride, top, bottom, left, right, activation):
    """`activation(depthwise convolution * scale + shift) @ pointwise`: `[n, h, w, c]` by `[kh, kw, c]` and `[c, d]`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.conv_general_dilated(
        x, depthwise[:, :, None], (int(stride),) * 2, ((int(top), int(bottom)), (int(left), int(right))),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    ).astype(wide)  # fmt: skip
    y = ACTIVATIONS[activation](y * scale.astype(wide) + shift.astype(wide)).astype(x.dtype)
    out = jax.lax.dot_general(y, pointwise, (((3,), (0,)), ((), ())), preferred_element_type=wide)
    return out.astype(x.dtype)


def separable_conv(
    x, depthwise, pointwise, *, scale=None, shift=None, stride: int = 1, padding: Any = "SAME", activation: str = "none"
):
    """`activation(depthwise convolution * scale + shift) @ pointwise`; a batch norm is a scale and a shift.

    Args:
        x: `[batch, height, width, channels]`, floating.
        depthwise: `[kernel height, kernel width, channels]`, of the dtype of `x`.
        pointwise: `[channels, width]`, of the dtype of `x`.
        scale, shift: `[channels]` or None.
        stride: of the first convolution, 1 or more, both ways.
        padding: `"SAME"`, `"VALID"`, or `((top, bottom), (left, right))`.
        activation: `none`, `relu`, `relu6` or `silu`.

    Returns:
        `[batch, new height, new width, width]`, of the dtype of `x`; sums are in f32 (f64 for f64), and between the
        convolutions numbers are of that dtype.

    Raises:
        InputError: shapes, dtypes or the activation are not those.
    """
    given = f"images {list(x.shape)}, depthwise {list(depthwise.shape)} and pointwise {list(pointwise.shape)}"
    if (x.ndim, depthwise.ndim, pointwise.ndim) != (4, 3, 2) or not (
        x.shape[-1] == depthwise.shape[-1] == pointwise.shape[0]
    ):
        raise InputError(
            f"separable_conv was given {given}. They are `[batch, height, width, channels]`, `[kernel height, kernel width, "
            "channels]` and `[channels, width]`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.dtype == depthwise.dtype == pointwise.dtype:
        raise InputError(
            f"separable_conv was given {x.dtype}, {depthwise.dtype} and {pointwise.dtype}. All are one floating dtype."
        )
    for name, array in (("scale", scale), ("shift", shift)):
        if array is not None and array.shape != x.shape[-1:]:
            raise InputError(f"separable_conv was given a {name} {list(array.shape)}. It is `[{x.shape[-1]}]`.")
    if activation not in ACTIVATIONS or stride < 1:
        raise InputError(
            f"separable_conv was given activation={activation!r} and stride={stride}. There are {', '.join(ACTIVATIONS)}, and "
            "a stride is 1 or more."
        )
    (top, bottom), (left, right) = _padding(padding, x.shape[1:3], depthwise.shape[:2], stride)
    scale = jnp.ones(x.shape[-1], jnp.float32) if scale is None else scale
    shift = jnp.zeros(x.shape[-1], jnp.float32) if shift is None else shift
    return separable_kernel(
        x, depthwise, scale, shift, pointwise, stride=int(stride), top=top, bottom=bottom, left=left, right=right,
        activation=activation,
    )  # fmt: skip


def _padding(padding: Any, sizes, window, stride: int) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise InputError(f"separable_conv was given padding={padding!r}. It is 'SAME', 'VALID' or numbers.")
        return [(int(a), int(b)) for a, b in jax.lax.padtype_to_pads(sizes, window, (stride,) * 2, padding)]
    return [(int(a), int(b)) for a, b in padding]


def reached(size: int, window: int, stride: int, before: int, after: int) -> int:
    """How many positions a convolution has along a dimension."""
    return (size + before + after - window) // stride + 1
