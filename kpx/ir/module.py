"""StableHLO modules: parsing, reading and building. The one file that imports the MLIR bindings.

A module held in Python keeps its context alive; an op taken from a module that was collected crashes
the process, so whoever holds an op holds its module.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import chlo, func, sdy, stablehlo
from jax.extend.mlir.passmanager import PassManager
from jax.interpreters import mlir as jax_mlir

from kpx.errors import KpxError, RewriteError

__all__ = ["chlo", "func", "ir", "sdy", "stablehlo"]

MESH = "mesh"
"""What JAX calls the mesh of a module that has one."""

Value: TypeAlias = ir.Value

_DTYPES: dict[str, np.dtype] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i1": np.dtype(np.bool_),
    **{f"i{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    **{f"ui{n}": np.dtype(f"uint{n}") for n in (8, 16, 32, 64)},
    "i4": np.dtype(ml_dtypes.int4),
    "ui4": np.dtype(ml_dtypes.uint4),
    "complex<f32>": np.dtype(np.complex64),
    "complex<f64>": np.dtype(np.complex128),
    "f8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "f8E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "f8E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "f8E8M0FNU": np.dtype(ml_dtypes.float8_e8m0fnu),
    "f4E2M1FN": np.dtype(ml_dtypes.float4_e2m1fn),
}
_ELEMENTS = {v: k for k, v in _DTYPES.items()}


# Modules and functions --------------------------------------------------------------------------


def parse(text: str | bytes, context: ir.Context | None = None) -> ir.Module:
    """A module from StableHLO text or bytecode, in JAX's context or a given one.

    Raises:
        KpxError: the text is not a valid module; MLIR's message is in it.
    """
    with context or jax_mlir.make_ir_context():
        try:
            return ir.Module.parse(text)
        except ir.MLIRError as error:
            raise KpxError(f"This is not a valid StableHLO module: {error}") from None


def load(contents: bytes) -> ir.Module:
    """A module from text, bytecode, or a StableHLO portable artifact.

    Raises:
        KpxError: it is none of them.
    """
    context = jax_mlir.make_ir_context()
    try:
        with context:
            return stablehlo.deserialize_portable_artifact(context, contents)
    except (ir.MLIRError, RuntimeError, ValueError):
        return parse(contents, context)


def bytecode(module: ir.Module) -> bytes:
    """A module as bytes that `load` reads."""
    stream = io.BytesIO()
    module.operation.write_bytecode(stream)
    return stream.getvalue()


def text(module: ir.Module, *, large_constants: bool = False) -> str:
    """The module as StableHLO text, constants over 32 elements elided unless asked for."""
    limit = None if large_constants else 32
    return module.operation.get_asm(large_elements_limit=limit, large_resource_limit=limit)


def functions(module: ir.Module) -> dict[str, Any]:
    """The module's functions by symbol name."""
    return {op.name.value: op for op in module.body.operations if isinstance(op, func.FuncOp)}


def main(module: ir.Module) -> Any:
    """The module's entry function.

    Raises:
        KpxError: it has no function named `main`.
    """
    try:
        return functions(module)["main"]
    except KeyError:
        names = ", ".join(functions(module)) or "none"
        raise KpxError(f"The module has no function `main` (its functions: {names}).") from None


def partitions(module: ir.Module) -> int:
    """Over how many devices a module is partitioned; 1 where it does not say."""
    attributes = module.operation.attributes
    return attributes["mhlo.num_partitions"].value if "mhlo.num_partitions" in attributes else 1


def mesh_axes(module: ir.Module) -> dict[str, int]:
    """The axes of the mesh that a module is partitioned over, by name; none where it has no mesh of that size."""
    for op in module.body.operations:
        if isinstance(op, sdy.MeshOp):
            axes = {axis.name: axis.size for axis in map(sdy.MeshAxisAttr, sdy.MeshAttr(op.mesh).axes)}
            if math.prod(axes.values()) == partitions(module):
                return axes
    return {}


def mesh_shape(module: ir.Module) -> tuple[int, ...]:
    """The sizes of `mesh_axes`, or one axis over all devices."""
    return tuple(mesh_axes(module).values()) or (partitions(module),)


