"""What group normalization is recognised by, forward: as PyTorch's comes over, and as Flax and JAX models write it."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp

from kpx.kernels.group_norm import by_channels, by_groups, group_norm_kernel
from kpx.kernels.patterns import builtin


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _centred(x, weight, bias, groups: int, eps, axis: int):
    weight, bias = (by_channels(a, x.ndim, axis) for a in (weight, bias))
    return by_groups(x, groups, eps, axis) * weight + bias


def _flax(x, weight, bias, groups: int, eps, axis: int):
    """Flax's: the variance by squares, and the scale joined with the weight."""
    wide = _wide(x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups))
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean = jnp.mean(wide, axes)
    variance = jnp.maximum(0.0, jnp.mean(jax.lax.square(wide), axes) - jax.lax.square(mean))
    mean, variance = (jnp.repeat(a, x.shape[-1] // groups, -1) for a in (mean, variance))
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1])
    y = _wide(x) - mean.reshape(shape)
    weight, bias = (by_channels(a, x.ndim, -1) for a in (weight, bias))
    return y * (jax.lax.rsqrt(variance.reshape(shape) + eps) * weight) + bias


def _search(norm, groups: int, axis: int, silu: bool, activated_wide: bool):
    def search(x, weight, bias, *, eps):
        y = norm(x, weight, bias, groups, eps, axis)
        if silu and activated_wide:
            return jax.nn.silu(y).astype(x.dtype)
        y = y.astype(x.dtype)
        return jax.nn.silu(y) if silu else y

    return search


def _replacement(groups: int, axis: int, silu: bool):
    def replace(x, weight, bias, *, eps):
        return group_norm_kernel(x, weight, bias, groups=groups, eps=eps, axis=axis, silu=silu)

    return replace


def _supports(axis: int, groups: int, x, weight, bias, *, eps) -> str | None:
    channels = x.shape[axis] if x.ndim > 2 else 0
    if channels % groups or not channels or weight.shape != (channels,) or bias.shape != (channels,):
        return f"{groups} groups of {x.shape} with {weight.shape} and {bias.shape}"
    return None


# As models have them: 32 nearly everywhere.
for _groups, _axis, _silu in itertools.product((32, 16, 8), (1, -1), (True, False)):
    _shape = (2, 64, 3, 5) if _axis == 1 else (2, 3, 5, 64)
    builtin(
        f"group_norm.{_groups}.{'first' if _axis == 1 else 'last'}{'.silu' if _silu else ''}",
        [
            tuple(_search(_norm, _groups, _axis, _silu, wide) for wide in ((False, True) if _silu else (False,)))
            for _norm in ((_centred,) if _axis == 1 else (_centred, _flax))
        ],
        _replacement(_groups, _axis, _silu),
        [(_shape, jnp.bfloat16), ((64,), jnp.bfloat16), ((64,), jnp.bfloat16)],
        functools.partial(_supports, _axis, _groups),
        alike=f"group_norm.{'first' if _axis == 1 else 'last'}{'.silu' if _silu else ''}",
        fixed_ranks=True,
        among=("rsqrt",),
        inference_alone=True,  # the kernel has no gradient of its own
        eps=1e-5,
    )
