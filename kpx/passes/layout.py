"""Transposes move towards the outputs until they cancel, or end in an op that takes any order."""

from __future__ import annotations

from kpx.ir import module as m
from kpx.ir.module import integers, ir, producer, splat, stablehlo
from kpx.ir.rewrite import Rewrite, rewrite
from kpx.ir.split import depends_on_weights_alone

_ELEMENTWISE = (
    stablehlo.AbsOp, stablehlo.AddOp, stablehlo.AndOp, stablehlo.CbrtOp, stablehlo.CeilOp, stablehlo.ClampOp,
    stablehlo.CompareOp, stablehlo.ConvertOp, stablehlo.CosineOp, stablehlo.DivOp, stablehlo.ExpOp,
    stablehlo.Expm1Op, stablehlo.FloorOp, stablehlo.Log1pOp, stablehlo.LogOp, stablehlo.LogisticOp,
    stablehlo.MaxOp, stablehlo.MinOp, stablehlo.MulOp, stablehlo.NegOp, stablehlo.NotOp, stablehlo.OrOp,
    stablehlo.PowOp, stablehlo.RemOp, stablehlo.RsqrtOp, stablehlo.SelectOp, stablehlo.SignOp,
    stablehlo.SineOp, stablehlo.SqrtOp, stablehlo.SubtractOp, stablehlo.TanhOp, stablehlo.XorOp,
    m.chlo.ErfOp, m.chlo.ErfInvOp,
)  # fmt: skip


def _inverse(order):
    return sorted(range(len(order)), key=order.__getitem__)


@rewrite(*_ELEMENTWISE, exact=True)
def transpose_past_elementwise(op):
    """An elementwise op on transposed values is the transpose of the op on the values.

    Other operands must be numbers, broadcasts of something smaller, or weights, which cost nothing to
    bring into the other order.

    Before:
        func.func @main(%a: tensor<2x3xf32>, %b: tensor<2xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          %1 = stablehlo.broadcast_in_dim %b, dims = [1] : (tensor<2xf32>) -> tensor<3x2xf32>
          %2 = stablehlo.add %0, %1 : tensor<3x2xf32>
          return %2 : tensor<3x2xf32>
        }
    After:
        func.func @main(%a: tensor<2x3xf32>, %b: tensor<2xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.broadcast_in_dim %b, dims = [0] : (tensor<2xf32>) -> tensor<2x3xf32>
          %1 = stablehlo.add %a, %0 : tensor<2x3xf32>
          %2 = stablehlo.transpose %1, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          return %2 : tensor<3x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3xf32>, %b: tensor<3x2xf32>) -> tensor<3x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          %1 = stablehlo.add %0, %b : tensor<3x2xf32>
          return %1 : tensor<3x2xf32>
        }
    """
    order = next((integers(t.permutation) for o in op.operands if (t := producer(o, stablehlo.TransposeOp))), None)
    if order is None:
        return None
    dims = m.shape(op.results[0])
    if any(m.shape(o) != dims for o in op.operands):
        return None
    back = _inverse(order)
    moved = [_in_order(o, order, back) for o in op.operands]
    if any(v is None for v in moved):
        return None
    element = m.tensor_type(op.results[0]).element_type
    inner = m.rebuild(op, moved, [m.tensor([dims[d] for d in back], element)])
    return m.transpose(inner.results[0], order)


def _in_order(value, order, back):
    """A value before its transpose by `order`, or brought there for nothing; None where it costs."""
    op = producer(value)
    if isinstance(op, stablehlo.TransposeOp) and integers(op.permutation) == order:
        return op.operand
    if splat(value) is not None:
        dims = m.shape(value)
        return m.full(m.tensor([dims[d] for d in back], m.tensor_type(value).element_type), splat(value))
    if isinstance(op, stablehlo.BroadcastInDimOp) and 2 * m.size(op.operand) <= m.size(value):
        along = [order[d] for d in integers(op.broadcast_dimensions)]
        return m.broadcast(op.operand, [m.shape(value)[d] for d in back], along)
    return m.transpose(value, back) if depends_on_weights_alone(value) else None


