"""Products by weights in int8: weights by output channel, the other factor by row, as it is read, sums in int32."""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, stablehlo
from kpx.kernels import onednn
from kpx.passes.weights_only import quantized, with_scale


def product(op: Any, with_onednn: bool, static: float | None) -> Value:
    """What takes the place of a product of an array's last dimension by one of a matrix of weights, all in f32.

    Args:
        with_onednn: whether oneDNN can be called, which quantizes rows as it reads them.
        static: the scale of the array's numbers, where it is known; None: each row's is that of its largest.
    """
    found = _call(op) if with_onednn and static is None else None
    return _plain(op, static) if found is None else found


def _plain(op: Any, static: float | None) -> Value:
    """In plain StableHLO."""
    (inner,) = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).rhs_contracting_dimensions
    last = m.rank(op.lhs) - 1
    x, rows = quantized(op.lhs, last) if static is None else with_scale(op.lhs, last, static)
    w, columns = quantized(op.rhs, inner)
    shape = m.shape(op.result)
    counted = stablehlo.dot_general(m.tensor(shape, "i32"), x, w, op.dot_dimension_numbers)
    by = stablehlo.multiply(
        m.broadcast(rows, shape, list(range(len(shape) - 1))), m.broadcast(columns, shape, [len(shape) - 1])
    )
    return stablehlo.multiply(m.convert(counted, "f32"), by)


def _call(op: Any) -> Value | None:
    """As a call of oneDNN; None where it has none."""
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
