"""Layers that are alike run as a loop over their weights, stacked, or take their places again.

A loop makes the time to compile and the executable's size the same for any number of layers. It must not slow the run: a
layer's weights may be read where they lie in the stack, by calls that take the stack and the layer's number
(kernels/onednn.cc); what XLA reads itself it copies first, which is left alone where it is large. Nor may what one layer
gives the next be copied, so a turn of the loop has two layers: each writes where the other has read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kpx.ir import module as m
from kpx.ir.cost import type_bytes
from kpx.ir.module import Value, func, ir, stablehlo
from kpx.ir.split import Split, split, unmark
from kpx.passes.layers import Stack

LOOP = "a loop"
"""What is said of layers that have become one."""

_TURN = 2  # layers of a turn
_MOST_COPIED = 1 << 16  # bytes of one array of a layer that XLA may copy
_CALLS = ("kpx_onednn_matmul", "kpx_onednn_quantized", "kpx_onednn_conv")


def put_back(module: ir.Module, stacks: Sequence[Stack], layers: str) -> dict[str, str]:
    """Puts a loop, or the layers, in place of the calls that stand for them, in place; says for each stack which and why.

    Args:
        layers: `auto` or `loop` (see `kpx.Config`).
    """
    told = {}
    for stack in stacks:
        with module.context, ir.Location.unknown():
            calls = [op for op in m.entry_block(m.main(module)).operations if _is_call(op, stack)]
            halves = split(stack.layer)
            why = _against(stack, calls, halves, layers)
            if why:
                _unroll(module, stack, calls)
            else:
                _roll(module, stack, calls, halves)
        told[f"{stack.count} layers of {stack.ops} operations"] = f"unrolled: {why}" if why else LOOP
    if stacks:
        m.inline_calls(module)
    return told


def _is_call(op: Any, stack: Stack) -> bool:
    return isinstance(op, stablehlo.CustomCallOp) and op.call_target_name.value == stack.name


def _against(stack: Stack, calls: Sequence[Any], halves: Split, layers: str) -> str:
    """Why layers are not to be a loop, or ""."""
    for before, after in itertools.pairwise(calls):
        if list(before.results)[: stack.carried] != list(after.operands)[: stack.carried]:
            return "what is between them has changed"
    if len(calls) != stack.count:
        return "some are gone"
    if layers == "loop":
        return ""
    weights = m.entry_block(m.main(halves.run)).arguments[: len(_own(stack, halves))]
    sizes = [type_bytes(v.type) for v, own in zip(weights, _own(stack, halves), strict=True) if own and not _readers(v)]
    if max(sizes, default=0) > _MOST_COPIED:
        return f"XLA would copy {sum(sizes) / 1e6:.1f} MB of weights in each"
    return ""


def _own(stack: Stack, halves: Split) -> list[bool]:
    """Of each array that a layer's call reads beside its inputs, whether it is another for each layer."""
    shared = stack.carried + stack.shared
    return [*_depend(halves, shared), *(i >= shared for i in halves.kept_weights)]


def _depend(halves: Split, shared: int) -> list[bool]:
    """Of each prepared array, whether it depends on what is each layer's own."""
    if halves.prepare is None:
        return []
    block = m.entry_block(m.main(halves.prepare))
    own = {v for v, i in zip(block.arguments, halves.prepare_weights, strict=True) if i >= shared}
    for op in block.operations:
        if any(v in own for inner in (op, *m.walk(op)) for v in inner.operands):
            own.update(op.results)
    *_, returned = block.operations
    return [v in own for v in returned.operands]


def _readers(weights: Value) -> list[Any]:
    """The calls that read a layer's weights where they lie in a stack; none where anything else reads them."""
    calls = m.users(weights)
    takes = [isinstance(c.opview, stablehlo.CustomCallOp) and c.opview.call_target_name.value in _CALLS
             and list(c.operands).index(weights) == 1 for c in calls]  # fmt: skip
    return calls if all(takes) else []


# Building ---------------------------------------------------------------------------------------


def _unroll(module: ir.Module, stack: Stack, calls: Sequence[Any]) -> None:
    """Has each call be the layer's ops again, by its own names."""
    unmark(stack.layer)
    name = m.merge(module, stack.layer, "layer")
    function = m.functions(module)[name]
    *ops, returned = m.entry_block(function).operations
    for k, call in enumerate(calls):
        new = dict(zip(m.entry_block(function).arguments, call.operands, strict=True))
        with ir.InsertionPoint(call):
            for op in ops:
                copied = m.clone(op, new)
                _rename(copied, stack.paths[1], stack.paths[k])
                new.update(zip(op.results, copied.results, strict=True))
        _replace(call, [new[v] for v in returned.operands])


def _rename(op: Any, old: str, new: str) -> None:
    """Puts one path of names in another's place, in an op and what is in it."""
    for inner in (op, *m.walk(op)):
        path = m.source_path(inner)
        if old != new and (path == old or path.startswith(old + "/")):
            inner.location = ir.Location.name(new + path[len(old) :], inner.location.child_loc)


def _replace(call: Any, values: Sequence[Value]) -> None:
    for old, new in zip(call.results, values, strict=True):
        old.replace_all_uses_with(new)
    call.operation.erase()


def _called(name: str, types: Sequence[ir.Type], operands: Sequence[Value]) -> list[Value]:
    return list(func.CallOp(list(types), ir.FlatSymbolRefAttr.get(name), list(operands)).results)