@rewrite(
    stablehlo.ReduceOp,
    exact=False,
    bound="sums may be added in another order: a few ulps of the largest partial sum",
)
def transpose_past_reduce(op):
    """A reduction of a transposed array is a reduction of the array along other dimensions.

    Before:
        func.func @main(%a: tensor<2x3x4xf32>, %i: tensor<f32>) -> tensor<4x2xf32> {
          %0 = stablehlo.transpose %a, dims = [2, 0, 1] : (tensor<2x3x4xf32>) -> tensor<4x2x3xf32>
          %1 = stablehlo.reduce(%0 init: %i) applies stablehlo.add across dimensions = [2] : (tensor<4x2x3xf32>, tensor<f32>) -> tensor<4x2xf32>
          return %1 : tensor<4x2xf32>
        }
    After:
        func.func @main(%a: tensor<2x3x4xf32>, %i: tensor<f32>) -> tensor<4x2xf32> {
          %0 = stablehlo.reduce(%a init: %i) applies stablehlo.add across dimensions = [1] : (tensor<2x3x4xf32>, tensor<f32>) -> tensor<2x4xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<2x4xf32>) -> tensor<4x2xf32>
          return %1 : tensor<4x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x3x4xf32>, %i: tensor<f32>) -> tensor<2x3xf32> {
          %1 = stablehlo.reduce(%a init: %i) applies stablehlo.add across dimensions = [2] : (tensor<2x3x4xf32>, tensor<f32>) -> tensor<2x3xf32>
          return %1 : tensor<2x3xf32>
        }
    """
    if len(op.inputs) != 1 or (inner := producer(op.inputs[0], stablehlo.TransposeOp)) is None:
        return None
    order, dims = integers(inner.permutation), integers(op.dimensions)
    left = [d for i, d in enumerate(order) if i not in dims]
    kept = sorted(left)
    shape = m.shape(inner.operand)
    element = m.tensor_type(op.results[0]).element_type
    reduced = stablehlo.ReduceOp(
        [m.tensor([shape[d] for d in kept], element)],
        [inner.operand],
        list(op.init_values),
        m.i64_array(sorted(order[d] for d in dims)),
    )
    _copy_body(op, reduced)
    return m.transpose(reduced.results[0], [kept.index(d) for d in left])


def _copy_body(source, target) -> None:
    """Gives a new reduction the body of an old one."""
    old = source.regions[0].blocks[0]
    block = target.regions[0].blocks.append(*(a.type for a in old.arguments))
    new = dict(zip(old.arguments, block.arguments, strict=True))
    with ir.InsertionPoint(block):
        for op in old.operations:
            new.update(zip(op.results, m.clone(op, new).results, strict=True))


@rewrite(stablehlo.ReduceWindowOp, exact=True)
def transpose_past_reduce_window(op):
    """Pooling a transposed array is transposing the pooled array.

    Before:
        func.func @main(%a: tensor<4x3xf32>, %i: tensor<f32>) -> tensor<3x2xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = "stablehlo.reduce_window"(%0, %i) <{window_dimensions = array<i64: 1, 2>, window_strides = array<i64: 1, 2>}> ({
          ^bb0(%x: tensor<f32>, %y: tensor<f32>):
            %2 = stablehlo.maximum %x, %y : tensor<f32>
            stablehlo.return %2 : tensor<f32>
          }) : (tensor<3x4xf32>, tensor<f32>) -> tensor<3x2xf32>
          return %1 : tensor<3x2xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>, %i: tensor<f32>) -> tensor<3x2xf32> {
          %1 = "stablehlo.reduce_window"(%a, %i) <{window_dimensions = array<i64: 2, 1>, window_strides = array<i64: 2, 1>}> ({
          ^bb0(%x: tensor<f32>, %y: tensor<f32>):
            %2 = stablehlo.maximum %x, %y : tensor<f32>
            stablehlo.return %2 : tensor<f32>
          }) : (tensor<4x3xf32>, tensor<f32>) -> tensor<2x3xf32>
          %0 = stablehlo.transpose %1, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
          return %0 : tensor<3x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3x4xf32>, %i: tensor<f32>) -> tensor<3x2xf32> {
          %1 = "stablehlo.reduce_window"(%a, %i) <{window_dimensions = array<i64: 1, 2>, window_strides = array<i64: 1, 2>}> ({
          ^bb0(%x: tensor<f32>, %y: tensor<f32>):
            %2 = stablehlo.maximum %x, %y : tensor<f32>
            stablehlo.return %2 : tensor<f32>
          }) : (tensor<3x4xf32>, tensor<f32>) -> tensor<3x2xf32>
          return %1 : tensor<3x2xf32>
        }
    """
    if len(op.inputs) != 1 or (inner := producer(op.inputs[0], stablehlo.TransposeOp)) is None:
        return None
    order = integers(inner.permutation)
    back = _inverse(order)

    def permuted(attribute):
        return None if attribute is None else m.i64_array([integers(attribute)[d] for d in back])

    padding = op.padding
    if padding is not None:
        padding = m.pairs_attribute([m.pairs(padding)[d] for d in back])
    kind = m.tensor_type(op.results[0])
    pooled = stablehlo.ReduceWindowOp(
        [m.tensor([kind.shape[d] for d in back], kind.element_type)],
        [inner.operand],
        list(op.init_values),
        permuted(op.window_dimensions),
        window_strides=permuted(op.window_strides),
        base_dilations=permuted(op.base_dilations),
        window_dilations=permuted(op.window_dilations),
        padding=padding,
    )
    _copy_body(op, pooled)
    return m.transpose(pooled.results[0], order)


