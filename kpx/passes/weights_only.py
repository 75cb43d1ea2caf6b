"""Weights that stay in int8 or int4, and are widened as they are read.

They are quantized at load, symmetric and rounded to nearest even: in int8 by output channel, in int4 by groups of a channel.
What reads them computes as before, on widened numbers.
"""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, stablehlo
from kpx.ir.split import computed_late
from kpx.kernels import weights_only

GROUP = 32
"""How many int4 numbers of a channel share a scale."""

_FEW_ROWS = 8  # with more, widening the weights first costs less than widening them for each row


def can_be(inner: int, bits: int) -> bool:
    """Whether a weight of an inner size can be kept so."""
    return bits == 8 or inner % GROUP == 0


def grouped(w: Value, bits: int) -> tuple[Value, Value]:
    """A matrix `[columns, inner]` as int8 numbers of so many bits, and its scales `[columns, groups]`.

    What holds an infinity or a NaN has a scale of NaN; what is all zeros, or so small that no number is left of its inverse, is
    zeros.
    """
    columns, inner = m.shape(w)
    group = inner if bits == 8 else GROUP
    parts = m.reshape(w, [columns, inner // group, group])
    q, scales = quantized(parts, 2, 2 ** (bits - 1) - 1)
    return m.reshape(q, [columns, inner]), scales


def product(op: Any, inner: int, bits: int, platform: str) -> Value:
    """A product by a weight that is kept in int8 or int4.

    Args:
        op: of an array's last dimension by one of a matrix.
        inner: which of the matrix's.
    """
    depth, columns = m.shape(op.lhs)[-1], m.shape(op.rhs)[1 - inner]
    rows = m.size(op.lhs) // max(depth, 1)
    w = op.rhs if inner == 1 else m.transpose(op.rhs, [1, 0])
    q, scales = grouped(w, bits)
    if platform == "cpu" and rows <= _FEW_ROWS and weights_only.available():
        kept = q if bits == 8 else _packed(q)
        sizes = m.i64_array([rows, columns, depth, bits, depth // m.shape(scales)[1]])
        kind = m.tensor([rows, columns], "f32")
        y = m.custom_call(weights_only.TARGET, kind, [m.reshape(op.lhs, [rows, depth]), kept, scales], {"sizes": sizes})
        return m.reshape(y, m.shape(op.result))
    kept = _kept(q, bits, platform)
    wide = m.reshape(_widened(kept, scales), [columns, depth])
    back = wide if inner == 1 else m.transpose(wide, [1, 0])
    return stablehlo.dot_general(
        op.result.type, op.lhs, back, op.dot_dimension_numbers, precision_config=op.precision_config
    )


def rows_of(op: Any) -> Value | None:
    """Rows of a table of weights that is kept in int8, by row, widened after they are taken; None where it is no such gather."""
    table, shape = op.operand, list(m.shape(op.result))
    numbers = stablehlo.GatherDimensionNumbers(op.dimension_numbers)
    rows = m.integers(op.slice_sizes) == [1, m.shape(table)[1]] and list(numbers.collapsed_slice_dims) == [0]
    if not rows or list(numbers.offset_dims) != [len(shape) - 1]:
        return None
    q, scales = grouped(m.convert(table, "f32"), 8)
    taken = m.convert(_gather(op, q, shape, m.shape(table)[1]), "f32")
    by = m.reshape(_gather(op, scales, [*shape[:-1], 1], 1), shape[:-1])
    found = stablehlo.multiply(taken, m.broadcast(by, shape, range(len(shape) - 1)))
    return m.convert(found, m.tensor_type(table).element_type)


def _gather(op: Any, table: Value, shape: Any, width: int) -> Value:
    kind = m.tensor(shape, m.tensor_type(table).element_type)
    made = m.rebuild(op, [table, op.start_indices], [kind])
    made.attributes["slice_sizes"] = m.i64_array([1, width])
    return made.results[0]


def quantized(x: Value, axis: int, most: int = 127) -> tuple[Value, Value]:
    """An f32 array as int8 in [-most, most], symmetric, and the scales that it is to be multiplied by, along an axis.

    Rounded to nearest even. What holds an infinity or a NaN has a scale of NaN; what is all zeros, or so small that `most` over
    it is no number, is zeros, with a scale of zero.

    Returns:
        The int8 array, and the scales in f32, without the axis.
    """
    shape = m.shape(x)
    rest = [d for d in range(len(shape)) if d != axis]
    # XLA's maximum on the CPU need not be NaN where a number is: what is not finite counts as infinite.
    numbers_finite = stablehlo.is_finite(x)
    largest = _largest(stablehlo.select(numbers_finite, stablehlo.abs(x), m.like(x, float("inf"))), axis)
    limit, zero, nan = (m.like(largest, n) for n in (float(most), 0.0, float("nan")))
    by = stablehlo.divide(limit, largest)
    usable, finite = stablehlo.is_finite(by), stablehlo.is_finite(largest)
    by = stablehlo.select(stablehlo.and_(usable, finite), by, zero)
    scale = stablehlo.select(usable, stablehlo.divide(largest, limit), zero)
    scale = stablehlo.select(finite, scale, nan)
    numbers = stablehlo.select(numbers_finite, x, m.like(x, 0.0))
    q = stablehlo.round_nearest_even(stablehlo.multiply(numbers, m.broadcast(by, shape, rest)))
    return stablehlo.convert(m.tensor(shape, "i8"), q), scale


def with_scale(x: Value, axis: int, scale: float, most: int = 127) -> tuple[Value, Value]:
    """An f32 array as int8 by a scale that is known, beyond it the largest; and the scale, as `quantized` gives it.

    What holds an infinity or a NaN along the axis has a scale of NaN.
    """
    shape = m.shape(x)
    finite = stablehlo.is_finite(x)
    numbers = stablehlo.multiply(stablehlo.select(finite, x, m.like(x, 0.0)), m.like(x, 1 / scale))
    near = stablehlo.clamp(m.like(x, float(-most)), stablehlo.round_nearest_even(numbers), m.like(x, float(most)))
    largest = _largest(stablehlo.select(finite, m.like(x, 0.0), m.like(x, 1.0)), axis)
    none = stablehlo.compare(
        largest, m.like(largest, 0.0), stablehlo.ComparisonDirectionAttr.get("EQ"),
        compare_type=stablehlo.ComparisonTypeAttr.get("FLOAT"),
    )  # fmt: skip
    scales = stablehlo.select(none, m.like(largest, scale), m.like(largest, float("nan")))
    return stablehlo.convert(m.tensor(shape, "i8"), near), scales


def _largest(x: Value, axis: int) -> Value:
    """The largest along an axis."""
    element = m.tensor_type(x).element_type
    scalar = m.tensor([], element)
    kept = [n for d, n in enumerate(m.shape(x)) if d != axis]
    initial = m.full(scalar, float("-inf"))
    reduce = stablehlo.ReduceOp([m.tensor(kept, element)], [x], [initial], m.i64_array([axis]))
    block = reduce.regions[0].blocks.append(scalar, scalar, arg_locs=[m.ir.Location.unknown()] * 2)
    with m.ir.InsertionPoint(block):
        stablehlo.return_([stablehlo.maximum(*block.arguments)])
    return reduce.results[0]


def _kept(q: Value, bits: int, platform: str) -> Value:
    """Numbers as they are kept at load: int8, and int4 in a type of its own where the target packs it, else in bytes."""
    if bits == 8:
        return q
    return _packed(q) if platform == "cpu" else stablehlo.convert(m.tensor(m.shape(q), "i4"), q)


def _packed(q: Value) -> Value:
    """int4 numbers `[columns, inner]`, two to a byte: of each group the first half below, the second above, each plus 8."""
    columns, inner = m.shape(q)
    halves = m.reshape(q, [columns, inner // GROUP, 2, GROUP // 2])
    shifted = m.convert(stablehlo.add(halves, m.like(halves, 8)), "ui8")
    shape = [columns, inner // GROUP, 1, GROUP // 2]
    low = m.slice_(shifted, [0] * 4, shape, [1] * 4)
    high = m.slice_(shifted, [0, 0, 1, 0], [*shape[:2], 2, shape[3]], [1] * 4)
    both = stablehlo.or_(low, stablehlo.shift_left(high, m.like(high, 4)))
    return m.reshape(both, [columns, inner // 2])


def _widened(kept: Value, scales: Value) -> Value:
    """The numbers times their scales, `[columns, groups, group]`, computed at each call."""
    columns, groups = m.shape(scales)
    if m.element_type(kept) == "ui8":
        parts = m.reshape(kept, [columns, groups, 1, GROUP // 2])
        low = computed_late(stablehlo.and_(parts, m.like(parts, 15)))
        high = computed_late(stablehlo.shift_right_logical(parts, m.like(parts, 4)))
        both = m.convert(computed_late(stablehlo.concatenate([low, high], 2)), "f32")
        numbers = computed_late(stablehlo.subtract(both, m.like(both, 8.0)))
    else:
        numbers = m.convert(kept, "f32")
    numbers = m.reshape(numbers, [columns, groups, m.size(numbers) // (columns * groups)])
    return computed_late(stablehlo.multiply(numbers, m.broadcast(scales, m.shape(numbers), [0, 1])))
