"""Loops: what no input decides is computed inside, where patterns look for it.

JAX computes a causal mask once, before a scan over layers, and carries it along. In the body it would be an array like any
other.
"""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.pattern import is_closed


def sink_constants(module: ir.Module) -> int:
    """Computes in a loop what it carries unchanged and no input decides, in place; gives how many values.

    Constants and counts, and what little is made of them: XLA computes it again for nothing.
    """
    sunk = 0
    with module.context, ir.Location.unknown():
        for op in m.walk(m.main(module)):  # an outer loop comes before those in it
            if isinstance(op, stablehlo.WhileOp):
                sunk += _sink(op)
    return sunk


def _sink(loop: Any) -> int:
    condition, body = (region.blocks[0] for region in loop.operation.regions)
    returned = list(body.operations[len(body.operations) - 1].operands)
    sunk = 0
    for i, init in enumerate(loop.operands):
        if returned[i] != body.arguments[i] or not is_closed(init):
            continue
        for block in (condition, body):
            if m.users(block.arguments[i]):
                with ir.InsertionPoint.at_block_begin(block):
                    block.arguments[i].replace_all_uses_with(copied(init, {}))
        sunk += 1
    return sunk


def copied(value: Value, new: dict[Value, Value]) -> Value:
    """A value computed again at the insertion point, from those that `new` has already, which it joins."""
    if value not in new:
        op = m.producer(value)
        for operand in op.operands:
            copied(operand, new)
        new.update(zip(op.results, m.clone(op, new).results, strict=True))
    return new[value]
