"""Prepare and run: what depends on weights alone is computed once, at load.

A weight is an argument of `main` that carries the attribute `kpx.weight`. `split` cuts the module in
two: `prepare` takes weights and gives arrays, `run` takes those arrays, the weights that it needs as
they are, and the inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, func, ir, stablehlo
from kpx.ir.rewrite import erase_dead, is_pure

WEIGHT = "kpx.weight"
COTANGENT = "kpx.cotangent"
"""What an argument carries that is a gradient of a result."""
LATE = "kpx.late"


def computed_late(value: Value) -> Value:
    """The value, marked as one that is computed at each call even where it depends on weights alone: what it is made of takes
    less memory."""
    value.owner.attributes[LATE] = ir.UnitAttr.get()
    return value


@dataclass(frozen=True)
class Split:
    """The two halves of a module.

    Attributes:
        prepare: the load-time half, or None where nothing is to be prepared.
        run: the half of every call. Its arguments: prepared arrays, kept weights, inputs.
        prepare_weights: which arguments of the original `main` `prepare` takes.
        kept_weights: which weights `run` takes as they are.
        inputs: which arguments of the original `main` are not weights.
    """

    prepare: ir.Module | None
    run: ir.Module
    prepare_weights: list[int]
    kept_weights: list[int]
    inputs: list[int]


def mark_weights(module: ir.Module, positions: set[int]) -> None:
    """Marks arguments of `main` as weights."""
    mark_arguments(module, positions, WEIGHT)


def mark_arguments(module: ir.Module, positions: set[int], name: str) -> None:
    """Gives arguments of `main` an attribute."""
    main = m.main(module)
    with module.context:
        mark = {name: ir.UnitAttr.get()}
        given = _argument_attributes(main)
        main.arg_attrs = _array([{**a, **mark} if i in positions else a for i, a in enumerate(given)])


def unmark(module: ir.Module) -> None:
    """Takes kpx's marks away, which mean nothing to a compiler."""
    main = m.main(module)
    with module.context:
        given = _argument_attributes(main)
        main.arg_attrs = _array([{n: v for n, v in a.items() if not n.startswith("kpx.")} for a in given])


def _array(dictionaries: list[dict[str, Any]]) -> ir.Attribute:
    return ir.ArrayAttr.get([ir.DictAttr.get(d) for d in dictionaries])


def _argument_attributes(main: Any) -> list[dict[str, Any]]:
    if "arg_attrs" in main.attributes:
        return [m.dictionary(a) for a in main.arg_attrs]
    return [{} for _ in main.arguments]


def weights(module: ir.Module) -> set[int]:
    """The positions of `main`'s arguments that are marked as weights."""
    return arguments_with(module, WEIGHT)


def arguments_with(module: ir.Module, mark: str) -> set[int]:
    """The positions of `main`'s arguments that carry an attribute."""
    return {i for i, a in enumerate(_argument_attributes(m.main(module))) if mark in a}


_MOST_OPS = 512  # that are looked at, to tell whether a value depends on weights alone


def depends_on_weights_alone(value: Value) -> bool:
    """Whether a value is computed from weights and constants, and so costs nothing at run time."""
    seen, left = {value}, [value] if not _is_weight(value) else []
    while left:
        owner = left.pop().owner
        if isinstance(owner, ir.Block):
            return False  # an argument that is not a weight
        op = owner.opview
        if isinstance(op, stablehlo.ConstantOp):
            continue
        # A reduction's region sees nothing but its own numbers.
        closed = isinstance(op, stablehlo.ReduceOp)
        if LATE in op.operation.attributes or not is_pure(op.operation) or (len(op.regions) and not closed):
            return False
        for operand in op.operands:
            if operand not in seen and not _is_weight(operand):
                left.append(operand)
            seen.add(operand)
        if len(seen) > _MOST_OPS:
            return False
    return True


def _is_weight(value: Value) -> bool:
    owner = value.owner
    if not isinstance(owner, ir.Block):
        return False
    parent = owner.owner.opview
    if not isinstance(parent, func.FuncOp) or parent.name.value != "main":
        return False
    attributes = parent.attributes
    return "arg_attrs" in attributes and WEIGHT in attributes["arg_attrs"][ir.BlockArgument(value).arg_number]


def split(module: ir.Module) -> Split:
    """Cuts a module with marked weights in two; the module itself stays as it is."""
    marked = weights(module)
    count = len(m.main(module).arguments)
    inputs = [i for i in range(count) if i not in marked]
    prepared = _prepared(m.entry_block(m.main(module)), marked)
    run, prepare = m.copy(module), None
    prepare_weights: list[int] = []
    if prepared:
        prepare = m.copy(module)
        _return_instead(prepare, prepared)
        prepare_weights = _used_arguments(prepare)
        _take_arguments(prepare, prepare_weights)
    _take_instead(run, prepared)
    kept_weights = [i for i in _used_arguments(run) if i in marked]
    _take_arguments(run, [*range(count, count + len(prepared)), *kept_weights, *inputs])
    for half in (prepare, run):
        if half is not None:
            unmark(half)
            m.verify(half)
    return Split(prepare, run, prepare_weights, kept_weights, inputs)


