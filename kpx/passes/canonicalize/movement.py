"""Transposes, reshapes, broadcasts, converts and reverses that do less, or nothing."""

from __future__ import annotations

from kpx.ir import module as m
from kpx.ir.module import integers, producer, stablehlo
from kpx.ir.rewrite import rewrite


@rewrite(stablehlo.TransposeOp, exact=True)
def transpose_of_transpose(op):
    """Two transposes are one, and none where they cancel.

    Before:
        func.func @main(%a: tensor<2x3x4xf32>) -> tensor<3x4x2xf32> {
          %0 = stablehlo.transpose %a, dims = [2, 1, 0] : (tensor<2x3x4xf32>) -> tensor<4x3x2xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0, 2] : (tensor<4x3x2xf32>) -> tensor<3x4x2xf32>
          return %1 : tensor<3x4x2xf32>
        }
    After:
        func.func @main(%a: tensor<2x3x4xf32>) -> tensor<3x4x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 2, 0] : (tensor<2x3x4xf32>) -> tensor<3x4x2xf32>
          return %0 : tensor<3x4x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x2xf32>) -> tensor<2x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x2xf32>) -> tensor<2x2xf32>
          %1 = stablehlo.negate %0 : tensor<2x2xf32>
          %2 = stablehlo.transpose %1, dims = [1, 0] : (tensor<2x2xf32>) -> tensor<2x2xf32>
          return %2 : tensor<2x2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.TransposeOp)
    if inner is None:
        return None
    first = integers(inner.permutation)
    return m.transpose(inner.operand, [first[i] for i in integers(op.permutation)])


@rewrite(stablehlo.TransposeOp, exact=True)
def transpose_is_reshape(op):
    """A transpose that keeps the order of all dimensions but those of size 1 moves no data.

    Before:
        func.func @main(%a: tensor<1x3x4xf32>) -> tensor<3x1x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0, 2] : (tensor<1x3x4xf32>) -> tensor<3x1x4xf32>
          return %0 : tensor<3x1x4xf32>
        }
    After:
        func.func @main(%a: tensor<1x3x4xf32>) -> tensor<3x1x4xf32> {
          %0 = stablehlo.reshape %a : (tensor<1x3x4xf32>) -> tensor<3x1x4xf32>
          return %0 : tensor<3x1x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<1x3x3xf32>) -> tensor<3x1x3xf32> {
          %0 = stablehlo.transpose %a, dims = [2, 0, 1] : (tensor<1x3x3xf32>) -> tensor<3x1x3xf32>
          return %0 : tensor<3x1x3xf32>
        }
    """
    dims = m.shape(op.operand)
    moved = [i for i in integers(op.permutation) if dims[i] != 1]
    return m.reshape(op.operand, m.shape(op.result)) if moved == sorted(moved) else None


@rewrite(stablehlo.ReshapeOp, exact=True)
def reshape_identity(op):
    """A reshape to the same shape is nothing.

    Before:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x3xf32>) -> tensor<2x3xf32>
          return %0 : tensor<2x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          return %a : tensor<2x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x3xf32>) -> tensor<3x2xf32>
          return %0 : tensor<3x2xf32>
        }
    """
    return op.operand if op.operand.type == op.result.type else None


@rewrite(stablehlo.ReshapeOp, exact=True)
def reshape_of_reshape(op):
    """Two reshapes are one.

    Before:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<4x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x6xf32>) -> tensor<12xf32>
          %1 = stablehlo.reshape %0 : (tensor<12xf32>) -> tensor<4x3xf32>
          return %1 : tensor<4x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<4x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x6xf32>) -> tensor<4x3xf32>
          return %0 : tensor<4x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<12xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x6xf32>) -> tensor<6x2xf32>
          %1 = stablehlo.reshape %0 : (tensor<6x2xf32>) -> tensor<12xf32>
          return %1 : tensor<12xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ReshapeOp)
    return None if inner is None else m.reshape(inner.operand, m.shape(op.result))


