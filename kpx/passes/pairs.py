"""A pattern's forward and backward pass, found together, become a kernel's: what one saves for the other is its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kpx.ir import cost
from kpx.ir import module as m
from kpx.ir.module import Value, ir
from kpx.jax_internals import lower_alone
from kpx.kernels import registry as kernels
from kpx.kernels.patterns import Pattern, hold
from kpx.passes.composites import Device
from kpx.passes.spread import Spread, lowered


def splice(
    module: ir.Module,
    device: Device,
    pattern: Pattern,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    numbers: dict[str, float],
    flops: float,
    spread: Spread | None = None,
) -> list[Value]:
    """Computes a pattern's result, and its gradients, by its kernels' own passes; gives them.

    Args:
        pattern: what the result is of (not its pattern with gradients).
        inputs: the arrays, the result's cotangent where gradients are wanted, and after it what is to be added to the
            first array's.
        outputs: the result, and the gradients by each array that is not constant.
        flops: of the products that are replaced.
        spread: how the arrays are split over devices.
    """
    structs = tuple((m.shape(v), m.dtype(v)) for v in inputs)
    # All is lowered before the module is touched: what a kernel raises leaves it as it was.
    texts = _lowered(pattern, structs, tuple(numbers.items()), device, spread)
    donors = [m.parse(text, module.context) for text in texts]
    cost.tell_flops(donors, flops if spread is None else flops / spread.parts)
    count = len(pattern.example)
    made = m.call(module, donors[0], "kpx.pair", inputs[:count], m.producer(outputs[0]))
    if len(donors) == 1:
        return made[:1]
    first = _first([m.producer(v) for v in outputs[1:]])
    return [made[0], *m.call(module, donors[1], "kpx.pair", [*made[1:], *inputs[count:]], first)]


@functools.lru_cache(maxsize=64)
def _lowered(pattern: Pattern, types: tuple, numbers: tuple, device: Device, spread: Spread | None) -> tuple[str, ...]:
    """The forward pass, `arrays -> result, saved`, and the backward, `saved, cotangents -> gradients`, as modules: layers
    that are alike share them. Without a cotangent, the forward pass alone, which saves nothing."""
    structs = [jax.ShapeDtypeStruct(*kind) for kind in types]
    count = len(pattern.example)
    carries = pattern.carries if len(structs) > count + 1 else None
    computed = functools.partial(carries or pattern.replace, **dict(numbers))
    differentiated = len(structs) > count
    pulls: list[Any] = []
    sequence = None if spread is None else spread.sequence
    options: dict[str, Any] = {"kind": device.kind, "selection": device.selection, "sequence": sequence}

    def forward(*arrays):
        with kernels.implemented_for(device.platform, differentiated=differentiated, **options):
            if not differentiated:
                return (computed(*arrays),)
            variable, function = hold(computed, pattern.constant, arrays)
            out, pull = jax.vjp(function, *variable)
        out = out[0] if carries else out
        saved, tree = jax.tree.flatten(pull)
        pulls.append((tree, out.shape))
        return out, *saved

    def backward(*given):
        with kernels.implemented_for(device.platform, **options):
            tree, shape = pulls[-1]
            cotangents = given[tree.num_leaves :]
            cotangent = jnp.broadcast_to(cotangents[0], shape)
            return jax.tree.unflatten(tree, given[: tree.num_leaves])(
                (cotangent, cotangents[1]) if carries else cotangent
            )

    if spread is not None:
        modules = lowered(forward, backward if differentiated else None, structs, pattern, device, spread)
    else:
        _, *saved = jax.eval_shape(forward, *structs[:count])
        passes = [(forward, structs[:count])]
        if differentiated:
            passes.append((backward, [*saved, *structs[count:]]))
        modules = [lower_alone(function, given, device.platform, device.kind) for function, given in passes]
    return tuple(m.text(module, large_constants=True) for module in modules)


def _first(ops: Sequence[Any]) -> Any:
    """The one of several ops of a block that comes first."""
    return functools.reduce(lambda a, b: a if a.operation.is_before_in_block(b.operation) else b, ops)
