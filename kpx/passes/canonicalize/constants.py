"""Ops whose operands are all known are computed now, where that is exact.

Integers and bools up to `MOST` elements; floating-point only where every element is one number, and
only by operations that IEEE 754 rounds correctly, so that the compiled program would give the same bits.
"""

from __future__ import annotations

import numpy as np

from kpx.ir import module as m
from kpx.ir.module import integers, producer, splat, stablehlo
from kpx.ir.rewrite import rewrite

MOST = 1 << 18

_BINARY = {
    stablehlo.AddOp: np.add,
    stablehlo.SubtractOp: np.subtract,
    stablehlo.MulOp: np.multiply,
    stablehlo.MaxOp: np.maximum,
    stablehlo.MinOp: np.minimum,
    stablehlo.AndOp: np.bitwise_and,
    stablehlo.OrOp: np.bitwise_or,
    stablehlo.XorOp: np.bitwise_xor,
}
_UNARY = {stablehlo.NegOp: np.negative, stablehlo.AbsOp: np.abs, stablehlo.NotOp: np.bitwise_not}
_COMPARISONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal,
    "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip


_KNOWN = (
    stablehlo.ConstantOp,
    stablehlo.IotaOp,
    stablehlo.BroadcastInDimOp,
    stablehlo.ReshapeOp,
    stablehlo.TransposeOp,
)


def known(value, depth: int = 8) -> np.ndarray | None:
    """The array a value always is: a constant, a count, or one of them moved; None where unknown."""
    op = producer(value)
    if not isinstance(op, _KNOWN) or not depth or m.size(value) > MOST:
        return None
    if isinstance(op, stablehlo.ConstantOp):
        return m.constant_value(value, MOST)
    dims = m.shape(value)
    if isinstance(op, stablehlo.IotaOp):
        kind, axis = m.dtype(value), op.iota_dimension.value
        if kind is None or kind.kind not in "iu":
            return None
        count = np.arange(dims[axis]).astype(kind)
        return np.broadcast_to(count.reshape([-1 if i == axis else 1 for i in range(len(dims))]), dims)
    inner = known(op.operands[0], depth - 1)
    return None if inner is None else _moved(op, inner, dims)


def _moved(op, array: np.ndarray, dims) -> np.ndarray:
    if isinstance(op, stablehlo.TransposeOp):
        return array.transpose(integers(op.permutation))
    if isinstance(op, stablehlo.ReshapeOp):
        return array.reshape(dims)
    along, padded = integers(op.broadcast_dimensions), [1] * len(dims)
    for i, d in enumerate(along):
        padded[d] = array.shape[i]
    order = np.argsort(along)
    return np.broadcast_to(array.transpose(order).reshape(padded), dims)


def _all_known(op) -> list[np.ndarray] | None:
    arrays = []
    for operand in op.operands:
        array = known(operand)
        if array is None:
            return None
        arrays.append(array)
    return arrays


def _foldable(value) -> bool:
    return m.is_integer(value) and m.element_type(value) not in ("i4", "ui4", "i2", "ui2")


@rewrite(*_BINARY, *_UNARY, exact=True)
def fold_integers(op):
    """Integer arithmetic and logic on known values is computed now.

    Before:
        func.func @main() -> tensor<3xi32> {
          %0 = stablehlo.iota dim = 0 : tensor<3xi32>
          %1 = stablehlo.constant dense<5> : tensor<3xi32>
          %2 = stablehlo.multiply %0, %1 : tensor<3xi32>
          return %2 : tensor<3xi32>
        }
    After:
        func.func @main() -> tensor<3xi32> {
          %0 = stablehlo.constant dense<[0, 5, 10]> : tensor<3xi32>
          return %0 : tensor<3xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<3xi32>) -> tensor<3xi32> {
          %0 = stablehlo.constant dense<5> : tensor<3xi32>
          %1 = stablehlo.multiply %a, %0 : tensor<3xi32>
          return %1 : tensor<3xi32>
        }
    """
    arrays = _all_known(op)
    if arrays is None or not _foldable(op.result):
        return None
    function = _BINARY.get(type(op)) or _UNARY[type(op)]
    kind = arrays[0].dtype
    if kind.kind == "b" and type(op) in (stablehlo.AddOp, stablehlo.SubtractOp, stablehlo.MulOp, stablehlo.NegOp):
        return None
    with np.errstate(over="ignore"):
        return m.constant(function(*arrays).astype(kind))