def entry_block(function: Any) -> ir.Block:
    """The one block of a function."""
    return function.regions[0].blocks[0]


def source(op: Any) -> tuple[str, str]:
    """Where an op, or an argument, comes from: its path of names (`jit(f)/layer/dot_general`), and `file:line`; empty where unknown."""
    place = re.search(r'"([^"]+)":(\d+):\d+', str(op.location))
    return source_path(op), f"{place[1]}:{place[2]}" if place else ""


def source_path(op: Any) -> str:
    """The path of names that an op comes from (`jit(f)/layer/dot_general`); empty where unknown."""
    location = op.location
    return location.name_str if isinstance(location, ir.NameLoc) else ""


def walk(operation: Any) -> Iterator[Any]:
    """Every op below an operation, regions included, parents before children."""
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op
                if len(op.regions):
                    yield from walk(op)


def count_ops(module: ir.Module) -> int:
    """How many ops a module holds."""
    return sum(1 for _ in walk(module.operation))


def verify(module: ir.Module) -> None:
    """Raises `RewriteError` with MLIR's message where a module is not valid."""
    try:
        module.operation.verify()
    except ir.MLIRError as error:
        raise RewriteError(f"The module does not verify: {error}") from None


def run_passes(module: ir.Module, passes: str) -> None:
    """Runs MLIR's own passes (`inline`, `cse`, `symbol-dce`, ...) over a module, in place."""
    with module.context:
        PassManager.parse(f"builtin.module({passes})").run(module.operation)


def copy(module: ir.Module) -> ir.Module:
    """An independent copy, in the same context."""
    with module.context:
        clone = ir.Module.create(ir.Location.unknown())
        replace_body(clone, module)
        return clone


def replace_body(target: ir.Module, source: ir.Module) -> None:
    """Makes `target` hold copies of `source`'s ops and attributes; `source` stays as it is."""
    for op in reversed(list(target.body.operations)):
        op.operation.erase()
    for op in source.body.operations:
        target.body.append(op.operation.clone())
    for named in source.operation.attributes:
        target.operation.attributes[named] = source.operation.attributes[named]


def inline_calls(module: ir.Module) -> None:
    """Puts the body of every called function in place of the call, callees first.

    Functions that nothing refers to afterwards are removed.
    """
    table, visited = functions(module), set()

    def visit(function: Any) -> None:
        if function.name.value in visited:
            return
        visited.add(function.name.value)
        for op in list(walk(function)):
            if isinstance(op, func.CallOp):
                callee = table[op.callee.value]
                visit(callee)
                _inline(op, callee)

    with module.context:
        for function in table.values():
            visit(function)
    run_passes(module, "symbol-dce")


def _inline(call: Any, callee: Any) -> None:
    block = entry_block(callee)
    body = list(block.operations)
    new = dict(zip(block.arguments, call.operands, strict=True))
    path = source_path(call)
    with ir.InsertionPoint(call):
        for op in body[:-1]:
            copied = clone(op, new)
            _name_below(path, copied)
            new.update(zip(op.results, copied.results, strict=True))
    for result, returned in zip(call.results, body[-1].operands, strict=True):
        result.replace_all_uses_with(new[returned])
    call.operation.erase()


def _name_below(path: str, op: Any) -> None:
    """Puts a call's path before those of an op and of what is in it: names in a callee are its own."""
    if not path:
        return
    for inner in (op, *walk(op)):
        location = inner.location
        if isinstance(location, ir.NameLoc):
            inner.location = ir.Location.name(f"{path}/{location.name_str}", location.child_loc)
        else:
            inner.location = ir.Location.name(path, location)


def clone(op: Any, new: dict[Value, Value]) -> Any:
    """A copy of an op at the insertion point, its operands, and those in its regions, replaced."""
    copied = op.operation.clone()
    for inner in (copied, *walk(copied)):
        for i, operand in enumerate(inner.operands):
            if operand in new:
                inner.operands[i] = new[operand]
    return copied


