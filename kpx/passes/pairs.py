"""A pattern's forward and backward pass, found together, become a kernel's: what one saves for the other is its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from kpx.ir import module as m
from kpx.ir.module import Value, func, ir
from kpx.jax_internals import lower_alone
from kpx.kernels import registry as kernels
from kpx.kernels.patterns import Pattern, hold
from kpx.passes.composites import Device


def splice(
    module: ir.Module,
    device: Device,
    pattern: Pattern,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    numbers: dict[str, float],
) -> list[Value]:
    """Computes a pattern's result, and its gradients, by its kernels' own passes; gives them.

    Args:
        pattern: what the result is of (not its pattern with gradients).
        inputs: the arrays, and the result's cotangent.
        outputs: the result, and the gradients by each array that is not constant.
    """
    arrays, cotangent = list(inputs[:-1]), inputs[-1]
    structs = [jax.ShapeDtypeStruct(m.shape(v), m.dtype(v)) for v in inputs]
    pulls: list[Any] = []

    def forward(*arrays):
        with kernels.implemented_for(device.platform):
            variable, function = hold(functools.partial(pattern.replace, **numbers), pattern.constant, arrays)
            out, pull = jax.vjp(function, *variable)
        saved, tree = jax.tree.flatten(pull)
        pulls.append(tree)
        return out, *saved

    def backward(*given):
        with kernels.implemented_for(device.platform):
            return jax.tree.unflatten(pulls[-1], given[:-1])(given[-1])

    _, *saved = jax.eval_shape(forward, *structs[:-1])
    # Both are lowered before the module is touched: what a kernel raises leaves it as it was.
    donors = [
        m.parse(
            m.text(lower_alone(function, given, device.platform, device.kind), large_constants=True), module.context
        )
        for function, given in ((forward, structs[:-1]), (backward, [*saved, structs[-1]]))
    ]
    made = _call(module, donors[0], arrays, m.producer(outputs[0]))
    first = _first([m.producer(v) for v in outputs[1:]])
    return [made[0], *_call(module, donors[1], [*made[1:], cotangent], first)]


def _call(module: ir.Module, donor: ir.Module, operands: Sequence[Value], before: Any) -> list[Value]:
    types = [r.type for r in m.entry_block(m.main(donor)).operations[-1].operands]
    symbol = m.merge(module, donor, "kpx.pair")
    with module.context, ir.InsertionPoint(before.operation), before.operation.location:
        call = func.CallOp(types, ir.FlatSymbolRefAttr.get(symbol), list(operands))
    return list(call.results)


def _first(ops: Sequence[Any]) -> Any:
    """The one of several ops of a block that comes first."""
    wanted = {op.results[0] for op in ops}
    parent = ops[0].operation.parent
    return next(op for op in m.walk(parent) if len(op.results) and op.results[0] in wanted)