def _roll(module: ir.Module, stack: Stack, calls: Sequence[Any], halves: Split) -> None:
    """Has a loop compute the layers, over their weights, which are stacked at load."""
    last, own = calls[-1], _own(stack, halves)
    weights = list(m.entry_block(m.main(halves.run)).arguments)[: len(own)]
    taken = [each and bool(_readers(v)) for each, v in zip(own, weights, strict=True)]
    with ir.InsertionPoint(last):
        by_layer = zip(*_by_layer(module, calls, halves), strict=True)
        arrays = [_stacked(v, own[n], taken[n]) for n, v in enumerate(by_layer)]
        _take_stacks(halves.run, taken, arrays)
        for op in m.entry_block(m.main(halves.run)).operations:
            _rename(op, stack.paths[1], f"{stack.paths[0]}..{stack.paths[-1].rpartition('/')[2]}")
        layer = _Layer(m.merge(module, halves.run, "layer"), [r.type for r in last.results], own, taken, stack.carried)
        given = [calls[0].operands[i] for i in halves.inputs]
        carried, shared = given[: stack.carried], given[stack.carried :]
        turns = (stack.count - (len(last.results) > stack.carried)) // _TURN
        values = _loop(layer, turns, carried, arrays, shared)
        for k in range(turns * _TURN, stack.count):
            values = layer(_number(k), values[: stack.carried], arrays, shared)
    _replace(last, values)
    for call in reversed(calls[:-1]):
        call.operation.erase()


def _by_layer(module: ir.Module, calls: Sequence[Any], halves: Split) -> list[list[Value]]:
    """What each layer reads beside its inputs: prepared arrays, and weights as they are."""
    prepare, types = "", []
    if halves.prepare is not None:
        types = list(m.main(halves.prepare).type.results)
        prepare = m.merge(module, halves.prepare, "prepare")
    found = []
    for call in calls:
        prepared = _called(prepare, types, [call.operands[i] for i in halves.prepare_weights]) if prepare else []
        found.append([*prepared, *(call.operands[i] for i in halves.kept_weights)])
    return found


def _stacked(values: Sequence[Value], own: bool, taken: bool) -> Value:
    """Each layer's array, behind each other; the one that there is where layers share it."""
    if not own:
        return values[0]
    rows = values if taken else [m.reshape(v, [1, *m.shape(v)]) for v in values]
    return stablehlo.concatenate(list(rows), 0)


def _take_stacks(run: ir.Module, taken: Sequence[bool], arrays: Sequence[Value]) -> None:
    """Has a layer take its number last, and its calls read their weights where they lie in a stack, in place."""
    main = m.main(run)
    block = m.entry_block(main)
    number = block.add_argument(m.tensor([], "i32"), ir.Location.unknown())
    for n, (argument, array) in enumerate(zip(block.arguments, arrays, strict=False)):
        if not taken[n]:
            continue
        stride = m.i64_array([m.size(argument)])
        argument.set_type(array.type)
        for user in _readers(argument):
            call = user.opview
            config = {**m.dictionary(call.backend_config), "stride": stride}
            with ir.InsertionPoint(call), call.location:
                name, kind = call.call_target_name.value, call.results[0].type
                made = m.custom_call(name, kind, [*call.operands, number], config)
            _replace(call, [made])
    types = ir.FunctionType.get([a.type for a in block.arguments], main.type.results)
    main.attributes["function_type"] = ir.TypeAttr.get(types)
    if "arg_attrs" in main.attributes:
        del main.attributes["arg_attrs"]


@dataclass(frozen=True)
class _Layer:
    """Builds a call of a layer by its number."""

    name: str
    results: list[ir.Type]
    own: list[bool]
    taken: list[bool]
    carried: int

    def __call__(
        self, number: Value, carried: Sequence[Value], arrays: Sequence[Value], shared: Sequence[Value]
    ) -> list[Value]:
        read = [
            _row(array, number) if own and not taken else array
            for array, own, taken in zip(arrays, self.own, self.taken, strict=True)
        ]
        return _called(self.name, self.results, [*read, *carried, *shared, number])


def _row(array: Value, number: Value) -> Value:
    """The array of a layer in a stack."""
    shape = m.shape(array)[1:]
    starts = [number, *[_number(0)] * len(shape)]
    return m.reshape(stablehlo.dynamic_slice(array, starts, m.i64_array([1, *shape])), shape)


def _number(n: int) -> Value:
    return m.full(m.tensor([], "i32"), n)


def _loop(
    layer: _Layer, turns: int, carried: Sequence[Value], arrays: Sequence[Value], shared: Sequence[Value]
) -> list[Value]:
    """What is carried after so many turns."""
    state = [_number(0), *carried, *arrays, *shared]
    types = [v.type for v in state]
    loop = stablehlo.WhileOp(types, state)
    nowhere = [ir.Location.unknown()] * len(types)
    condition, body = (region.blocks.append(*types, arg_locs=nowhere) for region in loop.regions)
    with ir.InsertionPoint(condition):
        end = _number(turns)
        below = stablehlo.ComparisonDirectionAttr.get("LT")
        stablehlo.return_([stablehlo.compare(condition.arguments[0], end, below)])
    with ir.InsertionPoint(body):
        number, *rest = body.arguments
        values, fixed = rest[: len(carried)], rest[len(carried) :]
        arguments = fixed[: len(arrays)], fixed[len(arrays) :]
        first = stablehlo.multiply(number, _number(_TURN))
        for step in range(_TURN):
            at = stablehlo.add(first, _number(step)) if step else first
            values = layer(at, values, *arguments)[: len(carried)]
        stablehlo.return_([stablehlo.add(number, _number(1)), *values, *fixed])
    return list(loop.results)[1 : 1 + len(carried)]