def _prepared(block: ir.Block, marked: set[int]) -> list[tuple[int, int]]:
    """The values to compute at load, as (op position in the block, result number)."""
    operations = list(block.operations)
    position = {r: (i, j) for i, op in enumerate(operations) for j, r in enumerate(op.results)}
    arguments = {a: i for i, a in enumerate(block.arguments)}
    fixed: set[Any] = {a for a, i in arguments.items() if i in marked}
    for op in operations:
        if is_pure(op.operation) and all(v in fixed for v in _read(op, block)):
            fixed.update(op.results)
    found: dict[Any, tuple[int, int]] = {}

    def need(value: Value) -> None:
        """A fixed value that the run half reads: taken from load time, or recomputed where that is free."""
        op = m.producer(value)
        if value not in fixed or op is None or value in found or isinstance(op, stablehlo.ConstantOp):
            return
        if _free_at_run_time(op):
            for operand in op.operands:
                need(operand)
        else:
            found[value] = position[value]

    for op in operations:
        if not (len(op.results) and all(r in fixed for r in op.results)):
            for value in _read(op, block):
                need(value)
    return list(found.values())


def _read(op: Any, block: ir.Block) -> list[Value]:
    """The values of a block that an op reads, those read in its regions included."""
    values = list(op.operands)
    for inner in m.walk(op):
        values += [v for v in inner.operands if _block_of(v) == block]
    return values


def _block_of(value: Value) -> ir.Block:
    owner = value.owner
    return owner if isinstance(owner, ir.Block) else owner.operation.block


def _free_at_run_time(op: Any) -> bool:
    """Ops whose result is larger than what they read, or the same bytes: XLA fuses them for nothing."""
    if isinstance(op, (stablehlo.BroadcastInDimOp, stablehlo.ReshapeOp, stablehlo.IotaOp)):
        return True
    if LATE in op.operation.attributes:
        return True
    if isinstance(op, stablehlo.ConvertOp):
        return _bits(op.result) >= _bits(op.operand)
    if isinstance(op, stablehlo.SliceOp):  # a row or a tap; a large part of a weight is better made once
        return m.size(op.result) <= 1 << 14
    return False


def _bits(value: Value) -> int:
    if (narrow := re.fullmatch(r"(?:u?i|f)([124])(?:E2M1FN)?", m.element_type(value))) is not None:
        return int(narrow[1])  # numpy holds each in a byte
    kind = m.dtype(value)
    return 8 * kind.itemsize if kind is not None else 64


def _return_instead(module: ir.Module, values: list[tuple[int, int]]) -> None:
    """Makes `main` return these values and nothing else."""
    main = m.main(module)
    operations = list(m.entry_block(main).operations)
    with module.context, ir.Location.unknown():
        with ir.InsertionPoint(operations[-1]):
            returned = func.ReturnOp([operations[i].results[j] for i, j in values])
        types = [v.type for v in returned.operands]
        operations[-1].operation.erase()
        main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(main.type.inputs, types))
        if "res_attrs" in main.attributes:
            del main.attributes["res_attrs"]
        # What is left unused belongs to the other half, loops and calls with effects included.
        for operation in reversed(operations[:-1]):
            if not any(next(iter(r.uses), None) is not None for r in operation.results):
                operation.operation.erase()
    erase_dead(module)


def _take_instead(module: ir.Module, values: list[tuple[int, int]]) -> None:
    """Makes `main` take these values as arguments, after its own, instead of computing them."""
    block = m.entry_block(m.main(module))
    operations = list(block.operations)
    with module.context:
        for i, j in values:
            value = operations[i].results[j]
            value.replace_all_uses_with(block.add_argument(value.type, ir.Location.unknown()))
    everything = range(len(block.arguments))
    _take_arguments(module, list(everything))
    erase_dead(module)


def _used_arguments(module: ir.Module) -> list[int]:
    arguments = m.entry_block(m.main(module)).arguments
    return [i for i, a in enumerate(arguments) if next(iter(a.uses), None) is not None]


def _take_arguments(module: ir.Module, order: list[int]) -> None:
    """Makes `main` take these of its arguments, in this order; the others must be unused."""
    main = m.main(module)
    block = m.entry_block(main)
    with module.context:
        attributes = _argument_attributes(main)
        old = list(block.arguments)
        attributes += [{}] * (len(old) - len(attributes))
        for i in order:
            old[i].replace_all_uses_with(block.add_argument(old[i].type, ir.Location.unknown()))
        for _ in old:
            block.erase_argument(0)
        main.arg_attrs = _array([attributes[i] for i in order])
        types = [a.type for a in block.arguments]
        main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(types, main.type.results))