@rewrite(stablehlo.ReshapeOp, exact=True)
def reshape_of_reshape_by_units(op):
    """Two reshapes are one where one of them only adds or drops dimensions of size 1, or the second undoes the first.

    Where they are dropped before, or added after, what makes another shape, both are left: a pattern may end, or begin, between.

    Before:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<4x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x6xf32>) -> tensor<2x1x6xf32>
          %1 = stablehlo.reshape %0 : (tensor<2x1x6xf32>) -> tensor<4x3xf32>
          return %1 : tensor<4x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<4x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x6xf32>) -> tensor<4x3xf32>
          return %0 : tensor<4x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x6xf32>) -> tensor<2x1x3x2xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x6xf32>) -> tensor<2x3x2xf32>
          %1 = stablehlo.reshape %0 : (tensor<2x3x2xf32>) -> tensor<2x1x3x2xf32>
          return %1 : tensor<2x1x3x2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ReshapeOp)
    if inner is None:
        return None
    first, between, last = ([n for n in m.shape(v) if n != 1] for v in (inner.operand, op.operand, op.result))
    adds = between == last and m.rank(op.operand) < m.rank(op.result)
    drops = between == first and m.rank(op.operand) < m.rank(inner.operand)
    if first != last and (adds or drops):
        return None
    return m.reshape(inner.operand, m.shape(op.result)) if between in (first, last) or first == last else None


@rewrite(stablehlo.BroadcastInDimOp, exact=True)
def broadcast_is_reshape(op):
    """A broadcast that repeats nothing and keeps the order of dimensions is a reshape, or nothing.

    Before:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x1x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [0, 2] : (tensor<2x3xf32>) -> tensor<2x1x3xf32>
          return %0 : tensor<2x1x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x1x3xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x3xf32>) -> tensor<2x1x3xf32>
          return %0 : tensor<2x1x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3x3xf32>) -> tensor<3x1x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [2, 0] : (tensor<3x3xf32>) -> tensor<3x1x3xf32>
          return %0 : tensor<3x1x3xf32>
        }
    """
    if m.size(op.operand) != m.size(op.result):
        return None
    along = integers(op.broadcast_dimensions)
    if along != sorted(along):
        return None
    return m.reshape(op.operand, m.shape(op.result))


@rewrite(stablehlo.BroadcastInDimOp, exact=True)
def broadcast_of_broadcast(op):
    """Two broadcasts are one.

    Before:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x2x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<2x3xf32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1, 2] : (tensor<2x3xf32>) -> tensor<4x2x3xf32>
          return %1 : tensor<4x2x3xf32>
        }
    After:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x2x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [2] : (tensor<3xf32>) -> tensor<4x2x3xf32>
          return %0 : tensor<4x2x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x2x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<2x3xf32>
          %1 = stablehlo.exponential %0 : tensor<2x3xf32>
          %2 = stablehlo.broadcast_in_dim %1, dims = [1, 2] : (tensor<2x3xf32>) -> tensor<4x2x3xf32>
          return %2 : tensor<4x2x3xf32>
        }
    """
    inner = producer(op.operand, stablehlo.BroadcastInDimOp)
    if inner is None:
        return None
    outer = integers(op.broadcast_dimensions)
    along = [outer[d] for d in integers(inner.broadcast_dimensions)]
    return m.broadcast(inner.operand, m.shape(op.result), along)


@rewrite(stablehlo.BroadcastInDimOp, exact=True)
def broadcast_of_unit_reshape(op):
    """A reshape that only adds or drops dimensions of size 1 is absorbed by the broadcast after it.

    Before:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x3x5xf32> {
          %0 = stablehlo.reshape %a : (tensor<3xf32>) -> tensor<1x3x1xf32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [0, 1, 2] : (tensor<1x3x1xf32>) -> tensor<4x3x5xf32>
          return %1 : tensor<4x3x5xf32>
        }
    After:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x3x5xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<4x3x5xf32>
          return %0 : tensor<4x3x5xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<6xf32>) -> tensor<4x3x2xf32> {
          %0 = stablehlo.reshape %a : (tensor<6xf32>) -> tensor<3x2xf32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1, 2] : (tensor<3x2xf32>) -> tensor<4x3x2xf32>
          return %1 : tensor<4x3x2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ReshapeOp)
    if inner is None:
        return None
    before, after = m.shape(inner.operand), m.shape(inner.result)
    if 1 in before or [n for n in after if n != 1] != list(before):
        return None
    outer = integers(op.broadcast_dimensions)
    along = [outer[i] for i, n in enumerate(after) if n != 1]
    return m.broadcast(inner.operand, m.shape(op.result), along)


