"""Matrix products that take their operands as they lie."""

from __future__ import annotations

from kpx.ir import module as m
from kpx.ir.module import integers, ir, producer, splat, stablehlo
from kpx.ir.rewrite import rewrite


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def transpose_into_dot(op):
    """A transposed operand whose batches stay where they are is the operand, contracted along other dimensions.

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
    return _of_what_was_transposed(op, moves_batches=False)


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def transpose_of_batches_into_dot(op):
    """An operand whose batches a transpose has moved is the operand, with its batches where they were.

    Before:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<5x2x3xf32>) -> tensor<2x4x5xf32> {
          %0 = stablehlo.transpose %b, dims = [1, 0, 2] : (tensor<5x2x3xf32>) -> tensor<2x5x3xf32>
          %1 = stablehlo.dot_general %a, %0, batching_dims = [0] x [0], contracting_dims = [2] x [2] : (tensor<2x4x3xf32>, tensor<2x5x3xf32>) -> tensor<2x4x5xf32>
          return %1 : tensor<2x4x5xf32>
        }
    After:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<5x2x3xf32>) -> tensor<2x4x5xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [1], contracting_dims = [2] x [2] : (tensor<2x4x3xf32>, tensor<5x2x3xf32>) -> tensor<2x4x5xf32>
          return %0 : tensor<2x4x5xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<5x6x2x3xf32>) -> tensor<2x4x6x5xf32> {
          %0 = stablehlo.transpose %b, dims = [2, 1, 0, 3] : (tensor<5x6x2x3xf32>) -> tensor<2x6x5x3xf32>
          %1 = stablehlo.dot_general %a, %0, batching_dims = [0] x [0], contracting_dims = [2] x [3] : (tensor<2x4x3xf32>, tensor<2x6x5x3xf32>) -> tensor<2x4x6x5xf32>
          return %1 : tensor<2x4x6x5xf32>
        }
    """
    return _of_what_was_transposed(op, moves_batches=True)


@rewrite(
    stablehlo.TransposeOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def transposed_product_swaps_operands(op):
    """A product whose result's free dimensions are swapped is the product of its operands swapped.

    Before:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<2x3x5xf32>) -> tensor<2x5x4xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<2x4x3xf32>, tensor<2x3x5xf32>) -> tensor<2x4x5xf32>
          %1 = stablehlo.transpose %0, dims = [0, 2, 1] : (tensor<2x4x5xf32>) -> tensor<2x5x4xf32>
          return %1 : tensor<2x5x4xf32>
        }
    After:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<2x3x5xf32>) -> tensor<2x5x4xf32> {
          %0 = stablehlo.dot_general %b, %a, batching_dims = [0] x [0], contracting_dims = [1] x [2] : (tensor<2x3x5xf32>, tensor<2x4x3xf32>) -> tensor<2x5x4xf32>
          return %0 : tensor<2x5x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x4x3xf32>, %b: tensor<2x3x5xf32>) -> tensor<4x5x2xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<2x4x3xf32>, tensor<2x3x5xf32>) -> tensor<2x4x5xf32>
          %1 = stablehlo.transpose %0, dims = [1, 2, 0] : (tensor<2x4x5xf32>) -> tensor<4x5x2xf32>
          return %1 : tensor<4x5x2xf32>
        }
    """
    dot = producer(op.operand, stablehlo.DotGeneralOp)
    if dot is None or not m.has_one_use(op.operand):
        return None
    numbers = stablehlo.DotDimensionNumbers(dot.dot_dimension_numbers)
    batch, contracted = list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)
    lead, rank = len(batch), m.rank(dot.result)
    middle = m.rank(dot.lhs) - len(contracted)  # where the right operand's free dimensions begin
    if integers(op.permutation) != [*range(lead), *range(middle, rank), *range(lead, middle)]:
        return None
    precisions = dot.precision_config
    return stablehlo.dot_general(
        op.result.type,
        dot.rhs,
        dot.lhs,
        stablehlo.DotDimensionNumbers.get(
            list(numbers.rhs_batching_dimensions), batch, list(numbers.rhs_contracting_dimensions), contracted
        ),
        precision_config=None if precisions is None else ir.ArrayAttr.get(list(precisions)[::-1]),
        algorithm=dot.algorithm,
    )


def _of_what_was_transposed(op, *, moves_batches: bool):
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    sides = [
        (op.lhs, list(numbers.lhs_batching_dimensions), list(numbers.lhs_contracting_dimensions)),
        (op.rhs, list(numbers.rhs_batching_dimensions), list(numbers.rhs_contracting_dimensions)),
    ]
    new = [_without_transpose(*side, moves_batches=moves_batches) or side for side in sides]
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


def _without_transpose(value, batch, contract, *, moves_batches: bool):
    """The operand before its transpose, where the free dimensions keep their order."""
    inner = producer(value, stablehlo.TransposeOp)
    if inner is None:
        return None
    order = integers(inner.permutation)
    free = [d for i, d in enumerate(order) if i not in batch and i not in contract]
    if free != sorted(free) or any(order[d] != d for d in batch) != moves_batches:
        return None
    return inner.operand, [order[d] for d in batch], [order[d] for d in contract]


@rewrite(stablehlo.MulOp, exact=True)
def scaling_before_transpose(op):
    """A transposed value times a number is transposed after: a product can then read it as it lies.

    Before:
        func.func @main(%a: tensor<4x3xf32>) -> tensor<3x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.constant dense<0.3> : tensor<3x4xf32>
          %2 = stablehlo.multiply %0, %1 : tensor<3x4xf32>
          return %2 : tensor<3x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>) -> tensor<3x4xf32> {
          %0 = stablehlo.constant dense<0.3> : tensor<4x3xf32>
          %1 = stablehlo.multiply %a, %0 : tensor<4x3xf32>
          %2 = stablehlo.transpose %1, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          return %2 : tensor<3x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<3x4xf32>) -> tensor<3x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.multiply %0, %b : tensor<3x4xf32>
          return %1 : tensor<3x4xf32>
        }
    """
    for value, factor in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        inner = producer(value, stablehlo.TransposeOp)
        if inner is not None and (number := splat(factor)) is not None:
            scaled = stablehlo.multiply(inner.operand, m.full(m.tensor_type(inner.operand), number))
            return m.transpose(scaled, integers(inner.permutation))
    return None


@rewrite(
    stablehlo.DotGeneralOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def merged_batch_of_dot(op):
    """Operands whose batch dimensions were merged into one for a product are multiplied as they were.

    PyTorch multiplies stacks of matrices by one dimension; the products of heads then lie as what is around them.

    Before:
        func.func @main(%a: tensor<2x3x4x5xf32>, %b: tensor<2x3x5x6xf32>) -> tensor<6x4x6xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x3x4x5xf32>) -> tensor<6x4x5xf32>
          %1 = stablehlo.reshape %b : (tensor<2x3x5x6xf32>) -> tensor<6x5x6xf32>
          %2 = stablehlo.dot_general %0, %1, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<6x4x5xf32>, tensor<6x5x6xf32>) -> tensor<6x4x6xf32>
          return %2 : tensor<6x4x6xf32>
        }
    After:
        func.func @main(%a: tensor<2x3x4x5xf32>, %b: tensor<2x3x5x6xf32>) -> tensor<6x4x6xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0, 1] x [0, 1], contracting_dims = [3] x [2] : (tensor<2x3x4x5xf32>, tensor<2x3x5x6xf32>) -> tensor<2x3x4x6xf32>
          %1 = stablehlo.reshape %0 : (tensor<2x3x4x6xf32>) -> tensor<6x4x6xf32>
          return %1 : tensor<6x4x6xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3x4x5xf32>, %b: tensor<3x2x5x6xf32>) -> tensor<6x4x6xf32> {
          %0 = stablehlo.reshape %a : (tensor<2x3x4x5xf32>) -> tensor<6x4x5xf32>
          %1 = stablehlo.reshape %b : (tensor<3x2x5x6xf32>) -> tensor<6x5x6xf32>
          %2 = stablehlo.dot_general %0, %1, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<6x4x5xf32>, tensor<6x5x6xf32>) -> tensor<6x4x6xf32>
          return %2 : tensor<6x4x6xf32>
        }
    """
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    lhs_batch, rhs_batch = list(numbers.lhs_batching_dimensions), list(numbers.rhs_batching_dimensions)
    lhs, rhs = producer(op.lhs, stablehlo.ReshapeOp), producer(op.rhs, stablehlo.ReshapeOp)
    if (lhs_batch, rhs_batch) != ([0], [0]) or lhs is None or rhs is None:
        return None
    merged = [_merged(r) for r in (lhs, rhs)]
    if merged[0] is None or merged[0] != merged[1]:
        return None
    result_type = m.tensor([*merged[0], *m.shape(op.result)[1:]], m.element_type(op.result))
    product = _by_batches(op, lhs.operand, rhs.operand, result_type, len(merged[0]))
    return m.reshape(product, m.shape(op.result))


@rewrite(
    stablehlo.ReshapeOp,
    exact=False,
    bound="the products of each sum may be added in another order: a few ulps of the largest partial sum",
)
def split_batch_of_dot(op):
    """Where a product's batch dimension is split again, its operands are split before.

    What comes after, a transpose above all, can then be written by the product.

    Before:
        func.func @main(%a: tensor<6x4x5xf32>, %b: tensor<6x5x7xf32>) -> tensor<2x3x4x7xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<6x4x5xf32>, tensor<6x5x7xf32>) -> tensor<6x4x7xf32>
          %1 = stablehlo.reshape %0 : (tensor<6x4x7xf32>) -> tensor<2x3x4x7xf32>
          return %1 : tensor<2x3x4x7xf32>
        }
    After:
        func.func @main(%a: tensor<6x4x5xf32>, %b: tensor<6x5x7xf32>) -> tensor<2x3x4x7xf32> {
          %0 = stablehlo.reshape %a : (tensor<6x4x5xf32>) -> tensor<2x3x4x5xf32>
          %1 = stablehlo.reshape %b : (tensor<6x5x7xf32>) -> tensor<2x3x5x7xf32>
          %2 = stablehlo.dot_general %0, %1, batching_dims = [0, 1] x [0, 1], contracting_dims = [3] x [2] : (tensor<2x3x4x5xf32>, tensor<2x3x5x7xf32>) -> tensor<2x3x4x7xf32>
          return %2 : tensor<2x3x4x7xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<6x4x5xf32>, %b: tensor<6x5x7xf32>) -> tensor<6x2x2x7xf32> {
          %0 = stablehlo.dot_general %a, %b, batching_dims = [0] x [0], contracting_dims = [2] x [1] : (tensor<6x4x5xf32>, tensor<6x5x7xf32>) -> tensor<6x4x7xf32>
          %1 = stablehlo.reshape %0 : (tensor<6x4x7xf32>) -> tensor<6x2x2x7xf32>
          return %1 : tensor<6x2x2x7xf32>
        }
    """
    dot = producer(op.operand, stablehlo.DotGeneralOp)
    if dot is None or not m.has_one_use(op.operand):
        return None
    before, after = m.shape(op.operand), m.shape(op.result)
    lead = len(after) - len(before) + 1
    numbers = stablehlo.DotDimensionNumbers(dot.dot_dimension_numbers)
    batches = list(numbers.lhs_batching_dimensions), list(numbers.rhs_batching_dimensions)
    if lead < 2 or after[lead:] != before[1:] or batches != ([0], [0]):
        return None
    lhs, rhs = (m.reshape(v, [*after[:lead], *m.shape(v)[1:]]) for v in (dot.lhs, dot.rhs))
    return _by_batches(dot, lhs, rhs, op.result.type, lead)


def _by_batches(dot, lhs, rhs, result_type, lead: int):
    """A product with its one leading batch dimension made several."""
    numbers = stablehlo.DotDimensionNumbers(dot.dot_dimension_numbers)
    return stablehlo.dot_general(
        result_type,
        lhs,
        rhs,
        stablehlo.DotDimensionNumbers.get(
            list(range(lead)),
            list(range(lead)),
            [d + lead - 1 for d in numbers.lhs_contracting_dimensions],
            [d + lead - 1 for d in numbers.rhs_contracting_dimensions],
        ),
        precision_config=dot.precision_config,
        algorithm=dot.algorithm,
    )


def _merged(reshape) -> list[int] | None:
    """The leading dimensions that a reshape makes one, or None where it does anything else."""
    before, after = m.shape(reshape.operand), m.shape(reshape.result)
    lead = len(before) - len(after) + 1
    return list(before[:lead]) if lead > 1 and before[lead:] == after[1:] else None
