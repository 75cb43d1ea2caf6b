"""Slices, pads, concatenations, dynamic slices and gathers that do less, or nothing."""

from __future__ import annotations

import numpy as np

from kpx.ir import module as m
from kpx.ir.module import integers, producer, splat, stablehlo
from kpx.ir.rewrite import rewrite


def _bounds(op):
    return integers(op.start_indices), integers(op.limit_indices), integers(op.strides)


@rewrite(stablehlo.SliceOp, exact=True)
def slice_identity(op):
    """A slice of everything is nothing.

    Before:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          %0 = stablehlo.slice %a [0:2, 0:3] : (tensor<2x3xf32>) -> tensor<2x3xf32>
          return %0 : tensor<2x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          return %a : tensor<2x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x2xf32> {
          %0 = stablehlo.slice %a [0:2, 0:3:2] : (tensor<2x3xf32>) -> tensor<2x2xf32>
          return %0 : tensor<2x2xf32>
        }
    """
    return op.operand if op.operand.type == op.result.type else None


@rewrite(stablehlo.SliceOp, exact=True)
def slice_of_slice(op):
    """Two slices are one.

    Before:
        func.func @main(%a: tensor<20xf32>) -> tensor<3xf32> {
          %0 = stablehlo.slice %a [2:18:2] : (tensor<20xf32>) -> tensor<8xf32>
          %1 = stablehlo.slice %0 [1:7:2] : (tensor<8xf32>) -> tensor<3xf32>
          return %1 : tensor<3xf32>
        }
    After:
        func.func @main(%a: tensor<20xf32>) -> tensor<3xf32> {
          %0 = stablehlo.slice %a [4:13:4] : (tensor<20xf32>) -> tensor<3xf32>
          return %0 : tensor<3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<20xf32>) -> tensor<3xf32> {
          %0 = stablehlo.slice %a [2:10] : (tensor<20xf32>) -> tensor<8xf32>
          %1 = stablehlo.negate %0 : tensor<8xf32>
          %2 = stablehlo.slice %1 [1:4] : (tensor<8xf32>) -> tensor<3xf32>
          return %2 : tensor<3xf32>
        }
    """
    inner = producer(op.operand, stablehlo.SliceOp)
    if inner is None or not m.size(op.result):
        return None
    first, second = _bounds(inner), _bounds(op)
    starts = [a + s * b for a, s, b in zip(first[0], first[2], second[0], strict=True)]
    strides = [a * b for a, b in zip(first[2], second[2], strict=True)]
    limits = [a + (n - 1) * s + 1 for a, n, s in zip(starts, m.shape(op.result), strides, strict=True)]
    return m.slice_(inner.operand, starts, limits, strides)


