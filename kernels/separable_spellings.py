"""What the depthwise-separable block is recognised by, forward: Flax's, with its batch norm, and PyTorch's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kpx.kernels.patterns import builtin
from kpx.kernels.separable import separable_kernel

_LAYOUTS = {"last": ("NHWC", "HWIO", "NHWC"), "first": ("NCHW", "OIHW", "NCHW")}


def _convolved(x, weight, layout: str, stride: int, padding, groups: int, wide: bool):
    """Either dtype of the result that models have: the operands', or f32, rounded."""
    dtype = jnp.promote_types(x.dtype, jnp.float32) if wide else None
    return jax.lax.conv_general_dilated(
        x, weight, (stride,) * 2, padding, dimension_numbers=_LAYOUTS[layout], feature_group_count=groups,
        preferred_element_type=dtype,
    ).astype(x.dtype)  # fmt: skip


def _by_channels(array, layout: str):
    return array.reshape(1, -1, 1, 1) if layout == "first" else array.reshape(1, 1, 1, -1)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _plain(y, rest, layout: str, eps):
    return y


def _affine(y, rest, layout: str, eps):
    scale, shift = (_by_channels(a, layout) for a in rest)
    return (_wide(y) * scale + shift).astype(y.dtype)


def _flax_norm(y, rest, layout: str, eps):
    mean, variance, scale, bias = (_by_channels(a, layout) for a in rest)
    return ((_wide(y) - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias).astype(y.dtype)


# By name: what is between the first convolution and the activation, its arrays, and these as a scale and a shift.
_NORMS: dict[str, tuple[Callable, int, Callable]] = {
    "plain": (
        _plain,
        0,
        lambda rest, eps, channels: (jnp.ones(channels, jnp.float32), jnp.zeros(channels, jnp.float32)),
    ),
    "affine": (_affine, 2, lambda rest, eps, channels: rest),
    "norm": (_flax_norm, 4, lambda rest, eps, channels: _joined(rest, eps)),
}
_ACTIVATIONS: dict[str, Callable] = {
    "relu": lambda y: jnp.maximum(y, 0),
    "relu6": lambda y: jnp.minimum(jnp.maximum(y, 0), 6),
}


def _joined(rest, eps):
    mean, variance, scale, bias = rest
    scale = jax.lax.rsqrt(variance + eps) * scale
    return scale, bias - mean * scale


def _pads(x, depthwise, layout: str, stride: int, same: bool) -> list[tuple[int, int]]:
    at, window = (1, depthwise.shape[:2]) if layout == "last" else (2, depthwise.shape[2:])
    if same:
        return list(jax.lax.padtype_to_pads(x.shape[at : at + 2], window, (stride,) * 2, "SAME"))
    return [(n // 2, n // 2) for n in window]


def _search(layout: str, norm: Callable, activation: Callable, stride: int, same: bool, wide: bool):
    def search(x, depthwise, pointwise, *rest, eps=0.0):
        channels = x.shape[1 if layout == "first" else 3]
        pads = _pads(x, depthwise, layout, stride, same)
        y = _convolved(x, depthwise, layout, stride, pads, channels, wide)
        y = activation(norm(y, rest, layout, eps))
        return _convolved(y, pointwise, layout, 1, [(0, 0), (0, 0)], 1, wide)

    return search


def _replacement(layout: str, as_affine: Callable, activation: str, stride: int, same: bool):
    def replace(x, depthwise, pointwise, *rest, eps=0.0):
        (top, bottom), (left, right) = _pads(x, depthwise, layout, stride, same)
        if layout == "first":
            x, depthwise = jnp.moveaxis(x, 1, -1), jnp.moveaxis(depthwise[:, 0], 0, -1)
            pointwise = pointwise[:, :, 0, 0].T
        else:
            depthwise, pointwise = depthwise[:, :, 0], pointwise[0, 0]
        scale, shift = as_affine(rest, eps, x.shape[-1])
        out = separable_kernel(
            x, depthwise, scale, shift, pointwise, stride=stride, top=int(top), bottom=int(bottom), left=int(left),
            right=int(right), activation=activation,
        )  # fmt: skip
        return jnp.moveaxis(out, -1, 1) if layout == "first" else out

    return replace


def _supports(layout: str, x, depthwise, pointwise, *rest, eps=0.0) -> str | None:
    channels = x.shape[1 if layout == "first" else 3]
    grouped, single = (
        ((channels, 1), pointwise.shape[2:]) if layout == "first" else ((1, channels), pointwise.shape[:2])
    )
    given = depthwise.shape[:2] if layout == "first" else depthwise.shape[2:]
    if tuple(given) != grouped or tuple(single) != (1, 1) or any(a.shape != (channels,) for a in rest):
        return f"{depthwise.shape} and {pointwise.shape} are not depthwise and pointwise of {channels} channels"
    return None


_CHANNELS, _DEPTH = 8, 12
_SHAPES = {
    "last": ((2, 6, 6, _CHANNELS), (3, 3, 1, _CHANNELS), (1, 1, _CHANNELS, _DEPTH)),
    "first": ((2, _CHANNELS, 6, 6), (_CHANNELS, 1, 3, 3), (_DEPTH, _CHANNELS, 1, 1)),
}

for (_layout, _name), _activation, (_stride, _same) in itertools.product(
    (("last", "norm"), ("last", "plain"), ("first", "affine"), ("first", "plain")),
    _ACTIVATIONS,
    ((1, False), (2, True), (2, False)),
):
    _norm, _count, _as_affine = _NORMS[_name]
    _form = functools.partial(_search, _layout, _norm, _ACTIVATIONS[_activation], _stride, _same)
    builtin(
        f"separable_conv.{_layout}.{_name}.{_activation}.{_stride}{'.same' if _same else ''}",
        [(_form(False), _form(True))],
        _replacement(_layout, _as_affine, _activation, _stride, _same),
        [*((s, jnp.bfloat16) for s in _SHAPES[_layout]), *[((_CHANNELS,), jnp.float32)] * _count],
        functools.partial(_supports, _layout),
        fixed_ranks=True,
        among=("convolution",),
        inference_alone=True,
        positive=(4,) if _name == "norm" else (),
        alike=f"separable_conv.{_layout}.{_name}.{_activation}",
        **({"eps": 1e-5} if _name == "norm" else {}),
    )
