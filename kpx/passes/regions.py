"""Where a module passes over memory more often than it need: regions between products that no fusion pattern takes.

A compiler fuses what is elementwise, and stops where a sum over a dimension is used again along it: softmax reads its
input three times. What is between the same products is a region; its passes are counted by how many sums follow each
other, and what a kernel that reads every input once and writes every output once would save is told.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kpx.ir import cost
from kpx.ir import module as m
from kpx.ir.module import Value, ir
from kpx.ir.pattern import key

_MOST_OPS = 200  # of a region: more is no pattern for anyone
_SUMS = {"stablehlo.reduce"}
_FREE = {"stablehlo.constant", "stablehlo.iota"}
# What regions are made of: what XLA fuses, and sums.
_MEMBERS = {
    f"stablehlo.{name}"
    for name in (
        "abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "convert", "cosine", "divide", "exponential",
        "exponential_minus_one", "floor", "is_finite", "log", "log_plus_one", "logistic", "maximum", "minimum", "multiply",
        "negate", "not", "or", "power", "remainder", "round_nearest_afz", "round_nearest_even", "rsqrt", "select", "sign",
        "sine", "sqrt", "subtract", "tan", "tanh", "xor", "broadcast_in_dim", "reshape", "transpose", "slice", "concatenate",
        "pad", "reverse", "reduce", "constant", "iota",
    )
} | {"chlo.erf"}  # fmt: skip
_MOVES = {f"stablehlo.{name}" for name in ("reshape", "transpose", "slice", "concatenate", "pad", "reverse")}


@dataclass(frozen=True)
class Region:
    """Ops between products, operands first.

    Attributes:
        inputs: what it reads, `outputs` what others read of it.
        passes: how many sums follow each other, and one more.
        saved: bytes that one pass over memory would not move, each time that it runs.
        runs: how often it runs: more than once in a loop.
        shape: equal for regions that compute the same of the same types.
    """

    ops: tuple[Any, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    passes: int
    saved: float
    runs: int
    shape: str


def regions(module: ir.Module) -> list[Region]:
    """The regions of a module's `main`, its loops' bodies included, that pass over memory more than once."""
    found = []
    for block, runs in _blocks(m.main(module), 1):
        for ops in _connected(block):
            if len(ops) <= _MOST_OPS and (region := _region(ops, runs)) is not None:
                found.append(region)
    return found


def _blocks(parent: Any, runs: int) -> Iterator[tuple[Any, int]]:
    for region in parent.regions:
        for block in region.blocks:
            yield block, runs
            for op in block.operations:
                if op.operation.name == "stablehlo.while":
                    yield from _blocks(op, runs * max(cost.trip_count(op), 1))


def _connected(block: Any) -> Iterator[list[Any]]:
    """Members of regions that feed each other, with as many products behind them: nothing leaves one and comes back."""
    behind: dict[Value, int] = {}
    joined: dict[Value, Value] = {}

    def root(value: Value) -> Value:
        while joined[value] != value:
            value = joined[value]
        return value

    members = []
    for op in block.operations:
        level = max((behind.get(o, 0) for o in op.operands), default=0)
        member = op.operation.name in _MEMBERS and len(op.results) == 1
        for result in op.results:
            behind[result] = level if member else level + 1
        if not member or op.operation.name in _FREE:  # numbers join what uses them
            continue
        members.append(op)
        joined[op.results[0]] = op.results[0]
        for operand in op.operands:
            if operand in joined and behind[operand] == level:
                joined[root(op.results[0])] = root(operand)
    groups: dict[Value, list[Any]] = collections.defaultdict(list)
    for op in members:
        groups[root(op.results[0])].append(op)
    yield from groups.values()


def _trimmed(ops: list[Any]) -> list[Any]:
    """A region less what only moves what it reads, or what it gives."""
    while True:
        inside = {op.results[0] for op in ops}
        kept = [
            op
            for op in ops
            if op.operation.name not in _MOVES
            or (any(o in inside for o in op.operands) and any(_is_inside(u, inside) for u in m.users(op.results[0])))
        ]
        if len(kept) == len(ops):
            return ops
        ops = kept


def _is_free(op: Any) -> bool:
    """Whether an op is a number, or counts: an array of constants is read like any other."""
    return op.operation.name == "stablehlo.iota" or (
        op.operation.name == "stablehlo.constant" and m.splat(op.results[0]) is not None
    )


def _is_inside(user: Any, inside: set[Value]) -> bool:
    return len(user.results) > 0 and user.results[0] in inside


def _region(ops: list[Any], runs: int) -> Region | None:
    if not (ops := _trimmed(ops)):
        return None
    inside = {op.results[0] for op in ops}
    inputs: dict[Value, None] = {}
    constants: list[Any] = []
    for op in ops:
        for operand in op.operands:
            if operand in inside:
                continue
            maker = m.producer(operand)
            if maker is not None and _is_free(maker):
                constants.append(maker)
            else:
                inputs[operand] = None
    outputs = [r for r in inside if not all(_is_inside(u, inside) for u in m.users(r))]
    ordered = [op.results[0] for op in ops if op.results[0] in outputs]
    levels = _levels(ops)
    passes = max(levels.values()) + 1
    once = sum(map(_bytes, inputs)) + sum(map(_bytes, ordered))
    saved = _moved(ops, levels, set(inputs), set(ordered)) - once
    if passes < 2 or saved <= 0 or not ordered:
        return None
    body = [*dict.fromkeys(constants), *ops]
    return Region(tuple(body), tuple(inputs), tuple(ordered), passes, saved, runs, _shape(body, list(inputs), ordered))


def _levels(ops: Sequence[Any]) -> dict[Value, int]:
    """By value, how many sums that are used along what they sum over are behind it."""
    levels: dict[Value, int] = {}
    for op in ops:
        behind = [levels.get(o, 0) for o in op.operands]
        spread = op.operation.name == "stablehlo.broadcast_in_dim" and _is_sum(op.operands[0])
        levels[op.results[0]] = max(behind, default=0) + spread
    return levels


def _is_sum(value: Value) -> bool:
    """Whether a value is a sum, or is made of sums element by element."""
    for _ in range(16):
        op = m.producer(value)
        if op is None or op.operation.name not in _MEMBERS:
            return False
        if op.operation.name in _SUMS:
            return True
        larger = [o for o in op.operands if m.producer(o) is None or m.producer(o).operation.name not in _FREE]
        if op.operation.name == "stablehlo.broadcast_in_dim" or not larger:
            return False
        value = larger[0]
    return False


def _moved(ops: Sequence[Any], levels: dict[Value, int], inputs: set[Value], outputs: set[Value]) -> float:
    """Bytes, where each level is one loop that computes what it needs from the inputs, and sums are kept."""
    total = sum(map(_bytes, outputs))
    for level in range(max(levels.values()) + 1):
        wanted = [v for v in levels if levels[v] == level and (v in outputs or m.producer(v).operation.name in _SUMS)]
        read: set[Value] = set()
        stack = list(wanted)
        while stack:
            value = stack.pop()
            if value in read:
                continue
            read.add(value)
            op = m.producer(value)
            is_kept = value not in wanted and value in levels and op.operation.name in _SUMS
            if value in levels and not is_kept:
                stack += op.operands
        total += sum(_bytes(v) for v in read if v in inputs or (v in levels and v not in wanted and _kept(v)))
    return total


def _kept(value: Value) -> bool:
    return m.producer(value).operation.name in _SUMS


def _bytes(value: Value) -> float:
    return cost.type_bytes(value.type)


def _shape(ops: Sequence[Any], inputs: Sequence[Value], outputs: Sequence[Value]) -> str:
    numbers = {value: i for i, value in enumerate(inputs)}
    lines = [str(v.type) for v in inputs]
    for op in ops:
        lines.append(f"{key(op)}{[numbers.get(o, -1) for o in op.operands]}")
        numbers[op.results[0]] = len(numbers)
    lines.append(str([numbers[o] for o in outputs]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