@rewrite(stablehlo.SliceOp, exact=True)
def slice_of_concatenate(op):
    """A slice that falls into one part of a concatenation is a slice of that part.

    Before:
        func.func @main(%a: tensor<2xf32>, %b: tensor<3xf32>) -> tensor<2xf32> {
          %0 = stablehlo.concatenate %a, %b, dim = 0 : (tensor<2xf32>, tensor<3xf32>) -> tensor<5xf32>
          %1 = stablehlo.slice %0 [3:5] : (tensor<5xf32>) -> tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    After:
        func.func @main(%a: tensor<2xf32>, %b: tensor<3xf32>) -> tensor<2xf32> {
          %0 = stablehlo.slice %b [1:3] : (tensor<3xf32>) -> tensor<2xf32>
          return %0 : tensor<2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2xf32>, %b: tensor<3xf32>) -> tensor<2xf32> {
          %0 = stablehlo.concatenate %a, %b, dim = 0 : (tensor<2xf32>, tensor<3xf32>) -> tensor<5xf32>
          %1 = stablehlo.slice %0 [1:3] : (tensor<5xf32>) -> tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ConcatenateOp)
    if inner is None:
        return None
    starts, limits, strides = _bounds(op)
    dim, offset = inner.dimension.value, 0
    for part in inner.inputs:
        end = offset + m.shape(part)[dim]
        if offset <= starts[dim] and limits[dim] <= end and starts[dim] < end:
            starts[dim] -= offset
            limits[dim] -= offset
            return m.slice_(part, starts, limits, strides)
        offset = end
    return None


@rewrite(stablehlo.SliceOp, exact=True)
def slice_of_pad(op):
    """A slice that sees none of the padding is a slice of what was padded.

    Before:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<2xf32> {
          %0 = stablehlo.pad %a, %v, low = [3], high = [1], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<8xf32>
          %1 = stablehlo.slice %0 [4:6] : (tensor<8xf32>) -> tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<2xf32> {
          %0 = stablehlo.slice %a [1:3] : (tensor<4xf32>) -> tensor<2xf32>
          return %0 : tensor<2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<2xf32> {
          %0 = stablehlo.pad %a, %v, low = [3], high = [1], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<8xf32>
          %1 = stablehlo.slice %0 [2:4] : (tensor<8xf32>) -> tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.PadOp)
    if inner is None or any(integers(inner.interior_padding)):
        return None
    starts, limits, strides = _bounds(op)
    low = integers(inner.edge_padding_low)
    starts = [s - p for s, p in zip(starts, low, strict=True)]
    limits = [s - p for s, p in zip(limits, low, strict=True)]
    inside = zip(starts, limits, m.shape(inner.operand), strict=True)
    if not all(0 <= s <= e <= n for s, e, n in inside):
        return None
    return m.slice_(inner.operand, starts, limits, strides)


@rewrite(stablehlo.SliceOp, exact=True)
def slice_of_broadcast(op):
    """A slice of a broadcast repeats less of a slice.

    Before:
        func.func @main(%a: tensor<3xf32>) -> tensor<1x2xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<4x3xf32>
          %1 = stablehlo.slice %0 [2:3, 1:3] : (tensor<4x3xf32>) -> tensor<1x2xf32>
          return %1 : tensor<1x2xf32>
        }
    After:
        func.func @main(%a: tensor<3xf32>) -> tensor<1x2xf32> {
          %0 = stablehlo.slice %a [1:3] : (tensor<3xf32>) -> tensor<2xf32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1] : (tensor<2xf32>) -> tensor<1x2xf32>
          return %1 : tensor<1x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3xf32>) -> tensor<1x2xf32> {
          %0 = stablehlo.slice %a [2:3, 1:3] : (tensor<4x3xf32>) -> tensor<1x2xf32>
          return %0 : tensor<1x2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.BroadcastInDimOp)
    if inner is None:
        return None
    along, operand = integers(inner.broadcast_dimensions), inner.operand
    sizes = m.shape(operand)
    bounds = [list(b) for b in zip(*_bounds(op), strict=True)]
    kept = [bounds[d] if sizes[i] != 1 else [0, 1, 1] for i, d in enumerate(along)]
    if kept:
        operand = m.slice_(operand, *(list(b) for b in zip(*kept, strict=True)))
    return m.broadcast(operand, m.shape(op.result), along)


@rewrite(stablehlo.PadOp, exact=True)
def pad_by_nothing(op):
    """Padding by zero everywhere is nothing.

    Before:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<4xf32> {
          %0 = stablehlo.pad %a, %v, low = [0], high = [0], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<4xf32> {
          %0 = stablehlo.pad %a, %v, low = [1], high = [-1], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    amounts = [*integers(op.edge_padding_low), *integers(op.edge_padding_high), *integers(op.interior_padding)]
    return None if any(amounts) else op.operand


@rewrite(stablehlo.PadOp, exact=True)
def pad_of_pad(op):
    """Padding twice with one value is padding once.

    Before:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<9xf32> {
          %0 = stablehlo.pad %a, %v, low = [1], high = [0], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<5xf32>
          %1 = stablehlo.pad %0, %v, low = [1], high = [3], interior = [0] : (tensor<5xf32>, tensor<f32>) -> tensor<9xf32>
          return %1 : tensor<9xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>) -> tensor<9xf32> {
          %0 = stablehlo.pad %a, %v, low = [2], high = [3], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<9xf32>
          return %0 : tensor<9xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %v: tensor<f32>, %w: tensor<f32>) -> tensor<9xf32> {
          %0 = stablehlo.pad %a, %v, low = [1], high = [0], interior = [0] : (tensor<4xf32>, tensor<f32>) -> tensor<5xf32>
          %1 = stablehlo.pad %0, %w, low = [1], high = [3], interior = [0] : (tensor<5xf32>, tensor<f32>) -> tensor<9xf32>
          return %1 : tensor<9xf32>
        }
    """
    inner = producer(op.operand, stablehlo.PadOp)
    if inner is None or not m.same_value(inner.padding_value, op.padding_value):
        return None
    edges = [integers(e) for o in (inner, op) for e in (o.edge_padding_low, o.edge_padding_high)]
    if any(integers(inner.interior_padding)) or any(integers(op.interior_padding)) or min(map(min, edges)) < 0:
        return None
    low, high = ([a + b for a, b in zip(x, y, strict=True)] for x, y in ((edges[0], edges[2]), (edges[1], edges[3])))
    return stablehlo.pad(inner.operand, op.padding_value, m.i64_array(low), m.i64_array(high), op.interior_padding)


@rewrite(stablehlo.ConcatenateOp, exact=True)
def concatenate_of_one(op):
    """Empty parts of a concatenation add nothing, and a single part is the whole.

    Before:
        func.func @main(%a: tensor<2xf32>, %b: tensor<0xf32>) -> tensor<2xf32> {
          %0 = stablehlo.concatenate %a, %b, dim = 0 : (tensor<2xf32>, tensor<0xf32>) -> tensor<2xf32>
          return %0 : tensor<2xf32>
        }
    After:
        func.func @main(%a: tensor<2xf32>, %b: tensor<0xf32>) -> tensor<2xf32> {
          return %a : tensor<2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2xf32>) -> tensor<4xf32> {
          %0 = stablehlo.concatenate %a, %a, dim = 0 : (tensor<2xf32>, tensor<2xf32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    dim, parts = op.dimension.value, list(op.inputs)
    kept = [p for p in parts if m.shape(p)[dim]] or parts[:1]
    if len(kept) == 1:
        return kept[0]
    return stablehlo.concatenate(kept, dim) if len(kept) < len(parts) else None


@rewrite(stablehlo.ConcatenateOp, exact=True)
def concatenate_of_concatenate(op):
    """Concatenations along one dimension are one.

    Before:
        func.func @main(%a: tensor<2xf32>, %b: tensor<3xf32>) -> tensor<7xf32> {
          %0 = stablehlo.concatenate %a, %b, dim = 0 : (tensor<2xf32>, tensor<3xf32>) -> tensor<5xf32>
          %1 = stablehlo.concatenate %0, %a, dim = 0 : (tensor<5xf32>, tensor<2xf32>) -> tensor<7xf32>
          return %1 : tensor<7xf32>
        }
    After:
        func.func @main(%a: tensor<2xf32>, %b: tensor<3xf32>) -> tensor<7xf32> {
          %0 = stablehlo.concatenate %a, %b, %a, dim = 0 : (tensor<2xf32>, tensor<3xf32>, tensor<2xf32>) -> tensor<7xf32>
          return %0 : tensor<7xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x2xf32>) -> tensor<4x4xf32> {
          %0 = stablehlo.concatenate %a, %a, dim = 0 : (tensor<2x2xf32>, tensor<2x2xf32>) -> tensor<4x2xf32>
          %1 = stablehlo.concatenate %0, %0, dim = 1 : (tensor<4x2xf32>, tensor<4x2xf32>) -> tensor<4x4xf32>
          return %1 : tensor<4x4xf32>
        }
    """
    parts, flat = list(op.inputs), []
    for part in parts:
        inner = producer(part, stablehlo.ConcatenateOp)
        if inner is not None and inner.dimension.value == op.dimension.value and m.has_one_use(part):
            flat += list(inner.inputs)
        else:
            flat.append(part)
    return stablehlo.concatenate(flat, op.dimension.value) if len(flat) > len(parts) else None


@rewrite(stablehlo.ConcatenateOp, exact=True)
def concatenate_of_adjacent_slices(op):
    """Slices put back together in order are one slice.

    Before:
        func.func @main(%a: tensor<6xf32>) -> tensor<4xf32> {
          %0 = stablehlo.slice %a [1:3] : (tensor<6xf32>) -> tensor<2xf32>
          %1 = stablehlo.slice %a [3:5] : (tensor<6xf32>) -> tensor<2xf32>
          %2 = stablehlo.concatenate %0, %1, dim = 0 : (tensor<2xf32>, tensor<2xf32>) -> tensor<4xf32>
          return %2 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<6xf32>) -> tensor<4xf32> {
          %0 = stablehlo.slice %a [1:5] : (tensor<6xf32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<6xf32>) -> tensor<4xf32> {
          %0 = stablehlo.slice %a [3:5] : (tensor<6xf32>) -> tensor<2xf32>
          %1 = stablehlo.slice %a [1:3] : (tensor<6xf32>) -> tensor<2xf32>
          %2 = stablehlo.concatenate %0, %1, dim = 0 : (tensor<2xf32>, tensor<2xf32>) -> tensor<4xf32>
          return %2 : tensor<4xf32>
        }
    """
    dim, parts = op.dimension.value, list(op.inputs)
    merged = [parts[0]]
    for part in parts[1:]:
        joined = _joined(merged[-1], part, dim)
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    if len(merged) == len(parts):
        return None
    return merged[0] if len(merged) == 1 else stablehlo.concatenate(merged, dim)


def _joined(a, b, dim):
    first, second = producer(a, stablehlo.SliceOp), producer(b, stablehlo.SliceOp)
    if first is None or second is None or first.operand != second.operand:
        return None
    (s1, e1, t1), (s2, e2, t2) = _bounds(first), _bounds(second)
    if t1 != t2 or t1[dim] != 1 or e1[dim] != s2[dim]:
        return None
    if any((s1[d], e1[d]) != (s2[d], e2[d]) for d in range(len(s1)) if d != dim):
        return None
    e1[dim] = e2[dim]
    return m.slice_(first.operand, s1, e1, t1)


@rewrite(stablehlo.DynamicSliceOp, exact=True)
def dynamic_slice_at_constants(op):
    """A dynamic slice whose start is known is a slice.

    Before:
        func.func @main(%a: tensor<6xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<5> : tensor<i32>
          %1 = stablehlo.dynamic_slice %a, %0, sizes = [4] : (tensor<6xf32>, tensor<i32>) -> tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<6xf32>) -> tensor<4xf32> {
          %0 = stablehlo.slice %a [2:6] : (tensor<6xf32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<6xf32>, %i: tensor<i32>) -> tensor<4xf32> {
          %0 = stablehlo.dynamic_slice %a, %i, sizes = [4] : (tensor<6xf32>, tensor<i32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    given = [g for i in op.start_indices if (g := splat(i)) is not None]
    if len(given) < len(list(op.start_indices)):
        return None
    sizes = m.shape(op.result)
    limits = zip(given, sizes, m.shape(op.operand), strict=True)
    starts = [min(max(int(g), 0), n - size) for g, size, n in limits]
    return m.slice_(op.operand, starts, [s + n for s, n in zip(starts, sizes, strict=True)], [1] * len(sizes))


@rewrite(stablehlo.DynamicUpdateSliceOp, exact=True)
def dynamic_update_of_everything(op):
    """An update as large as the array replaces it.

    Before:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>, %i: tensor<i32>) -> tensor<4xf32> {
          %0 = stablehlo.dynamic_update_slice %a, %b, %i : (tensor<4xf32>, tensor<4xf32>, tensor<i32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>, %i: tensor<i32>) -> tensor<4xf32> {
          return %b : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %b: tensor<3xf32>, %i: tensor<i32>) -> tensor<4xf32> {
          %0 = stablehlo.dynamic_update_slice %a, %b, %i : (tensor<4xf32>, tensor<3xf32>, tensor<i32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    return op.update if op.update.type == op.operand.type else None


@rewrite(stablehlo.GatherOp, exact=True)
def gather_is_slice(op):
    """Taking rows at known, evenly spaced positions is a slice.

    Before:
        func.func @main(%a: tensor<9x5xf32>) -> tensor<3x5xf32> {
          %0 = stablehlo.constant dense<[[1], [3], [5]]> : tensor<3x1xi32>
          %1 = "stablehlo.gather"(%a, %0) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 5>}> : (tensor<9x5xf32>, tensor<3x1xi32>) -> tensor<3x5xf32>
          return %1 : tensor<3x5xf32>
        }
    After:
        func.func @main(%a: tensor<9x5xf32>) -> tensor<3x5xf32> {
          %0 = stablehlo.slice %a [1:6:2, 0:5] : (tensor<9x5xf32>) -> tensor<3x5xf32>
          return %0 : tensor<3x5xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<9x5xf32>) -> tensor<3x5xf32> {
          %0 = stablehlo.constant dense<[[1], [3], [4]]> : tensor<3x1xi32>
          %1 = "stablehlo.gather"(%a, %0) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, slice_sizes = array<i64: 1, 5>}> : (tensor<9x5xf32>, tensor<3x1xi32>) -> tensor<3x5xf32>
          return %1 : tensor<3x5xf32>
        }
    """
    numbers = stablehlo.GatherDimensionNumbers(op.dimension_numbers)
    taken, sizes, dims = list(numbers.start_index_map), integers(op.slice_sizes), m.shape(op.operand)
    if list(numbers.operand_batching_dims) or len(taken) != 1 or list(numbers.collapsed_slice_dims) != taken:
        return None
    axis = taken[0]
    if [n for i, n in enumerate(sizes) if i != axis] != [n for i, n in enumerate(dims) if i != axis]:
        return None
    positions = _positions(op.start_indices, dims[axis])
    if positions is None:
        return None
    offsets = list(numbers.offset_dims)
    batch = [d for d in range(m.rank(op.result)) if d not in offsets]
    if batch and batch != list(range(batch[0], batch[0] + len(batch))):
        return None
    start, step, count = positions
    starts, limits, strides = [0] * len(dims), list(dims), [1] * len(dims)
    starts[axis], limits[axis], strides[axis] = start, start + (count - 1) * step + 1, step
    rows = m.slice_(op.operand, starts, limits, strides)
    lead = batch[0] if batch else 0
    others = [i for i in range(len(dims)) if i != axis]
    return m.reshape(m.transpose(rows, [*others[:lead], axis, *others[lead:]]), m.shape(op.result))


def _positions(indices, length) -> tuple[int, int, int] | None:
    """First position, step and count of a constant, increasing, evenly spaced list inside the array."""
    known = m.constant_value(indices)
    if known is None or not known.size:
        return None
    flat = known.reshape(-1).astype(np.int64)
    steps = np.diff(flat)
    step = int(steps[0]) if steps.size else 1
    if step < 1 or (steps != step).any() or flat[0] < 0 or flat[-1] >= length:
        return None
    return int(flat[0]), step, flat.size
