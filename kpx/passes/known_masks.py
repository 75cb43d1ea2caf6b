"""Masks that no input decides: computed here, and written as what they are.

A model that is captured for one shape computes its causal mask from positions in ways without number, of which rewrites
know the short ones. Here such bools are evaluated; those that hide what comes later become one comparison of positions, and
those that hide nothing become true, which attention's patterns know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.module import Value, func, ir, stablehlo
from kpx.kernels import visible

_MOST = 1 << 26  # positions of a mask that is evaluated: 8192 by 8192
_LEAST = 4
_LOW = -1e4  # what is added to a score less than this hides it
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


def describe(module: ir.Module, values: Sequence[Value]) -> dict[Value, str]:
    """Of masks of a module's `main`, bools or numbers that are added, what kernels gain by knowing (see `kernels.visible`);
    those that inputs decide, or that are not alike for all batches and heads, are left out."""
    closed, found = _closed(module), {}
    bare = {v: _before_broadcast(v) for v in values if v in closed and _has_positions(v)}
    needed = list(dict.fromkeys(bare.values()))
    known = dict(zip(needed, map(_described, _evaluate(module, needed)), strict=True))
    for value, alone in bare.items():
        if known[alone]:
            found[value] = known[alone]
    return found


def _described(array: np.ndarray) -> str:
    masks = array.reshape(-1, *array.shape[-2:])
    if masks.dtype != bool:
        hidden = masks != 0
        if not (masks[hidden] < _LOW).all():
            return ""
        masks = ~hidden
    # What comes of a query that sees nothing depends on how it is hidden.
    return visible.describe(masks[0]) if (masks == masks[:1]).all() and masks[0].any(-1).all() else ""


def is_by_position(value: Value) -> bool:
    """Whether a mask is what `simplify` writes: true everywhere, or a comparison of positions."""
    if m.splat(value) is True:
        return True
    while isinstance(op := m.producer(value), (stablehlo.BroadcastInDimOp, stablehlo.ReshapeOp)):
        value = op.operands[0]
    return isinstance(op, stablehlo.CompareOp) and all(m.producer(v, stablehlo.IotaOp) is not None for v in op.operands)


def _closed(module: ir.Module) -> set[Value]:
    """The values of a module's `main` that no input decides."""
    closed: set[Value] = set()
    for op in m.entry_block(m.main(module)).operations:
        name = op.operation.name.removeprefix("stablehlo.")
        if name != op.operation.name and not name.startswith(_OPEN) and all(o in closed for o in op.operands):
            closed.update(op.results)
    return closed


def _masks(module: ir.Module) -> Iterator[Value]:
    """Bools over two dimensions of positions that are used by what inputs decide, and are not decided by any."""
    closed = _closed(module)
    for op in m.entry_block(m.main(module)).operations:
        for value in op.results:
            if value not in closed or not _is_mask(value) or is_by_position(value):
                continue
            if any(not len(u.results) or u.results[0] not in closed for u in m.users(value)):
                yield value


def _before_broadcast(value: Value) -> Value:
    """A mask before it is repeated for batches and heads."""
    while (op := m.producer(value, stablehlo.BroadcastInDimOp)) is not None:
        last = [m.rank(value) - 2, m.rank(value) - 1]
        if not _has_positions(op.operand) or m.integers(op.broadcast_dimensions)[-2:] != last:
            break
        if m.shape(op.operand)[-2:] != m.shape(value)[-2:]:
            break
        value = op.operand
    return value


def _is_mask(value: Value) -> bool:
    return m.element_type(value) == "i1" and _has_positions(value)


def _has_positions(value: Value) -> bool:
    return m.rank(value) >= 2 and min(m.shape(value)[-2:]) > 1 and _LEAST <= m.size(value) <= _MOST


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
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # of this process
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
