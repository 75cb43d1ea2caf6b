"""Masks that no input decides: computed here, and written as what they are.

A model that is captured for one shape computes its causal mask from positions in ways without number, of which rewrites
know the short ones. Here such bools are evaluated; those that hide what comes later become one comparison of positions, and
those that hide nothing become true, which attention's patterns know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.module import Value, func, ir, stablehlo

_MOST = 1 << 26  # positions of a mask that is evaluated: 8192 by 8192
_LEAST = 4
# What gives another result each time, or has others take part.
_OPEN = ("rng", "custom_call", "composite", "while", "case", "if", "all_", "collective", "partition_id", "replica_id",
         "reduce_scatter", "infeed", "outfeed", "send", "recv", "optimization_barrier")  # fmt: skip


def simplify(module: ir.Module) -> int:
    """Rewrites the masks of a module's `main` that no input decides, in place; gives how many."""
    m.run_passes(module, "cse")  # layers have the same mask
    found = list(dict.fromkeys(map(_before_broadcast, _masks(module))))
    replaced = 0
    for value, seen in zip(found, _evaluate(module, found), strict=True):
        with module.context, ir.Location.unknown(), ir.InsertionPoint.after(m.producer(value).operation):
            if (new := _as_it_is(value, seen)) is not None:
                value.replace_all_uses_with(new)
                replaced += 1
    return replaced


def is_by_position(value: Value) -> bool:
    """Whether a mask is what `simplify` writes: true everywhere, or a comparison of positions."""
    if m.splat(value) is True:
        return True
    while isinstance(op := m.producer(value), (stablehlo.BroadcastInDimOp, stablehlo.ReshapeOp)):
        value = op.operands[0]
    return isinstance(op, stablehlo.CompareOp) and all(m.producer(v, stablehlo.IotaOp) is not None for v in op.operands)


def _masks(module: ir.Module) -> Iterator[Value]:
    """Bools over two dimensions of positions that are used by what inputs decide, and are not decided by any."""
    closed: set[Value] = set()
    block = m.entry_block(m.main(module))
    for op in block.operations:
        name = op.operation.name.removeprefix("stablehlo.")
        if name == op.operation.name or name.startswith(_OPEN):
            continue
        if all(operand in closed for operand in op.operands):
            closed.update(op.results)
    for op in block.operations:
        for value in op.results:
            if value not in closed or not _is_mask(value) or is_by_position(value):
                continue
            if any(not len(u.results) or u.results[0] not in closed for u in m.users(value)):
                yield value


def _before_broadcast(value: Value) -> Value:
    """A mask before it is repeated for batches and heads."""
    while (op := m.producer(value, stablehlo.BroadcastInDimOp)) is not None:
        last = [m.rank(value) - 2, m.rank(value) - 1]
        if not _is_mask(op.operand) or m.integers(op.broadcast_dimensions)[-2:] != last:
            break
        if m.shape(op.operand)[-2:] != m.shape(value)[-2:]:
            break
        value = op.operand
    return value


def _is_mask(value: Value) -> bool:
    shape = m.shape(value)
    return (
        m.element_type(value) == "i1"
        and m.rank(value) >= 2
        and min(shape[-2:]) > 1
        and _LEAST <= m.size(value) <= _MOST
    )


def _evaluate(module: ir.Module, values: list[Value]) -> list[np.ndarray]:
    if not values:
        return []
    with module.context, ir.Location.unknown():
        alone = ir.Module.create()
        with ir.InsertionPoint(alone.body):
            main = func.FuncOp("main", ir.FunctionType.get([], [v.type for v in values]))
        new: dict[Value, Value] = {}
        with ir.InsertionPoint(main.add_entry_block()):
            for op in _needed(module, values):
                new.update(zip(op.results, m.clone(op, new).results, strict=True))
            func.ReturnOp([new[v] for v in values])
    with jax.default_device(jax.devices("cpu")[0]):
        return [np.asarray(a) for a in call_module(alone)()]


def _needed(module: ir.Module, values: list[Value]) -> list[Any]:
    """The ops that values are made by, operands first."""
    wanted = set(values)
    for op in reversed(list(m.entry_block(m.main(module)).operations)):
        if any(result in wanted for result in op.results):
            wanted.update(op.operands)
    return [op for op in m.entry_block(m.main(module)).operations if any(r in wanted for r in op.results)]


def _as_it_is(value: Value, seen: np.ndarray) -> Value | None:
    """A mask as a constant or as a comparison of positions; None where it is neither."""
    if seen.all():
        return m.full(m.tensor_type(value), True)
    length, kv_length = seen.shape[-2:]
    if not np.array_equal(seen, np.broadcast_to(np.tri(length, kv_length, dtype=bool), seen.shape)):
        return None
    row, column = (stablehlo.iota(m.tensor((length, kv_length), "i32"), axis) for axis in (0, 1))
    direction, kind = stablehlo.ComparisonDirectionAttr.get("GE"), stablehlo.ComparisonTypeAttr.get("SIGNED")
    earlier = stablehlo.compare(row, column, direction, compare_type=kind)
    return m.broadcast(earlier, m.shape(value), [m.rank(value) - 2, m.rank(value) - 1])
