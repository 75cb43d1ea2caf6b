"""Rotary position embedding on TPUs, in Pallas: one pass over memory, where XLA writes the halves apart first.

On GPUs and the CPU XLA computes it in one pass, and is left to it.
"""

from __future__ import annotations

import functools
import importlib
import math

import jax
import jax.numpy as jnp

from kpx.kernels.rotary import rotary_kernel

_LANES = 128
_ROWS = 1024  # of the length, at a time
_LEAST_ELEMENTS = 1 << 20


def _supports(x, cos, sin) -> str | None:
    if any(a.dtype not in (jnp.bfloat16, jnp.float32) for a in (x, cos, sin)):
        return f"it takes bf16 or f32 alone, not {x.dtype}, {cos.dtype}, {sin.dtype}"
    if x.ndim < 3 or x.shape[-1] != _LANES or x.shape[-2] % 16:
        return f"sizes must be {_LANES}, and lengths multiples of 16, and are {list(x.shape[-2:])}"
    if cos.shape[-2:] != x.shape[-2:] or _batches(x, cos) is None:
        return f"angles of {list(cos.shape)} are not of each position, of all batches or of each"
    return None


def _prefers(x, cos, sin, *, where) -> str | None:
    if where.differentiated:
        return "in training steps XLA moves as little"
    if math.prod(x.shape) < _LEAST_ELEMENTS:
        return f"an array {x.shape} is small: a pass less over it saves less than a launch takes"
    return None


def _batches(x, cos) -> int | None:
    """How many angles there are by batches, each for as many arrays; None where they differ otherwise."""
    lead = (1,) * (x.ndim - cos.ndim) + cos.shape[:-2]
    many = [n != 1 for n in lead]
    if any(many[len([m for m in many if m]) :]):
        return None  # not of the first dimensions alone
    return math.prod(lead)


def _rotate(x, cos, sin, out, *, backward: bool):
    tpu = importlib.import_module("jax.experimental.pallas.tpu")
    wide, by_cos, by_sin = (ref[0].astype(jnp.float32) for ref in (x, cos, sin))
    half = wide.shape[-1] // 2
    sign = jnp.where(jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1) < half, -1.0, 1.0)
    # The half of what is turned, or in the gradient of what was multiplied: a roll by half, and a sign.
    turned = -sign * tpu.roll(wide * by_sin, half, 1) if backward else sign * tpu.roll(wide, half, 1) * by_sin
    out[0] = (wide * by_cos + turned).astype(out.dtype)


def _call(x, cos, sin, interpret: bool, backward: bool = False):
    pallas = importlib.import_module("jax.experimental.pallas")
    length, size = x.shape[-2:]
    flat = x.reshape(-1, length, size)
    angles = [a.reshape(-1, length, size) for a in (cos, sin)]
    each, rows = flat.shape[0] // angles[0].shape[0], math.gcd(length, _ROWS)
    block = (1, rows, size)
    own = pallas.BlockSpec(block, lambda i, j: (i, j, 0))
    shared = pallas.BlockSpec(block, lambda i, j: (i // each, j, 0))
    out = pallas.pallas_call(
        functools.partial(_rotate, backward=backward),
        grid=(flat.shape[0], length // rows),
        in_specs=[own, shared, shared],
        out_specs=own,
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        interpret=interpret,
    )(flat, *angles)
    return out.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotary(x, cos, sin, interpret: bool):
    return _call(x, cos, sin, interpret)


def _backward(interpret: bool, saved, cotangent):
    x, cos, sin = saved
    by_angles = jax.vjp(lambda c, s: rotary_kernel.decomposition(x, c, s), cos, sin)[1](cotangent)
    return _call(cotangent, cos, sin, interpret, backward=True), *by_angles


_rotary.defvjp(lambda x, cos, sin, interpret: (_call(x, cos, sin, interpret), (x, cos, sin)), _backward)


@rotary_kernel.on("tpu", supports=_supports, prefers=_prefers)
def rotary_pallas(x, cos, sin, *, interpret: bool = False):
    """Reads and writes once."""
    return _rotary(x, cos, sin, interpret)