@rewrite(stablehlo.AddOp, stablehlo.SubtractOp, stablehlo.MulOp, stablehlo.NegOp, exact=True)
def fold_floats(op):
    """Floating-point arithmetic on numbers known everywhere is computed now, rounded as IEEE 754 says.

    Before:
        func.func @main() -> tensor<3xf32> {
          %0 = stablehlo.constant dense<2.5> : tensor<3xf32>
          %1 = stablehlo.constant dense<4.0> : tensor<3xf32>
          %2 = stablehlo.multiply %0, %1 : tensor<3xf32>
          return %2 : tensor<3xf32>
        }
    After:
        func.func @main() -> tensor<3xf32> {
          %0 = stablehlo.constant dense<10.0> : tensor<3xf32>
          return %0 : tensor<3xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<3xf32>) -> tensor<3xf32> {
          %0 = stablehlo.constant dense<2.5> : tensor<3xf32>
          %1 = stablehlo.add %a, %0 : tensor<3xf32>
          return %1 : tensor<3xf32>
        }
    """
    numbers = [n for o in op.operands if (n := splat(o)) is not None]
    if len(numbers) < len(op.operands) or not m.is_float(op.result) or (kind := m.dtype(op.result)) is None:
        return None
    function = _BINARY.get(type(op)) or _UNARY[type(op)]
    with np.errstate(all="ignore"):
        result = function(*(np.asarray(n, kind) for n in numbers))
    # Subnormal numbers may be flushed to zero at run time: leave those alone.
    if not np.isfinite(result) or (result != 0 and abs(float(result)) < 1e-30):
        return None
    return m.like(op.result, float(result))


@rewrite(stablehlo.ConvertOp, exact=True)
def fold_convert(op):
    """A conversion of known integers, or of one number, is computed now.

    Before:
        func.func @main() -> tensor<3xf32> {
          %0 = stablehlo.constant dense<7> : tensor<3xi32>
          %1 = stablehlo.convert %0 : (tensor<3xi32>) -> tensor<3xf32>
          return %1 : tensor<3xf32>
        }
    After:
        func.func @main() -> tensor<3xf32> {
          %0 = stablehlo.constant dense<7.0> : tensor<3xf32>
          return %0 : tensor<3xf32>
        }
    Unchanged:
        func.func @main() -> tensor<3xi32> {
          %0 = stablehlo.constant dense<7.5> : tensor<3xf32>
          %1 = stablehlo.convert %0 : (tensor<3xf32>) -> tensor<3xi32>
          return %1 : tensor<3xi32>
        }
    """
    if not isinstance(producer(op.operand), _KNOWN):
        return None
    source, target = m.dtype(op.operand), m.dtype(op.result)
    if source is None or target is None or target.kind == "c":
        return None
    if _foldable(op.result) and _foldable(op.operand):
        array = known(op.operand)
        return None if array is None else m.constant((array != 0) if target.kind == "b" else array.astype(target))
    number = splat(op.operand)
    if number is None or not m.is_float(op.result):
        return None  # a float made an integer may overflow, which each target defines for itself
    with np.errstate(all="ignore"):
        result = float(np.asarray(number, source).astype(target))
    return m.like(op.result, result) if np.isfinite(result) or result == number else None  # infinity stays infinity


@rewrite(stablehlo.CompareOp, exact=True)
def fold_compare(op):
    """A comparison of known numbers is computed now (`jnp.var` asks whether a count is more than zero).

    Before:
        func.func @main() -> tensor<2x2xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<2x2xi32>
          %1 = stablehlo.iota dim = 1 : tensor<2x2xi32>
          %2 = stablehlo.compare GE, %0, %1 : (tensor<2x2xi32>, tensor<2x2xi32>) -> tensor<2x2xi1>
          return %2 : tensor<2x2xi1>
        }
    After:
        func.func @main() -> tensor<2x2xi1> {
          %0 = stablehlo.constant dense<[[true, false], [true, true]]> : tensor<2x2xi1>
          return %0 : tensor<2x2xi1>
        }
    Before:
        func.func @main() -> tensor<i1> {
          %0 = stablehlo.constant dense<2.560000e+02> : tensor<f32>
          %1 = stablehlo.constant dense<0x7FC00000> : tensor<f32>
          %2 = stablehlo.compare GT, %0, %1, FLOAT : (tensor<f32>, tensor<f32>) -> tensor<i1>
          return %2 : tensor<i1>
        }
    After:
        func.func @main() -> tensor<i1> {
          %0 = stablehlo.constant dense<false> : tensor<i1>
          return %0 : tensor<i1>
        }
    Unchanged:
        func.func @main() -> tensor<i1> {
          %0 = stablehlo.constant dense<0.000000e+00> : tensor<f32>
          %1 = stablehlo.constant dense<-0.000000e+00> : tensor<f32>
          %2 = stablehlo.compare GT, %0, %1, TOTALORDER : (tensor<f32>, tensor<f32>) -> tensor<i1>
          return %2 : tensor<i1>
        }
    Unchanged:
        func.func @main(%a: tensor<2x2xi32>) -> tensor<2x2xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<2x2xi32>
          %1 = stablehlo.compare GE, %0, %a : (tensor<2x2xi32>, tensor<2x2xi32>) -> tensor<2x2xi1>
          return %1 : tensor<2x2xi1>
        }
    """
    arrays = _all_known(op)
    total = op.compare_type is not None and "TOTALORDER" in str(op.compare_type)
    if arrays is None or total or not (_foldable(op.lhs) or m.element_type(op.lhs) in ("f16", "bf16", "f32", "f64")):
        return None
    direction = stablehlo.ComparisonDirectionAttr(op.comparison_direction).value
    return m.constant(_COMPARISONS[direction](*arrays))