def merge(target: ir.Module, source: ir.Module, name: str) -> str:
    """Moves `source`'s functions into `target` under fresh private names; gives the name of its `main`.

    Both are of one context. `source` is spent.
    """
    with target.context:
        return jax_mlir.merge_mlir_modules(target, name, source)


def call(target: ir.Module, source: ir.Module, name: str, operands: Sequence[Value], before: Any) -> list[Value]:
    """Moves `source`'s functions into `target`, calls its `main` before an op of it, and gives the results.

    A mesh that `source` has is taken to be `target`'s.
    """
    types = [r.type for r in entry_block(main(source)).operations[-1].operands]
    for op in list(source.body.operations):
        if op.operation.name == "sdy.mesh":
            op.operation.erase()
    symbol = merge(target, source, name)
    with target.context, ir.InsertionPoint(before.operation), before.operation.location:
        return list(func.CallOp(types, ir.FlatSymbolRefAttr.get(symbol), list(operands)).results)


# Reading ----------------------------------------------------------------------------------------


def producer(value: Value, kind: type | None = None) -> Any:
    """The op that makes a value, or None for a block argument or where it is not of a kind."""
    owner = value.owner
    if isinstance(owner, ir.Block):
        return None
    op = owner.opview
    return op if kind is None or isinstance(op, kind) else None


def users(value: Value) -> list[Any]:
    """The ops that use a value, one entry a use."""
    return [use.owner for use in value.uses]


def has_one_use(value: Value) -> bool:
    """Whether exactly one operand refers to a value."""
    uses = iter(value.uses)
    return next(uses, None) is not None and next(uses, None) is None


def tensor_type(value: Value) -> ir.RankedTensorType:
    """A value's type as a ranked tensor."""
    return ir.RankedTensorType(value.type)


def shape(value: Value) -> tuple[int, ...]:
    """A tensor's shape."""
    return tuple(tensor_type(value).shape)


def rank(value: Value) -> int:
    """A tensor's rank."""
    return tensor_type(value).rank


def element_type(value: Value) -> str:
    """A tensor's element type as MLIR writes it: `f32`, `bf16`, `i1`, `ui8`."""
    return str(tensor_type(value).element_type)


def dtype(value: Value) -> np.dtype | None:
    """A tensor's element type as a numpy dtype, or None where numpy has none."""
    return _DTYPES.get(element_type(value))


def element_dtype(kind: ir.RankedTensorType) -> np.dtype:
    """The numpy dtype of a tensor type's elements.

    Raises:
        KpxError: numpy has none for it.
    """
    try:
        return _DTYPES[str(kind.element_type)]
    except KeyError:
        raise KpxError(
            f"Arrays of {kind.element_type} cannot be held. Element types that can: {', '.join(_DTYPES)}."
        ) from None


def is_float(value: Value) -> bool:
    """Whether a tensor's elements are real floating-point numbers."""
    return element_type(value).startswith(("f", "bf"))


def is_integer(value: Value) -> bool:
    """Whether a tensor's elements are integers or bools."""
    return element_type(value).startswith(("i", "ui"))


def size(value: Value) -> int:
    """How many elements a tensor has."""
    return math.prod(tensor_type(value).shape)


def constant_value(value: Value, most: int = 1 << 18) -> np.ndarray | None:
    """The array behind a constant of at most `most` elements, or None."""
    op = producer(value, stablehlo.ConstantOp)
    if op is None or size(value) > most or (kind := dtype(value)) is None:
        return None
    attribute = _dense(op)
    if attribute is None:
        return None
    if attribute.is_splat:
        number = _splat_number(attribute)
        return None if number is None else np.full(shape(value), number, kind)
    try:
        return np.array(attribute).astype(kind, copy=False).reshape(shape(value))
    except (TypeError, ValueError):  # the bindings read no bf16, f8 or complex arrays
        return None


def splat(value: Value) -> bool | int | float | None:
    """The number that every element of a value is, seen through broadcasts and reshapes, or None."""
    op = producer(value)
    while isinstance(op, (stablehlo.BroadcastInDimOp, stablehlo.ReshapeOp)):
        op = producer(op.operands[0])
    if not isinstance(op, stablehlo.ConstantOp):
        return None
    attribute = _dense(op)
    if attribute is None:
        return None
    return _splat_number(attribute) if attribute.is_splat else None


