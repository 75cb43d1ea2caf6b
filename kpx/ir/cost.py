"""FLOPs and bytes of a module, loops counted as often as they run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import ir, producer, splat, stablehlo

_MOVES = {
    "constant", "reshape", "transpose", "broadcast_in_dim", "slice", "concatenate", "pad", "convert", "iota",
    "gather", "dynamic_slice", "dynamic_update_slice", "reverse", "return", "bitcast_convert", "copy",
    "get_tuple_element", "tuple", "optimization_barrier", "case", "if", "while",
}  # fmt: skip
_READS_MEMORY = (
    stablehlo.DotGeneralOp, stablehlo.ConvolutionOp, stablehlo.ReduceOp, stablehlo.GatherOp,
    stablehlo.ScatterOp, stablehlo.SortOp, stablehlo.CustomCallOp, stablehlo.TransposeOp, stablehlo.ReduceWindowOp,
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a module computes and moves.

    Attributes:
        flops: multiplications and additions counted apart; one for each other elementwise result.
        bytes: arguments, results, and the operands and results of products, convolutions, reductions,
            gathers and transposes. Elementwise ops are taken to be fused into those.
    """

    flops: float
    bytes: float

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The roofline: the longer of computing at peak and moving at full bandwidth."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)


def cost(module: ir.Module) -> Cost:
    """The cost of a module's `main`. A loop whose trip count is not constant counts once."""
    main = m.main(module)
    flops, moved = _region(main, m.functions(module))
    for t in [*main.type.inputs, *main.type.results]:
        moved += type_bytes(t)
    return Cost(flops, moved)


_PRODUCTS = (stablehlo.DotGeneralOp, stablehlo.ConvolutionOp)
_RAGGED = "chlo.ragged_dot"

REPLACED_FLOPS = "kpx_product_flops"
"""A frontend attribute of a kernel's call, which compilers keep: the operations of the products that it replaced."""


def product_flops(ops: Iterable[Any]) -> float:
    """The operations of matrix products and convolutions among ops."""
    return sum((_flops(op, "") for op in ops if isinstance(op, _PRODUCTS) or op.operation.name == _RAGGED), 0.0)


def tell_flops(modules: Sequence[ir.Module], flops: float) -> None:
    """Has the calls of kernels in modules tell that together, with the products beside them, they are so many operations.

    What a kernel computes no compiler can see; what it replaced is what a model is credited with.
    """
    ops = [op for module in modules for op in m.walk(module.operation)]
    calls = [op for op in ops if isinstance(op, stablehlo.CustomCallOp)]
    share = max(flops - product_flops(ops), 0.0) / max(len(calls), 1)
    for call in calls:
        with call.operation.context:
            told = ir.DictAttr.get({REPLACED_FLOPS: ir.StringAttr.get(f"{share:.0f}")})
        call.operation.attributes["mhlo.frontend_attributes"] = told


def _region(parent: Any, functions: dict[str, Any]) -> tuple[float, float]:
    flops = moved = 0.0
    for region in parent.regions:
        for block in region.blocks:
            for op in block.operations:
                f, b = _op(op, functions)
                flops, moved = flops + f, moved + b
    return flops, moved


def _op(op: Any, functions: dict[str, Any]) -> tuple[float, float]:
    name = op.operation.name
    kind = name.rpartition(".")[2]
    if name == "func.call":
        return _region(functions[op.callee.value], functions)
    if name == "stablehlo.composite":
        return _region(functions[op.operation.attributes["decomposition"].value], functions)
    if kind in ("while", "case", "if", "manual_computation"):
        flops, moved = _region(op, functions)
        trips = trip_count(op) if kind == "while" else 1
        return flops * trips, moved * trips
    moved = 0.0
    if isinstance(op, _READS_MEMORY):
        moved = sum(type_bytes(v.type) for v in [*op.operands, *op.results]) - _not_read(op)
    return _flops(op, kind), moved