@rewrite(stablehlo.SelectOp, exact=True)
def fold_select(op):
    """A selection between known integers by a known predicate is computed now.

    Before:
        func.func @main() -> tensor<3xi32> {
          %0 = stablehlo.constant dense<[true, false, true]> : tensor<3xi1>
          %1 = stablehlo.iota dim = 0 : tensor<3xi32>
          %2 = stablehlo.constant dense<9> : tensor<3xi32>
          %3 = stablehlo.select %0, %1, %2 : tensor<3xi1>, tensor<3xi32>
          return %3 : tensor<3xi32>
        }
    After:
        func.func @main() -> tensor<3xi32> {
          %0 = stablehlo.constant dense<[0, 9, 2]> : tensor<3xi32>
          return %0 : tensor<3xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<3xi32>) -> tensor<3xi32> {
          %0 = stablehlo.constant dense<[true, false, true]> : tensor<3xi1>
          %1 = stablehlo.constant dense<9> : tensor<3xi32>
          %2 = stablehlo.select %0, %a, %1 : tensor<3xi1>, tensor<3xi32>
          return %2 : tensor<3xi32>
        }
    """
    arrays = _all_known(op)
    if arrays is None or not _foldable(op.result):
        return None
    return m.constant(np.where(arrays[0], arrays[1], arrays[2]))


@rewrite(
    stablehlo.TransposeOp, stablehlo.ReshapeOp, stablehlo.SliceOp, stablehlo.ConcatenateOp,
    stablehlo.BroadcastInDimOp, exact=True,
)  # fmt: skip
def fold_movement(op):
    """Known integers are moved now; one number everywhere stays one number.

    Before:
        func.func @main() -> tensor<2x3xi32> {
          %0 = stablehlo.constant dense<[[1, 2], [3, 4], [5, 6]]> : tensor<3x2xi32>
          %1 = stablehlo.transpose %0, dims = [1, 0] : (tensor<3x2xi32>) -> tensor<2x3xi32>
          return %1 : tensor<2x3xi32>
        }
    After:
        func.func @main() -> tensor<2x3xi32> {
          %0 = stablehlo.constant dense<[[1, 3, 5], [2, 4, 6]]> : tensor<2x3xi32>
          return %0 : tensor<2x3xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<3x2xi32>) -> tensor<2x3xi32> {
          %0 = stablehlo.transpose %a, dims = [1, 0] : (tensor<3x2xi32>) -> tensor<2x3xi32>
          return %0 : tensor<2x3xi32>
        }
    """
    if not isinstance(op, stablehlo.ConcatenateOp) and (n := splat(op.operands[0])) is not None:
        # -0.0 and NaN survive: the attribute is made of the number itself.
        return m.like(op.result, n)
    if isinstance(op, stablehlo.BroadcastInDimOp):
        return None
    arrays = _all_known(op)
    if arrays is None or not _foldable(op.results[0]):
        return None
    if isinstance(op, stablehlo.ConcatenateOp):
        return m.constant(np.concatenate(arrays, op.dimension.value))
    if isinstance(op, stablehlo.SliceOp):
        bounds = zip(integers(op.start_indices), integers(op.limit_indices), integers(op.strides), strict=True)
        return m.constant(arrays[0][tuple(slice(*b) for b in bounds)])
    return m.constant(_moved(op, arrays[0], m.shape(op.result)))


@rewrite(stablehlo.BroadcastInDimOp, exact=True)
def broadcast_of_constant_without_units(op):
    """A constant that is broadcast has no dimensions of size 1.

    Before:
        func.func @main() -> tensor<4x2x3xi1> {
          %0 = stablehlo.constant dense<[[[true, false, false], [true, true, false]]]> : tensor<1x2x3xi1>
          %1 = stablehlo.broadcast_in_dim %0, dims = [0, 1, 2] : (tensor<1x2x3xi1>) -> tensor<4x2x3xi1>
          return %1 : tensor<4x2x3xi1>
        }
    After:
        func.func @main() -> tensor<4x2x3xi1> {
          %0 = stablehlo.constant dense<[[true, false, false], [true, true, false]]> : tensor<2x3xi1>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1, 2] : (tensor<2x3xi1>) -> tensor<4x2x3xi1>
          return %1 : tensor<4x2x3xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<1x2x3xi1>) -> tensor<4x2x3xi1> {
          %0 = stablehlo.broadcast_in_dim %a, dims = [0, 1, 2] : (tensor<1x2x3xi1>) -> tensor<4x2x3xi1>
          return %0 : tensor<4x2x3xi1>
        }
    """
    dims = m.shape(op.operand)
    if 1 not in dims or (array := m.constant_value(op.operand)) is None:
        return None
    along = [d for d, size in zip(integers(op.broadcast_dimensions), dims, strict=True) if size > 1]
    return m.broadcast(m.constant(np.squeeze(array)), m.shape(op.result), along)