def _dense(op: Any) -> Any:
    """A constant's elements, or None where the bindings cannot hold them (complex numbers, resources)."""
    try:
        attribute = op.value
    except TypeError:
        return None
    dense = (ir.DenseIntElementsAttr, ir.DenseFPElementsAttr, ir.DenseElementsAttr)
    return attribute if isinstance(attribute, dense) else None


def _splat_number(attribute: Any) -> bool | int | float | None:
    try:
        return attribute.get_splat_value().value
    except (AttributeError, TypeError, ValueError, RuntimeError):  # complex numbers have no Attribute
        return None


def integers(attribute: Any) -> list[int]:
    """A dense i64 array attribute, or 1-d elements, as a list."""
    if isinstance(attribute, ir.DenseI64ArrayAttr):
        return list(ir.DenseI64ArrayAttr(attribute))
    return [int(n) for n in ir.DenseIntElementsAttr(attribute)]


def dictionary(attribute: Any) -> dict[str, Any]:
    """A dictionary attribute as a dict."""
    return {named.name: named.attr for named in ir.DictAttr(attribute)}


def bools(attribute: Any) -> list[bool]:
    """A dense bool array attribute as a list."""
    return list(ir.DenseBoolArrayAttr(attribute))


def pairs(attribute: Any) -> list[tuple[int, int]]:
    """A dense Nx2 i64 attribute (the padding of a window) as a list of pairs."""
    return [(int(a), int(b)) for a, b in np.array(ir.DenseIntElementsAttr(attribute)).reshape(-1, 2)]


def same_value(a: Value, b: Value) -> bool:
    """Whether two operands are one SSA value, or equal splats of one type."""
    if a == b:
        return True
    # repr tells -0.0 from 0.0, and takes one NaN for another.
    return a.type == b.type and (n := splat(a)) is not None and repr(n) == repr(splat(b))


# Building ---------------------------------------------------------------------------------------


def add_argument(module: ir.Module, kind: ir.Type) -> Value:
    """One more argument of `main`, the last."""
    function = main(module)
    with module.context:
        value = entry_block(function).add_argument(kind, ir.Location.unknown())
        attributes = [*function.arg_attrs, ir.DictAttr.get({})] if "arg_attrs" in function.attributes else None
        inputs = [*function.type.inputs, kind]
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, function.type.results))
        if attributes is not None:
            function.arg_attrs = ir.ArrayAttr.get(attributes)
    return value


def add_results(module: ir.Module, values: Sequence[Value]) -> None:
    """More results of `main`, after its own."""
    function = main(module)
    block = entry_block(function)
    last = block.operations[len(block.operations) - 1]
    with module.context, ir.Location.unknown():
        with ir.InsertionPoint(last):
            returned = func.ReturnOp([*last.operands, *values])
        types = [v.type for v in returned.operands]
        last.operation.erase()
        function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(function.type.inputs, types))
        if "res_attrs" in function.attributes:
            del function.attributes["res_attrs"]


def tensor(dims: Sequence[int], element: Any) -> ir.RankedTensorType:
    """A tensor type from a shape and an element type (`f32`, a numpy dtype or an MLIR type)."""
    if isinstance(element, np.dtype):
        element = _ELEMENTS[element]
    if isinstance(element, str):
        element = ir.Type.parse(element)
    return ir.RankedTensorType.get(list(dims), element)


def i64_array(numbers: Sequence[int]) -> ir.Attribute:
    """A dense i64 array attribute."""
    return ir.DenseI64ArrayAttr.get([int(n) for n in numbers])


def pairs_attribute(numbers: Sequence[tuple[int, int]]) -> ir.Attribute:
    """A dense Nx2 i64 attribute (see `pairs`)."""
    return ir.DenseElementsAttr.get(np.array(numbers, np.int64).reshape(-1, 2))


