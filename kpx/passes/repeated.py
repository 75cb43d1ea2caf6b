"""Keys and values that are repeated for the heads of queries that share them: kernels take, and read, each once."""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, func, ir, stablehlo
from kpx.ir.pattern import outline
from kpx.passes import composites

_ATTENTION = "kpx.attention"


def unrepeated(value: Value) -> tuple[Value, list[Any]] | None:
    """What an array is made of by repeating each part of one of its dimensions, and the ops that repeat it, or None."""
    reshape = m.producer(value, stablehlo.ReshapeOp)
    if reshape is None or m.rank(reshape.operand) != m.rank(value) + 1:
        return None
    wide, shape = m.shape(reshape.operand), m.shape(value)
    merged = [n for n in range(1, len(wide)) if (*wide[: n - 1], wide[n - 1] * wide[n], *wide[n + 1 :]) == shape]
    for new in merged:
        before, ops = reshape.operand, [reshape]
        rest = [d for d in range(len(wide)) if d != new]
        narrow, once = tuple(wide[d] for d in rest), tuple(1 if d == new else wide[d] for d in range(len(wide)))
        while (op := m.producer(before)) is not None and m.shape(before) != narrow:
            shapes = m.shape(op.operands[0]) if len(op.operands) == 1 else None
            if isinstance(op, stablehlo.BroadcastInDimOp):
                fits = m.integers(op.broadcast_dimensions) == (rest if shapes == narrow else [*range(len(wide))])
            else:
                fits = isinstance(op, stablehlo.ReshapeOp) and m.shape(before) == once
            if not fits or shapes not in (narrow, once):
                break
            before = op.operands[0]
            ops.insert(0, op)
        if m.shape(before) == narrow:
            return before, ops
    return None


def take_once(module: ir.Module) -> int:
    """Gives attention that is held as composites keys and values before they are repeated, in place; gives how many."""
    count = 0
    for op in list(composites.composites(module)):
        if op.operation.attributes["name"].value != _ATTENTION:
            continue
        if (found := both_unrepeated(*list(op.operands)[1:3])) is None:
            continue
        inputs = [op.operands[0], *found[0], *list(op.operands)[3:]]
        symbol = op.operation.attributes["decomposition"].value
        with module.context, ir.InsertionPoint(op), op.location:
            call = func.CallOp([r.type for r in op.results], ir.FlatSymbolRefAttr.get(symbol), list(op.operands))
            outlined = outline(module, _ATTENTION, inputs, list(call.results), [*found[1], call])
            attributes = {name: op.operation.attributes[name] for name in ("name", "version", "composite_attributes")}
            made = stablehlo.CompositeOp(
                [r.type for r in op.results],
                inputs,
                name=attributes["name"],
                version=attributes["version"],
                composite_attributes=attributes["composite_attributes"],
                decomposition=ir.FlatSymbolRefAttr.get(outlined),
            )
        for old, new in zip(op.results, made.results, strict=True):
            old.replace_all_uses_with(new)
        call.operation.erase()
        op.operation.erase()
        count += 1
    return count


def both_unrepeated(key: Value, value: Value) -> tuple[list[Value], list[Any]] | None:
    """Keys and values before they are repeated, both as often and along the same dimension, and the ops that repeat them."""
    keys, values = unrepeated(key), unrepeated(value)
    if keys is None or values is None or m.shape(keys[0])[:-1] != m.shape(values[0])[:-1]:
        return None
    return [keys[0], values[0]], list(dict.fromkeys([*keys[1], *values[1]]))
