"""Linear layers with their epilogues on TPUs, in Pallas: one kernel each, which completes a tile before it is written.

XLA completes a product in its own kernel too, but writes a gate and reads it again for the product by it. Which of the two
is faster is not measured here: so rules leave both to XLA, and `kpx.tune` may find otherwise.
"""

from __future__ import annotations

import functools
import importlib
import math

import jax
import jax.numpy as jnp

from kpx.kernels.linear import ACTIVATIONS, Settings, differentiable, gated_kernel, linear_kernel
from kpx.kernels.registry import where_measured

_LANES = 128
_TILE = 512  # rows, columns, and what is summed at a time


def _supports(x, *arrays, activation, transposed, given="") -> str | None:
    weights = arrays[: len(arrays) - len(given.split())]
    if len({x.dtype, *(w.dtype for w in weights)}) > 1 or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bf16 or f32 alone, not {', '.join(str(a.dtype) for a in (x, *weights))}"
    sizes = (math.prod(x.shape[:-1]), *weights[0].shape)
    if any(n % _LANES for n in sizes) or not math.prod(sizes):
        return f"rows and sizes must be multiples of {_LANES}, and are {list(sizes)}"
    if activation == "gelu":
        return "Pallas has no error function on TPUs"
    return None


def _kernel(*refs, settings: Settings, weights: int, names: tuple[str, ...], save: bool, steps: int):
    """A tile: `x`, weights, what is added, then the result and what is saved of it, and the sums."""
    pallas = importlib.import_module("jax.experimental.pallas")
    x, *rest = refs
    factors, rest = rest[:weights], rest[weights:]
    further, rest = dict(zip(names, rest, strict=False)), rest[len(names) :]
    out, *rest = rest
    saved, sums = rest[: weights * save], rest[weights * save :]

    @pallas.when(pallas.program_id(2) == 0)
    def _():
        for each in sums:
            each[...] = jnp.zeros_like(each)

    contracted = (((1,), (1 if settings.transposed else 0,)), ((), ()))
    for each, factor in zip(sums, factors, strict=True):
        each[...] += jax.lax.dot_general(x[...], factor[...], contracted, preferred_element_type=jnp.float32)

    @pallas.when(pallas.program_id(2) == steps - 1)
    def _():
        products = [each[...] for each in sums]
        if "bias" in further:
            products[0] = products[0] + further["bias"][...].astype(jnp.float32)
        for kept, value in zip(saved, products, strict=False):
            kept[...] = value.astype(kept.dtype)
        y = ACTIVATIONS[settings.activation](products[0])
        y = y * products[1] if weights > 1 else y
        if "residual" in further:
            y = y + further["residual"][...].astype(jnp.float32)
        out[...] = y.astype(out.dtype)


def run(x, weights, further, settings: Settings, save: bool):
    """See `differentiable`."""
    pallas = importlib.import_module("jax.experimental.pallas")
    tpu = importlib.import_module("jax.experimental.pallas.tpu")
    (rows, size), width = x.shape, weights[0].shape[0 if settings.transposed else 1]
    down, inner, across = (math.gcd(n, _TILE) for n in (rows, size, width))
    tile = pallas.BlockSpec((down, across), lambda i, j, k: (i, j))
    factor = (
        pallas.BlockSpec((across, inner), lambda i, j, k: (j, k))
        if settings.transposed
        else pallas.BlockSpec((inner, across), lambda i, j, k: (k, j))
    )
    added = {"bias": pallas.BlockSpec((1, across), lambda i, j, k: (0, j)), "residual": tile}
    whole = jax.ShapeDtypeStruct((rows, width), x.dtype)
    count = 1 + len(weights) * save
    out, *before = pallas.pallas_call(
        functools.partial(
            _kernel, settings=settings, weights=len(weights), names=tuple(further), save=save, steps=size // inner
        ),
        grid=(rows // down, width // across, size // inner),
        in_specs=[
            pallas.BlockSpec((down, inner), lambda i, j, k: (i, k)),
            *[factor] * len(weights),
            *(added[name] for name in further),
        ],
        out_specs=[tile] * count,
        out_shape=[whole] * count,
        scratch_shapes=[tpu.VMEM((down, across), jnp.float32)] * len(weights),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=settings.platform == "cpu",
    )(x, *weights, *(a.reshape(1, -1) if name == "bias" else a for name, a in further.items()))
    return out, before


linear_pallas, gated_pallas = differentiable(run)

for _kernel_of, _name, _function in (
    (linear_kernel, "linear_pallas", linear_pallas),
    (gated_kernel, "gated_pallas", gated_pallas),
):
    _kernel_of.on("tpu", supports=_supports, prefers=where_measured, name=_name)(
        functools.partial(_function, platform="tpu")
    )
