"""Group normalization (arXiv 1803.08494), with the SiLU that follows it in diffusion models."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels.registry import kernel


def by_groups(x, groups: int, eps: float, axis: int):
    """`x` in f32 (f64 for f64), each group of channels of each sample to zero mean and unit variance. `axis` is 1 or the last."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if axis == 1:
        grouped, reduced = x.reshape(x.shape[0], groups, -1).astype(wide), (2,)
    else:
        grouped, reduced = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups).astype(wide), (1, 3)
    centred = grouped - jnp.mean(grouped, reduced, keepdims=True)
    variance = jnp.mean(jnp.square(centred), reduced, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + jnp.asarray(eps, wide))).reshape(x.shape)


def by_channels(array, rank: int, axis: int):
    """`[channels]` with as many dimensions as what it is applied to."""
    return array.reshape(1, -1, *(1,) * (rank - 2)) if axis == 1 else array.reshape(*(1,) * (rank - 1), -1)


@kernel("kpx.group_norm", version=1)
def group_norm_kernel(x, weight, bias, *, groups, eps, axis, silu):
    """`[batch, ..., channels]` (`axis` -1), or `[batch, channels, ...]` (1); `weight` and `bias` are `[channels]`."""
    y = by_groups(x, groups, eps, axis)
    weight, bias = (by_channels(a, x.ndim, axis).astype(y.dtype) for a in (weight, bias))
    y = y * weight + bias
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def group_norm(x, groups: int, weight=None, bias=None, *, eps: float = 1e-5, axis: int = -1, activation: str = "none"):
    """Each group of channels of each sample to zero mean and unit variance, over all positions.

    Args:
        x: `[batch, ..., channels]`, or `[batch, channels, ...]`; floating. Statistics are in f32 (f64 for f64).
        groups: how many groups; it divides the channels.
        weight, bias: `[channels]` or None.
        eps: added to the (biased) variance.
        axis: where the channels are: -1 or 1.
        activation: `none` or `silu`, of the result.

    Returns:
        An array like `x`.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    if axis not in (1, -1) or x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            f"group_norm was given {x.dtype}{list(x.shape)} and axis={axis}. It is floating, `[batch, ..., channels]` with "
            "axis=-1, or `[batch, channels, ...]` with axis=1."
        )
    channels = x.shape[axis]
    if groups < 1 or channels % groups:
        raise InputError(f"group_norm was given {channels} channels and groups={groups}. Groups divide the channels.")
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.shape != (channels,):
            raise InputError(f"group_norm was given a {name} {list(array.shape)}. It is `[{channels}]`.")
    if activation not in ("none", "silu"):
        raise InputError(f"group_norm was given activation={activation!r}. There are none, silu.")
    weight = jnp.ones(channels, x.dtype) if weight is None else weight
    bias = jnp.zeros(channels, x.dtype) if bias is None else bias
    axis = -1 if x.ndim == 2 else axis
    return group_norm_kernel(
        x, weight, bias, groups=int(groups), eps=float(eps), axis=int(axis), silu=activation == "silu"
    )
