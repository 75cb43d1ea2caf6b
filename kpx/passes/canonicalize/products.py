"""Matrix products that take their operands as they lie."""

from __future__ import annotations

from kpx.ir.module import integers, producer, stablehlo
from kpx.ir.rewrite import rewrite


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def transpose_into_dot(op):
    """A transposed operand is the operand, contracted along other dimensions.

    Before:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<5x3xf32>) -> tensor<4x5xf32> {
          %0 = stablehlo.transpose %b, dims = [1, 0] : (tensor<5x3xf32>) -> tensor<3x5xf32>
          %1 = stablehlo.dot_general %a, %0, contracting_dims = [1] x [0] : (tensor<4x3xf32>, tensor<3x5xf32>) -> tensor<4x5xf32>
          return %1 : tensor<4x5xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<5x3xf32>) -> tensor<4x5xf32> {
          %0 = stablehlo.dot_general %a, %b, contracting_dims = [1] x [1] : (tensor<4x3xf32>, tensor<5x3xf32>) -> tensor<4x5xf32>
          return %0 : tensor<4x5xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<2x5x3xf32>) -> tensor<4x5x2xf32> {
          %0 = stablehlo.transpose %b, dims = [2, 1, 0] : (tensor<2x5x3xf32>) -> tensor<3x5x2xf32>
          %1 = stablehlo.dot_general %a, %0, contracting_dims = [1] x [0] : (tensor<4x3xf32>, tensor<3x5x2xf32>) -> tensor<4x5x2xf32>
          return %1 : tensor<4x5x2xf32>
        }
    """
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    sides = [
        (op.lhs, list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)),
        (op.rhs, list(numbers.rhs_batching_dimensions), list(numbers.rhs_contracting_dimensions)),
    ]
    new = [_without_transpose(*side) or side for side in sides]
    if new == sides:
        return None
    (lhs, lhs_batch, lhs_contract), (rhs, rhs_batch, rhs_contract) = new
    return stablehlo.dot_general(
        op.result.type,
        lhs,
        rhs,
        stablehlo.DotDimensionNumbers.get(lhs_batch, rhs_batch, lhs_contract, rhs_contract),
        precision_config=op.precision_config,
        algorithm=op.algorithm,
    )


def _without_transpose(value, batch, contract):
    """The operand before its transpose, where the free dimensions keep their order."""
    inner = producer(value, stablehlo.TransposeOp)
    if inner is None:
        return None
    order = integers(inner.permutation)
    free = [d for i, d in enumerate(order) if i not in batch and i not in contract]
    if free != sorted(free):
        return None
    return inner.operand, [order[d] for d in batch], [order[d] for d in contract]
