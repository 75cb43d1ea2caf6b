"""A plan is put into a module: sharding constraints where weights are used and made, so that no propagation decides otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.module import ir, sdy
from kpx.sharding.dims import Dims, Roles
from kpx.sharding.exchange import SCOPE
from kpx.sharding.graph import Graph, constrained
from kpx.sharding.layout import Layout, Sharding
from kpx.sharding.price import Pricing

_USERS = {"dot_general", "convolution", "ragged_dot", "gather", "scatter", "reduce"}


def constrain(module: ir.Module, roles: Roles, layout_on: Callable[[Dims], Layout], target: Target) -> int:
    """Puts a layout into a module with a mesh, in place; gives how many constraints that took.

    Weights are brought, by a constraint of their own, to where a product needs them, and gradients to where their weights
    lie; the products' results lie as activations do. What is between follows by propagation.
    """
    m.inline_calls(module)
    graph, operations, values = constrained(module)
    dims = Dims(graph, roles)
    layout = layout_on(dims)
    ways = Pricing(dims, target).ways(layout)
    wanted: list[tuple[Any, int, Sharding]] = []  # before an operation, how an operand lies; after one, a result
    for number, way in ways.items():
        op = graph.ops[number]
        if op.group or SCOPE in op.path or (op.kind not in _USERS and not any(v in dims.stored for v in op.operands)):
            continue
        assert op.rule is not None
        of_weights = any(v in dims.stored for v in (*op.operands, *op.results))
        if not of_weights:
            continue
        for value, needed in zip(op.operands, way.operands, strict=True):
            if value in dims.stored and graph.shapes[value] and layout.of(value) != needed:
                wanted.append((operations[number], value, needed))
        if op.kind in _USERS:
            for value, made in zip(op.results, way.results, strict=True):
                if graph.shapes[value]:
                    first = [made] if op.kind in ("gather", "scatter") and made != layout.of(value) else []
                    wanted += [(None, value, sharding) for sharding in [layout.of(value), *first]]
    # What is given back lies as it did: a compiler would choose for itself.
    for place, became in zip(roles.state, roles.becomes, strict=True):
        if graph.shapes[graph.returned[became]]:
            wanted.append((None, graph.returned[became], layout.of(graph.arguments[place])))
    done: dict[tuple[int, Sharding, bool], Any] = {}
    with module.context, ir.Location.unknown():
        for op, value, sharding in wanted:
            _put(op, values[value], sharding, done, (value, sharding, op is None))
    return len(done)


def _before_transpose(graph: Graph, operations: list[Any], number: int, value: int, needed: Sharding) -> tuple:
    """Where an operand is brought: one that is transposed first is brought before, once for all its users."""
    producer = graph.producers[value]
    if producer >= 0 and graph.ops[producer].kind == "transpose":
        permutation = m.integers(operations[producer].permutation)
        before = list(needed)
        for to, of in enumerate(permutation):
            before[of] = needed[to]
        return operations[producer], graph.ops[producer].operands[0], tuple(before)
    return operations[number], value, needed


def _put(op: Any, value: m.Value, sharding: Sharding, done: dict, key: tuple) -> None:
    """A constraint on a value: of an operation's operand alone, or where `op` is None of whatever uses it."""
    if key in done:
        if op is not None:
            _replace_in(op, value, done[key])
        return
    producer = m.producer(value)
    users = m.users(value) if op is None else [op]
    block = users[0].operation.block if producer is None else producer.operation.block
    if op is not None and block != op.operation.block:
        place = ir.InsertionPoint(op)
    elif producer is None:
        place = ir.InsertionPoint.at_block_begin(block)
    else:
        following = list(block.operations)
        at = next(i for i, other in enumerate(following) if other.operation == producer.operation) + 1
        place = ir.InsertionPoint(following[at])
    with place:
        made = sdy.ShardingConstraintOp(value, _attribute(sharding)).result
    for user in users:
        _replace_in(user, value, made)
    if op is None or block == op.operation.block:
        done[key] = made


def _replace_in(op: Any, old: m.Value, new: m.Value) -> None:
    for place, operand in enumerate(op.operation.operands):
        if operand == old:
            op.operation.operands[place] = new


def _attribute(sharding: Sharding) -> Any:
    dims = [sdy.DimensionShardingAttr.get([sdy.AxisRefAttr.get(a) for a in axes], True) for axes in sharding]
    return sdy.TensorShardingAttr.get(m.MESH, dims)