@rewrite(stablehlo.ReshapeOp, exact=True)
def unit_reshape_of_broadcast(op):
    """A reshape that only adds or drops dimensions of size 1 joins the broadcast before it.

    Before:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x1x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<4x3xf32>
          %1 = stablehlo.reshape %0 : (tensor<4x3xf32>) -> tensor<4x1x3xf32>
          return %1 : tensor<4x1x3xf32>
        }
    After:
        func.func @main(%a: tensor<3xf32>) -> tensor<4x1x3xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [2] : (tensor<3xf32>) -> tensor<4x1x3xf32>
          return %0 : tensor<4x1x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3xf32>) -> tensor<12xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<4x3xf32>
          %1 = stablehlo.reshape %0 : (tensor<4x3xf32>) -> tensor<12xf32>
          return %1 : tensor<12xf32>
        }
    """
    inner = producer(op.operand, stablehlo.BroadcastInDimOp)
    if inner is None:
        return None
    before, after = m.shape(inner.result), m.shape(op.result)
    along = integers(inner.broadcast_dimensions)
    if [n for n in before if n != 1] != [n for n in after if n != 1] or any(before[d] == 1 for d in along):
        return None
    kept = [i for i, n in enumerate(after) if n != 1]
    where = dict(zip((i for i, n in enumerate(before) if n != 1), kept, strict=True))
    return m.broadcast(inner.operand, after, [where[d] for d in along])