@rewrite(stablehlo.PadOp, exact=True)
def transpose_past_pad(op):
    """Padding a transposed array is transposing the padded array.

    Before:
        func.func @main(%a: tensor<4x3xf32>, %v: tensor<f32>) -> tensor<4x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.pad %0, %v, low = [1, 0], high = [0, 0], interior = [0, 0] : (tensor<3x4xf32>, tensor<f32>) -> tensor<4x4xf32>
          return %1 : tensor<4x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>, %v: tensor<f32>) -> tensor<4x4xf32> {
          %0 = stablehlo.pad %a, %v, low = [0, 1], high = [0, 0], interior = [0, 0] : (tensor<4x3xf32>, tensor<f32>) -> tensor<4x4xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x4xf32>) -> tensor<4x4xf32>
          return %1 : tensor<4x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3x4xf32>, %v: tensor<f32>) -> tensor<4x4xf32> {
          %1 = stablehlo.pad %a, %v, low = [1, 0], high = [0, 0], interior = [0, 0] : (tensor<3x4xf32>, tensor<f32>) -> tensor<4x4xf32>
          return %1 : tensor<4x4xf32>
        }
    """
    inner = producer(op.operand, stablehlo.TransposeOp)
    if inner is None:
        return None
    order = integers(inner.permutation)
    back = _inverse(order)
    amounts = (op.edge_padding_low, op.edge_padding_high, op.interior_padding)
    padded = stablehlo.pad(
        inner.operand, op.padding_value, *(m.i64_array([integers(a)[d] for d in back]) for a in amounts)
    )
    return m.transpose(padded, order)


@rewrite(stablehlo.SliceOp, exact=True)
def transpose_past_slice(op):
    """A slice of a transposed array is the transpose of a slice.

    Before:
        func.func @main(%a: tensor<4x3xf32>) -> tensor<2x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.slice %0 [1:3, 0:4] : (tensor<3x4xf32>) -> tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>) -> tensor<2x4xf32> {
          %0 = stablehlo.slice %a [0:4, 1:3] : (tensor<4x3xf32>) -> tensor<4x2xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x2xf32>) -> tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3x4xf32>) -> tensor<2x4xf32> {
          %1 = stablehlo.slice %a [1:3, 0:4] : (tensor<3x4xf32>) -> tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    """
    inner = producer(op.operand, stablehlo.TransposeOp)
    if inner is None or depends_on_weights_alone(inner.operand):  # one transpose at load beats many
        return None
    order = integers(inner.permutation)
    back = _inverse(order)
    bounds = (op.start_indices, op.limit_indices, op.strides)
    return m.transpose(m.slice_(inner.operand, *([integers(b)[d] for d in back] for b in bounds)), order)


@rewrite(stablehlo.ConcatenateOp, exact=True)
def transpose_past_concatenate(op):
    """Arrays transposed alike and joined are the transpose of the arrays joined.

    Before:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<4x2xf32>) -> tensor<5x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.transpose %b, dims = [1, 0] : (tensor<4x2xf32>) -> tensor<2x4xf32>
          %2 = stablehlo.concatenate %0, %1, dim = 0 : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<5x4xf32>
          return %2 : tensor<5x4xf32>
        }
    After:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<4x2xf32>) -> tensor<5x4xf32> {
          %0 = stablehlo.concatenate %a, %b, dim = 1 : (tensor<4x3xf32>, tensor<4x2xf32>) -> tensor<4x5xf32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<4x5xf32>) -> tensor<5x4xf32>
          return %1 : tensor<5x4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4x3xf32>, %b: tensor<2x4xf32>) -> tensor<5x4xf32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<4x3xf32>) -> tensor<3x4xf32>
          %1 = stablehlo.concatenate %0, %b, dim = 0 : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<5x4xf32>
          return %1 : tensor<5x4xf32>
        }
    """
    parts = [producer(p, stablehlo.TransposeOp) for p in op.inputs]
    if any(p is None for p in parts) or len({tuple(integers(p.permutation)) for p in parts}) != 1:
        return None
    order = integers(parts[0].permutation)
    joined = stablehlo.concatenate([p.operand for p in parts], order[op.dimension.value])
    return m.transpose(joined, order)


RULES: list[Rewrite] = [rule for rule in list(globals().values()) if isinstance(rule, Rewrite)]
