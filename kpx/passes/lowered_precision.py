"""Products, convolutions and attention are computed in another precision; all that is around them stays as it is.

What is rounded are the operands, as they are read; sums stay wide. Norms, softmax, losses, reductions and the residual stream
are never touched, nor are a model's parameters: what is made of them is made at load.
"""

from __future__ import annotations

import collections
import functools
import math
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.rewrite import Fuel
from kpx.ir.split import depends_on_weights_alone
from kpx.kernels import onednn, registry
from kpx.passes import composites, weights_only
from kpx.passes.composites import Device
from kpx.passes.weights_only import quantized
from kpx.precision import Policy

ATTENTION = "kpx.attention"
NAME = "lower_precision"
"""What the rewrite is called where rewrites are disabled, counted, or bisected."""

_ELEMENT = {"bf16": "bf16", "f16": "f16", "int8": "bf16"}  # of operands that are not quantized
_FLOATS = ("f32", "bf16", "f16")
_BITS = {"int8-weights": 8, "int4-weights": 4}


def lower(
    module: ir.Module, policy: Policy, device: Device, with_onednn: bool, fuel: Fuel, *, convolutions: bool
) -> collections.Counter[str]:
    """Computes ops as a policy says, in place; gives how many are computed in which precision.

    Those of a model in bf16 or f16 are not computed in more bits than that, but in fewer where a policy says so.

    Args:
        with_onednn: whether oneDNN can be called.
        convolutions: whether those are meant, which comes before their layout is chosen, or the others.
    """
    counts: collections.Counter[str] = collections.Counter()
    with module.context, ir.Location.unknown():
        for op in list(m.walk(m.main(module))):
            kind, sizes = _described(op)
            if not kind or (kind == "convolution") != convolutions:
                continue
            wanted = policy.of(kind, _path(op), sizes)
            if kind == "embedding" and wanted not in _BITS:
                continue  # rows are taken, and nothing is computed
            own = m.element_type(op.operands[0])
            if (wanted in _FLOATS and (wanted == "f32" or own != "f32")) or not fuel.burn(NAME, op):
                counts[own] += 1
                continue
            with ir.InsertionPoint(op), op.location:
                counts[_lowered(module, op, kind, wanted, device, with_onednn)] += 1
    m.inline_calls(module)
    return counts


def _path(op: Any) -> str:
    """Where in the model an op is, without its own name and the functions around it."""
    return "/".join(part for part in m.source_path(op).split("/")[:-1] if "(" not in part)