@rewrite(stablehlo.TransposeOp, exact=True)
def transpose_of_broadcast(op):
    """A transposed broadcast is a broadcast along other dimensions.

    Before:
        func.func @main(%a: tensor<3xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [1] : (tensor<3xf32>) -> tensor<2x3xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          return %1 : tensor<3x2xf32>
        }
    After:
        func.func @main(%a: tensor<3xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [0] : (tensor<3xf32>) -> tensor<3x2xf32>
          return %0 : tensor<3x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          return %0 : tensor<3x2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.BroadcastInDimOp)
    if inner is None:
        return None
    order = integers(op.permutation)
    along = [order.index(d) for d in integers(inner.broadcast_dimensions)]
    return m.broadcast(inner.operand, m.shape(op.result), along)


@rewrite(stablehlo.BroadcastInDimOp, exact=True)
def broadcast_of_iota(op):
    """Counting along a dimension and repeating the count is counting in the larger array.

    Before:
        func.func @main() -> tensor<2x3xi32> {
          %0 = stablehlo.iota dim = 0 : tensor<3xi32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1] : (tensor<3xi32>) -> tensor<2x3xi32>
          return %1 : tensor<2x3xi32>
        }
    After:
        func.func @main() -> tensor<2x3xi32> {
          %0 = stablehlo.iota dim = 1 : tensor<2x3xi32>
          return %0 : tensor<2x3xi32>
        }
    Unchanged:
        func.func @main() -> tensor<2x3xi32> {
          %0 = stablehlo.iota dim = 0 : tensor<1xi32>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1] : (tensor<1xi32>) -> tensor<2x3xi32>
          return %1 : tensor<2x3xi32>
        }
    """
    inner = producer(op.operand, stablehlo.IotaOp)
    if inner is None:
        return None
    counted = inner.iota_dimension.value
    target = integers(op.broadcast_dimensions)[counted]
    if m.shape(op.operand)[counted] != m.shape(op.result)[target]:
        return None
    return stablehlo.iota(op.result.type, target)


@rewrite(stablehlo.ConvertOp, exact=True)
def convert_identity(op):
    """A conversion to the same type is nothing.

    Before:
        func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> {
          %0 = stablehlo.convert %a : tensor<2xf32>
          return %0 : tensor<2xf32>
        }
    After:
        func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> {
          return %a : tensor<2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2xi32>) -> tensor<2xui32> {
          %0 = stablehlo.convert %a : (tensor<2xi32>) -> tensor<2xui32>
          return %0 : tensor<2xui32>
        }
    """
    return op.operand if op.operand.type == op.result.type else None


_WIDER = {
    "i1": {"i8", "i16", "i32", "i64", "ui8", "ui16", "ui32", "ui64", "f16", "bf16", "f32", "f64"},
    "i8": {"i16", "i32", "i64", "f16", "bf16", "f32", "f64"},
    "i16": {"i32", "i64", "f32", "f64"},
    "i32": {"i64", "f64"},
    "ui8": {"i16", "i32", "i64", "ui16", "ui32", "ui64", "f16", "bf16", "f32", "f64"},
    "ui16": {"i32", "i64", "ui32", "ui64", "f32", "f64"},
    "ui32": {"i64", "ui64", "f64"},
    "f16": {"f32", "f64"},
    "bf16": {"f32", "f64"},
    "f32": {"f64"},
}


@rewrite(stablehlo.ConvertOp, exact=True)
def convert_of_widening(op):
    """A conversion after one that loses nothing is a conversion from the first type.

    Before:
        func.func @main(%a: tensor<2xbf16>) -> tensor<2xbf16> {
          %0 = stablehlo.convert %a : (tensor<2xbf16>) -> tensor<2xf32>
          %1 = stablehlo.convert %0 : (tensor<2xf32>) -> tensor<2xbf16>
          return %1 : tensor<2xbf16>
        }
    After:
        func.func @main(%a: tensor<2xbf16>) -> tensor<2xbf16> {
          return %a : tensor<2xbf16>
        }
    Unchanged:
        func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> {
          %0 = stablehlo.convert %a : (tensor<2xf32>) -> tensor<2xbf16>
          %1 = stablehlo.convert %0 : (tensor<2xbf16>) -> tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ConvertOp)
    if inner is None or m.element_type(op.operand) not in _WIDER.get(m.element_type(inner.operand), ()):
        return None
    return m.convert(inner.operand, m.element_type(op.result))


@rewrite(stablehlo.ReverseOp, exact=True)
def reverse_of_unit_dimensions(op):
    """Reversing dimensions of size 1 changes nothing.

    Before:
        func.func @main(%a: tensor<1x3xf32>) -> tensor<1x3xf32> {
          %0 = stablehlo.reverse %a, dims = [0] : tensor<1x3xf32>
          return %0 : tensor<1x3xf32>
        }
    After:
        func.func @main(%a: tensor<1x3xf32>) -> tensor<1x3xf32> {
          return %a : tensor<1x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<1x3xf32>) -> tensor<1x3xf32> {
          %0 = stablehlo.reverse %a, dims = [0, 1] : tensor<1x3xf32>
          return %0 : tensor<1x3xf32>
        }
    """
    dims = m.shape(op.operand)
    return op.operand if all(dims[d] == 1 for d in integers(op.dimensions)) else None


@rewrite(stablehlo.ReverseOp, exact=True)
def reverse_of_reverse(op):
    """Reversing the same dimensions twice changes nothing.

    Before:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          %0 = stablehlo.reverse %a, dims = [0, 1] : tensor<2x3xf32>
          %1 = stablehlo.reverse %0, dims = [1, 0] : tensor<2x3xf32>
          return %1 : tensor<2x3xf32>
        }
    After:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          return %a : tensor<2x3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3xf32>) -> tensor<2x3xf32> {
          %0 = stablehlo.reverse %a, dims = [0] : tensor<2x3xf32>
          %1 = stablehlo.reverse %0, dims = [1] : tensor<2x3xf32>
          return %1 : tensor<2x3xf32>
        }
    """
    inner = producer(op.operand, stablehlo.ReverseOp)
    if inner is None or set(integers(inner.dimensions)) != set(integers(op.dimensions)):
        return None
    return inner.operand