def constant(array: np.ndarray) -> Value:
    """A constant op's value."""
    array = np.asarray(array)
    kind = tensor(array.shape, array.dtype)
    flat = array.reshape(-1)
    if array.size and (flat.view(f"V{array.itemsize}") == flat.view(f"V{array.itemsize}")[0]).all():
        return full(kind, flat[0])
    data = np.ascontiguousarray(array)
    if array.dtype.kind in "iu":
        return stablehlo.constant(ir.DenseElementsAttr.get(data, type=kind.element_type))
    return stablehlo.constant(ir.DenseElementsAttr.get(data))


def full(kind: ir.RankedTensorType, number: Any) -> Value:
    """A constant whose elements are all one number."""
    element = kind.element_type
    if isinstance(element, ir.IntegerType):
        number = int(number)  # the bindings take the bits of a large unsigned number as a signed one
        attribute = ir.IntegerAttr.get(element, number - 2**64 if number >= 2**63 else number)
    else:
        attribute = ir.FloatAttr.get(element, float(number))
    return stablehlo.constant(ir.DenseElementsAttr.get_splat(kind, attribute))


def like(value: Value, number: Any) -> Value:
    """A constant of a value's type whose elements are all one number."""
    return full(tensor_type(value), number)


def transpose(value: Value, permutation: Sequence[int]) -> Value:
    """`value` with its dimensions reordered; the value itself where the order stays."""
    if list(permutation) == list(range(rank(value))):
        return value
    return stablehlo.transpose(value, i64_array(permutation))


def reshape(value: Value, dims: Sequence[int]) -> Value:
    """`value` with another shape; the value itself where the shape stays."""
    if tuple(dims) == shape(value):
        return value
    return stablehlo.reshape(tensor(dims, tensor_type(value).element_type), value)


def broadcast(value: Value, dims: Sequence[int], along: Sequence[int]) -> Value:
    """`value` repeated to shape `dims`, its dimension `i` becoming `along[i]`."""
    return stablehlo.broadcast_in_dim(tensor(dims, tensor_type(value).element_type), value, i64_array(along))


def convert(value: Value, element: Any) -> Value:
    """`value` with another element type; the value itself where the type stays."""
    kind = tensor(shape(value), element)
    return value if kind == value.type else stablehlo.convert(kind, value)


def slice_(value: Value, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Value:
    """A static slice; the value itself where everything is taken."""
    if tuple(limits) == shape(value) and not any(starts) and all(s == 1 for s in strides):
        return value
    return stablehlo.slice(value, i64_array(starts), i64_array(limits), i64_array(strides))


def attributes(operation: Any) -> dict[str, Any]:
    """An op's attributes by name, to compare or to print; text for those that the bindings cannot hold (complex constants)."""
    stated = operation.attributes
    try:
        return {name: stated[name] for name in stated}
    except TypeError:  # to ask a NamedAttribute for such an attribute ends the process; its text can be had
        return {stated[i].name: str(stated[i]) for i in range(len(stated))}


def rebuild(op: Any, operands: Sequence[Value], types: Sequence[ir.Type] | None = None) -> Any:
    """A copy of an op with no regions, over other operands and with other result types."""
    operation = op.operation
    attributes = {name: operation.attributes[name] for name in operation.attributes}
    return ir.Operation.create(
        operation.name,
        results=list(types) if types is not None else [r.type for r in operation.results],
        operands=list(operands),
        attributes=attributes,
    )


def custom_call(target: str, result: ir.Type, operands: Sequence[Value], attributes: dict[str, ir.Attribute]) -> Value:
    """A call, free of effects, of a typed FFI handler over arrays that lie row by row."""

    def layout(rank: int) -> ir.Attribute:
        return ir.DenseElementsAttr.get(np.arange(rank)[::-1].copy(), type=ir.IndexType.get())

    return stablehlo.custom_call(
        [result],
        list(operands),
        target,
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 4),
        backend_config=ir.DictAttr.get(attributes),
        operand_layouts=ir.ArrayAttr.get([layout(rank(o)) for o in operands]),
        result_layouts=ir.ArrayAttr.get([layout(len(ir.RankedTensorType(result).shape))]),
    )