def _described(op: Any) -> tuple[str, tuple[int, int, int]]:
    """Which of the ops that have a precision it is, and its rows, columns and inner size; "" for any other."""
    name = op.operation.name
    if not len(op.operands) or m.element_type(op.operands[0]) not in _FLOATS:
        return "", (0, 0, 0)
    if isinstance(op, stablehlo.DotGeneralOp) and op.algorithm is None:
        numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
        inner = math.prod(m.shape(op.lhs)[d] for d in numbers.lhs_contracting_dimensions)
        batch = math.prod(m.shape(op.lhs)[d] for d in numbers.lhs_batching_dimensions)
        rows, columns = (m.size(v) // max(inner * batch, 1) for v in (op.lhs, op.rhs))
        return "product", (rows, columns, inner)
    if isinstance(op, stablehlo.ConvolutionOp):
        columns = m.shape(op.rhs)[stablehlo.ConvDimensionNumbers(op.dimension_numbers).kernel_output_feature_dimension]
        return "convolution", (m.size(op.result) // max(columns, 1), columns, m.size(op.rhs) // max(columns, 1))
    if isinstance(op, stablehlo.GatherOp) and m.rank(op.operand) == 2:
        rows, columns = m.shape(op.operand)
        return "embedding", (m.size(op.start_indices), columns, rows)
    if name == stablehlo.CompositeOp.OPERATION_NAME and op.operation.attributes["name"].value == ATTENTION:
        query, key = op.operands[0], op.operands[1]
        return "attention", (m.shape(query)[-2], m.shape(key)[-2], m.shape(query)[-1])
    return "", (0, 0, 0)


def _lowered(module: ir.Module, op: Any, kind: str, wanted: str, device: Device, with_onednn: bool) -> str:
    """Computes an op in a precision, or in the one that this precision has for it; gives which."""
    own = m.element_type(op.operands[0])
    if wanted in _BITS:
        return wanted if _keep_weight(op, kind, _BITS[wanted], device) else own
    if wanted == "int8" and kind == "product" and _by_weight(op):
        wide = _in_f32(op)
        with ir.InsertionPoint(wide):
            y = _int8_call(wide) if with_onednn else None
            _replace(wide, _int8(wide) if y is None else y)
        return "int8"
    if own != "f32":
        return own
    if kind == "attention":
        return _attention(module, op, _ELEMENT[wanted], device)
    element = _ELEMENT[wanted]
    narrow = [m.convert(v, element) for v in (op.lhs, op.rhs)]
    if kind == "product":
        y = stablehlo.dot_general(
            op.result.type, *narrow, op.dot_dimension_numbers, precision_config=op.precision_config
        )
    else:
        y = m.rebuild(op, narrow).results[0]
    _replace(op, y)
    return element


def _replace(op: Any, value: Value) -> None:
    op.results[0].replace_all_uses_with(value)
    op.operation.erase()


def _in_f32(op: Any) -> Any:
    """A product in f32 in the place of one of other floating numbers: what is quantized is made of that."""
    if {m.element_type(v) for v in (op.lhs, op.rhs, op.result)} == {"f32"}:
        return op
    wide = [m.convert(v, "f32") for v in (op.lhs, op.rhs)]
    kind = m.tensor(m.shape(op.result), "f32")
    made = stablehlo.DotGeneralOp(kind, *wide, op.dot_dimension_numbers, precision_config=op.precision_config)
    _replace(op, m.convert(made.result, m.tensor_type(op.result).element_type))
    return made


def _attention(module: ir.Module, op: Any, element: str, device: Device) -> str:
    """Attention over narrower queries, keys and values. Scores, softmax and sums stay f32, as its decomposition says."""
    kernel = registry.find(ATTENTION)
    assert kernel is not None  # kpx's own
    avals = tuple(map(composites.struct, op.operands))

    dtype = m.element_dtype(m.tensor([], element))

    def narrower(*arrays, **attributes):
        narrow = [a.astype(dtype) for a in arrays[:3]]
        return kernel(*narrow, *arrays[3:], **attributes).astype(arrays[0].dtype)

    function = functools.partial(narrower, **composites.attributes(op))
    symbol = composites.spliced(module, ATTENTION, function, avals, device, 0.0)
    composites.call_instead(op, symbol)
    return element


def _keep_weight(op: Any, kind: str, bits: int, device: Device) -> bool:
    """Has an op read a weight that is kept in so many bits; False, and nothing changes, where it reads none that can be."""
    if kind == "embedding":
        y = weights_only.rows_of(op) if depends_on_weights_alone(op.operand) else None
        if y is not None:
            _replace(op, y)
        return y is not None
    if kind != "product" or not _by_weight(op) or not weights_only.can_be(m.shape(op.lhs)[-1], bits):
        return False
    wide = _in_f32(op)
    (inner,) = stablehlo.DotDimensionNumbers(wide.dot_dimension_numbers).rhs_contracting_dimensions
    with ir.InsertionPoint(wide):
        _replace(wide, weights_only.product(wide, inner, bits, device.platform))
    return True


# int8 -------------------------------------------------------------------------------------------


def _by_weight(op: Any) -> bool:
    """Whether a product is of an array by a matrix of weights, the array's last dimension by one of the matrix."""
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    inner = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
    plain = not list(numbers.lhs_batching_dimensions) and m.rank(op.rhs) == 2 and len(inner[1]) == 1
    if not plain or inner[0] != [m.rank(op.lhs) - 1]:
        return False
    return depends_on_weights_alone(op.rhs) and not depends_on_weights_alone(op.lhs)


def _int8(op: Any) -> Value:
    """A product by a weight in int8, in plain StableHLO."""
    (inner,) = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).rhs_contracting_dimensions
    x, rows = quantized(op.lhs, m.rank(op.lhs) - 1)
    w, columns = quantized(op.rhs, inner)
    shape = m.shape(op.result)
    counted = stablehlo.dot_general(m.tensor(shape, "i32"), x, w, op.dot_dimension_numbers)
    by = stablehlo.multiply(
        m.broadcast(rows, shape, list(range(len(shape) - 1))), m.broadcast(columns, shape, [len(shape) - 1])
    )
    return stablehlo.multiply(m.convert(counted, "f32"), by)


def _int8_call(op: Any) -> Value | None:
    """A product by a weight in int8 as a call of oneDNN, which quantizes rows as it reads them; None where it has none."""
    (inner,) = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).rhs_contracting_dimensions
    depth, columns = m.shape(op.lhs)[-1], m.shape(op.rhs)[1 - inner]
    rows = m.size(op.lhs) // max(depth, 1)
    sizes = [rows, columns, depth, onednn.column_blocks(rows, columns)]
    count = onednn.packed_bytes(sizes, [], ["f32", "f32"], quantized=True)
    if count is None:
        return None
    w, scales = quantized(op.rhs, inner)
    attributes = {"sizes": m.i64_array(sizes)}
    packing = {**attributes, "layout": m.i64_array([inner])}
    packed = m.custom_call("kpx_onednn_pack", m.tensor([count], "ui8"), [w], packing)
    y = m.custom_call(
        "kpx_onednn_quantized", m.tensor([rows, columns], "f32"), [m.reshape(op.lhs, [rows, depth]), packed, scales],
        {**attributes, "steps": m.i64_array([])},
    )  # fmt: skip
    return m.reshape(y, m.shape(op.result))