def _flops(op: Any, kind: str) -> float:
    if op.operation.name == _RAGGED:  # each row once, with one group's matrix
        x, other = (m.shape(v) for v in op.operands[:2])
        return 2.0 * math.prod(x) * (other[-1] if len(other) == 2 else other[1] * other[2] // x[1])
    if isinstance(op, stablehlo.DotGeneralOp):
        contracted = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).lhs_contracting_dimensions
        length = 1
        for d in contracted:
            length *= m.shape(op.lhs)[d]
        return 2.0 * m.size(op.result) * length
    if isinstance(op, stablehlo.CustomCallOp) and "mhlo.frontend_attributes" in op.attributes:
        told = m.dictionary(op.attributes["mhlo.frontend_attributes"]).get(REPLACED_FLOPS)
        return float(told.value) if told is not None else 0.0
    if isinstance(op, stablehlo.CustomCallOp) and op.call_target_name.value.startswith("kpx_matmul"):
        return 2.0 * math.prod(m.integers(m.dictionary(op.backend_config)["sizes"]))
    if isinstance(op, stablehlo.CustomCallOp) and (found := _onednn_flops(op)) is not None:
        return found
    if isinstance(op, stablehlo.ConvolutionOp):
        numbers = stablehlo.ConvDimensionNumbers(op.dimension_numbers)
        outputs = m.shape(op.rhs)[numbers.kernel_output_feature_dimension]
        return 2.0 * m.size(op.result) * m.size(op.rhs) / max(outputs, 1)
    if isinstance(op, (stablehlo.ReduceOp, stablehlo.ReduceWindowOp)):
        window = 1
        if isinstance(op, stablehlo.ReduceWindowOp):
            for n in m.integers(op.window_dimensions):
                window *= n
            return float(m.size(op.results[0]) * window)
        return float(sum(m.size(v) for v in op.inputs))
    if kind in _MOVES or not len(op.results):
        return 0.0
    return float(m.size(op.results[0])) if isinstance(op.results[0].type, ir.RankedTensorType) else 0.0


def _onednn_config(op: Any) -> dict[str, Any]:
    given = op.operation.attributes
    return m.dictionary(given["mhlo.backend_config" if "mhlo.backend_config" in given else "backend_config"])


def _not_read(op: Any) -> float:
    """The bytes of a stack of weights that a call does not read: those of other layers."""
    if not isinstance(op, stablehlo.CustomCallOp) or not op.call_target_name.value.startswith("kpx_onednn"):
        return 0.0
    stride = _onednn_config(op).get("stride")
    return 0.0 if stride is None else type_bytes(op.operands[1].type) - m.integers(stride)[0]


def _onednn_flops(op: Any) -> float | None:
    """The operations of a call of oneDNN's products, by the attributes that kernels/onednn.cc describes."""
    target = op.call_target_name.value
    if not target.startswith("kpx_onednn"):
        return None
    if target == "kpx_onednn_pack":
        return 0.0
    sizes = m.integers(_onednn_config(op)["sizes"])
    if target in ("kpx_onednn_matmul", "kpx_onednn_quantized"):
        rows, columns, inner, _ = sizes
        return 2.0 * rows * columns * inner
    if target == "kpx_onednn_conv":
        batch, _, _, channels, height, width, out, height_out, width_out, *_, groups = sizes
        return 2.0 * batch * height_out * width_out * out * height * width * channels / groups
    batch, heads, _, length, keys, size, value_size = sizes
    return 2.0 * batch * heads * length * keys * (size + value_size)


def type_bytes(kind: ir.Type) -> float:
    """How many bytes a value of a type takes; 0 for what is not an array."""
    if not isinstance(kind, ir.RankedTensorType):
        return 0.0
    total = 1.0
    for n in kind.shape:
        total *= n
    try:
        return total * m.element_dtype(kind).itemsize
    except m.KpxError:
        return total


def trip_count(op: Any) -> int:
    """How often a loop of the form `for i in range(a, b)` runs; 1 where it has another form."""
    body = list(op.regions[0].blocks[0].operations)
    compare = next((o for o in body if isinstance(o, stablehlo.CompareOp)), None)
    if compare is None or len(body) > 4:
        return 1
    counter = compare.lhs
    if not isinstance(counter, ir.BlockArgument):
        return 1
    end = splat(compare.rhs)
    if end is None and isinstance(compare.rhs, ir.BlockArgument):
        end = splat(op.operands[ir.BlockArgument(compare.rhs).arg_number])
    start = splat(op.operands[ir.BlockArgument(counter).arg_number])
    if start is None or end is None or (producer(op.operands[0]) is None and not len(op.operands)):
        return 1
    return max(int(end) - int(start), 0)
