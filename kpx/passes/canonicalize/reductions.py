"""Reductions that do less, with the same bits."""

from __future__ import annotations

from kpx.ir import module as m
from kpx.ir.module import integers, ir, producer, stablehlo
from kpx.ir.rewrite import rewrite

_MONOIDS = (stablehlo.AddOp, stablehlo.MulOp, stablehlo.MaxOp, stablehlo.MinOp, stablehlo.AndOp, stablehlo.OrOp)
_IDEMPOTENT = (stablehlo.MaxOp, stablehlo.MinOp, stablehlo.AndOp, stablehlo.OrOp)


def _monoid(op) -> type | None:
    """The op class a single-operand reduction combines with, where its body is that one op."""
    if len(op.inputs) != 1:
        return None
    body = op.regions[0].blocks[0]
    inner = list(body.operations)
    if len(inner) != 2 or not isinstance(inner[0], _MONOIDS):
        return None
    if {*inner[0].operands} != {*body.arguments} or list(inner[1].operands) != [inner[0].result]:
        return None
    return type(inner[0])


@rewrite(stablehlo.ReduceOp, exact=True)
def reduce_of_unit_dimensions(op):
    """A reduction over dimensions of size 1, or none, combines each element with the initial value.

    Before:
        func.func @main(%a: tensor<4x1xf32>, %i: tensor<f32>) -> tensor<4xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.maximum across dimensions = [1] : (tensor<4x1xf32>, tensor<f32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4x1xf32>, %i: tensor<f32>) -> tensor<4xf32> {
          %0 = stablehlo.reshape %a : (tensor<4x1xf32>) -> tensor<4xf32>
          %1 = stablehlo.broadcast_in_dim %i, dims = [] : (tensor<f32>) -> tensor<4xf32>
          %2 = stablehlo.maximum %0, %1 : tensor<4xf32>
          return %2 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x2xf32>, %i: tensor<f32>) -> tensor<4xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.maximum across dimensions = [1] : (tensor<4x2xf32>, tensor<f32>) -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    kind = _monoid(op)
    if kind is None or any(m.shape(op.inputs[0])[d] != 1 for d in integers(op.dimensions)):
        return None
    dims = m.shape(op.results[0])
    return kind(m.reshape(op.inputs[0], dims), m.broadcast(op.init_values[0], dims, [])).result


@rewrite(stablehlo.ReduceOp, exact=True)
def reduce_of_reduce(op):
    """A maximum of maxima is one maximum (so for minimum, and, or), from one initial value.

    Before:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<3xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.maximum across dimensions = [0] : (tensor<4x3x2xf32>, tensor<f32>) -> tensor<3x2xf32>
          %1 = stablehlo.reduce(%0 init: %i) applies stablehlo.maximum across dimensions = [1] : (tensor<3x2xf32>, tensor<f32>) -> tensor<3xf32>
          return %1 : tensor<3xf32>
        }
    After:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<3xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.maximum across dimensions = [0, 2] : (tensor<4x3x2xf32>, tensor<f32>) -> tensor<3xf32>
          return %0 : tensor<3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<3xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.minimum across dimensions = [0] : (tensor<4x3x2xf32>, tensor<f32>) -> tensor<3x2xf32>
          %1 = stablehlo.reduce(%0 init: %i) applies stablehlo.maximum across dimensions = [1] : (tensor<3x2xf32>, tensor<f32>) -> tensor<3xf32>
          return %1 : tensor<3xf32>
        }
    """
    inner, kind = producer(op.inputs[0], stablehlo.ReduceOp), _monoid(op)
    if inner is None or kind not in _IDEMPOTENT or _monoid(inner) is not kind:
        return None
    if not m.same_value(inner.init_values[0], op.init_values[0]):
        return None
    gone = integers(inner.dimensions)
    left = [d for d in range(m.rank(inner.inputs[0])) if d not in gone]
    dims = sorted(gone + [left[d] for d in integers(op.dimensions)])
    return _reduced(kind, inner.inputs[0], op.init_values[0], dims, op.results[0].type)


def _reduced(kind, value, initial, dims, result_type):
    reduction = stablehlo.ReduceOp([result_type], [value], [initial], m.i64_array(dims))
    scalar = initial.type
    block = reduction.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        stablehlo.return_([kind(*block.arguments).result])
    return reduction.results[0]


@rewrite(stablehlo.ReduceOp, exact=True)
def reduce_of_transpose(op):
    """A maximum over a transposed array is one over the array (minimum, and, or; sums by integers).

    Before:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<4x2xf32> {
          %0 = stablehlo.transpose %a, dims = [0, 2, 1] : (tensor<4x3x2xf32>) -> tensor<4x2x3xf32>
          %1 = stablehlo.reduce(%0 init: %i) applies stablehlo.maximum across dimensions = [2] : (tensor<4x2x3xf32>, tensor<f32>) -> tensor<4x2xf32>
          return %1 : tensor<4x2xf32>
        }
    After:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<4x2xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.maximum across dimensions = [1] : (tensor<4x3x2xf32>, tensor<f32>) -> tensor<4x2xf32>
          return %0 : tensor<4x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3x2xf32>, %i: tensor<f32>) -> tensor<4x2xf32> {
          %0 = stablehlo.transpose %a, dims = [0, 2, 1] : (tensor<4x3x2xf32>) -> tensor<4x2x3xf32>
          %1 = stablehlo.reduce(%0 init: %i) applies stablehlo.add across dimensions = [2] : (tensor<4x2x3xf32>, tensor<f32>) -> tensor<4x2xf32>
          return %1 : tensor<4x2xf32>
        }
    """
    inner, kind = producer(op.inputs[0], stablehlo.TransposeOp), _monoid(op)
    if inner is None or kind is None or (kind not in _IDEMPOTENT and not m.is_integer(inner.operand)):
        return None
    order, dims = integers(inner.permutation), integers(op.dimensions)
    left = [d for i, d in enumerate(order) if i not in dims]
    if left != sorted(left):
        return None
    return _reduced(kind, inner.operand, op.init_values[0], sorted(order[d] for d in dims), op.results[0].type)
