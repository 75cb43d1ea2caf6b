"""Masks by position, in one form, whatever they were written as."""

from __future__ import annotations

import numpy as np

from kpx.ir import module as m
from kpx.ir.module import integers, producer, splat, stablehlo
from kpx.ir.rewrite import rewrite


@rewrite(stablehlo.CompareOp, exact=True)
def compare_of_counts_in_i32(op):
    """Positions are compared as 32-bit integers, which hold them.

    Before:
        func.func @main() -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi64>
          %1 = stablehlo.iota dim = 1 : tensor<4x4xi64>
          %2 = stablehlo.compare GE, %0, %1 : (tensor<4x4xi64>, tensor<4x4xi64>) -> tensor<4x4xi1>
          return %2 : tensor<4x4xi1>
        }
    After:
        func.func @main() -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi32>
          %1 = stablehlo.iota dim = 1 : tensor<4x4xi32>
          %2 = stablehlo.compare GE, %0, %1, SIGNED : (tensor<4x4xi32>, tensor<4x4xi32>) -> tensor<4x4xi1>
          return %2 : tensor<4x4xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<4x4xi64>) -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi64>
          %1 = stablehlo.compare GE, %0, %a : (tensor<4x4xi64>, tensor<4x4xi64>) -> tensor<4x4xi1>
          return %1 : tensor<4x4xi1>
        }
    """
    counts = [producer(v, stablehlo.IotaOp) for v in (op.lhs, op.rhs)]
    if (
        any(c is None for c in counts)
        or m.element_type(op.lhs) not in ("i64", "ui64")
        or max(m.shape(op.lhs)) >= 1 << 31
    ):
        return None
    narrow = [stablehlo.iota(m.tensor(m.shape(op.lhs), "i32"), c.iota_dimension.value) for c in counts]
    return _compare(narrow[0], narrow[1], _direction(op))


@rewrite(stablehlo.CompareOp, exact=True)
def compare_of_counts_is_ge(op):
    """Of the ways to compare positions, GE is used.

    Before:
        func.func @main() -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi32>
          %1 = stablehlo.iota dim = 1 : tensor<4x4xi32>
          %2 = stablehlo.compare LT, %0, %1, SIGNED : (tensor<4x4xi32>, tensor<4x4xi32>) -> tensor<4x4xi1>
          return %2 : tensor<4x4xi1>
        }
    After:
        func.func @main() -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi32>
          %1 = stablehlo.iota dim = 1 : tensor<4x4xi32>
          %2 = stablehlo.compare GE, %0, %1, SIGNED : (tensor<4x4xi32>, tensor<4x4xi32>) -> tensor<4x4xi1>
          %3 = stablehlo.not %2 : tensor<4x4xi1>
          return %3 : tensor<4x4xi1>
        }
    Unchanged:
        func.func @main() -> tensor<4x4xi1> {
          %0 = stablehlo.iota dim = 0 : tensor<4x4xi32>
          %1 = stablehlo.iota dim = 1 : tensor<4x4xi32>
          %2 = stablehlo.compare EQ, %0, %1, SIGNED : (tensor<4x4xi32>, tensor<4x4xi32>) -> tensor<4x4xi1>
          return %2 : tensor<4x4xi1>
        }
    """
    if any(producer(v, stablehlo.IotaOp) is None for v in (op.lhs, op.rhs)) or not m.is_integer(op.lhs):
        return None
    match _direction(op):
        case "LE":
            return _compare(op.rhs, op.lhs, "GE")
        case "LT":
            return stablehlo.not_(_compare(op.lhs, op.rhs, "GE"))
        case "GT":
            return stablehlo.not_(_compare(op.rhs, op.lhs, "GE"))
    return None


@rewrite(stablehlo.SelectOp, exact=True)
def select_on_broadcast_complement(op):
    """A selection by a complement, repeated, is one by what it is the complement of, with its values exchanged.

    Before:
        func.func @main(%p: tensor<4xi1>, %a: tensor<2x4xf32>, %b: tensor<2x4xf32>) -> tensor<2x4xf32> {
          %0 = stablehlo.not %p : tensor<4xi1>
          %1 = stablehlo.broadcast_in_dim %0, dims = [1] : (tensor<4xi1>) -> tensor<2x4xi1>
          %2 = stablehlo.select %1, %a, %b : tensor<2x4xi1>, tensor<2x4xf32>
          return %2 : tensor<2x4xf32>
        }
    After:
        func.func @main(%p: tensor<4xi1>, %a: tensor<2x4xf32>, %b: tensor<2x4xf32>) -> tensor<2x4xf32> {
          %0 = stablehlo.broadcast_in_dim %p, dims = [1] : (tensor<4xi1>) -> tensor<2x4xi1>
          %1 = stablehlo.select %0, %b, %a : tensor<2x4xi1>, tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    Unchanged:
        func.func @main(%p: tensor<4xi1>, %a: tensor<2x4xf32>, %b: tensor<2x4xf32>) -> tensor<2x4xf32> {
          %0 = stablehlo.broadcast_in_dim %p, dims = [1] : (tensor<4xi1>) -> tensor<2x4xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<2x4xi1>, tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    """
    repeated = producer(op.pred, stablehlo.BroadcastInDimOp)
    if repeated is None or (inner := producer(repeated.operand, stablehlo.NotOp)) is None:
        return None
    along = integers(repeated.broadcast_dimensions)
    return stablehlo.select(m.broadcast(inner.operand, m.shape(op.pred), along), op.on_false, op.on_true)


@rewrite(stablehlo.MaxOp, exact=True)
def maximum_with_lowest(op):
    """The maximum with -inf is the value itself, NaN too.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<0xFF800000> : tensor<4xf32>
          %1 = stablehlo.maximum %0, %a : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<-1.0> : tensor<4xf32>
          %1 = stablehlo.maximum %0, %a : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    for constant, other in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        if m.is_float(constant) and splat(constant) == -float("inf"):
            return other
    return None


def _direction(op) -> str:
    return stablehlo.ComparisonDirectionAttr(op.comparison_direction).value


def _compare(lhs, rhs, direction: str):
    signed = stablehlo.ComparisonTypeAttr.get("SIGNED")
    return stablehlo.compare(lhs, rhs, stablehlo.ComparisonDirectionAttr.get(direction), compare_type=signed)


@rewrite(stablehlo.ReshapeOp, exact=True)
def reshape_of_iota(op):
    """A count along one dimension, given others of size one, is still a count.

    Before:
        func.func @main() -> tensor<8x1xi32> {
          %0 = stablehlo.iota dim = 0 : tensor<8xi32>
          %1 = stablehlo.reshape %0 : (tensor<8xi32>) -> tensor<8x1xi32>
          return %1 : tensor<8x1xi32>
        }
    After:
        func.func @main() -> tensor<8x1xi32> {
          %0 = stablehlo.iota dim = 0 : tensor<8x1xi32>
          return %0 : tensor<8x1xi32>
        }
    Unchanged:
        func.func @main() -> tensor<2x4xf32> {
          %0 = stablehlo.iota dim = 0 : tensor<8xf32>
          %1 = stablehlo.reshape %0 : (tensor<8xf32>) -> tensor<2x4xf32>
          return %1 : tensor<2x4xf32>
        }
    """
    inner, dims = producer(op.operand, stablehlo.IotaOp), m.shape(op.result)
    if inner is None or m.rank(op.operand) != 1 or dims.count(m.size(op.operand)) != 1:
        return None
    return stablehlo.iota(op.result.type, dims.index(m.size(op.operand)))


@rewrite(stablehlo.ConvertOp, exact=True)
def convert_of_chosen_constants(op):
    """One of two numbers, converted, is one of the numbers, each converted.

    Before:
        func.func @main(%p: tensor<4xi1>) -> tensor<4xbf16> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %1 = stablehlo.constant dense<0xFF800000> : tensor<4xf32>
          %2 = stablehlo.select %p, %0, %1 : tensor<4xi1>, tensor<4xf32>
          %3 = stablehlo.convert %2 : (tensor<4xf32>) -> tensor<4xbf16>
          return %3 : tensor<4xbf16>
        }
    After:
        func.func @main(%p: tensor<4xi1>) -> tensor<4xbf16> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xbf16>
          %1 = stablehlo.constant dense<0xFF80> : tensor<4xbf16>
          %2 = stablehlo.select %p, %0, %1 : tensor<4xi1>, tensor<4xbf16>
          return %2 : tensor<4xbf16>
        }
    Unchanged:
        func.func @main(%p: tensor<4xi1>, %a: tensor<4xf32>) -> tensor<4xbf16> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %1 = stablehlo.select %p, %0, %a : tensor<4xi1>, tensor<4xf32>
          %2 = stablehlo.convert %1 : (tensor<4xf32>) -> tensor<4xbf16>
          return %2 : tensor<4xbf16>
        }
    """
    inner = producer(op.operand, stablehlo.SelectOp)
    if inner is None or not (m.is_float(op.operand) and m.is_float(op.result)):
        return None
    numbers = [float(n) for v in (inner.on_true, inner.on_false) if (n := splat(v)) is not None]
    kind = m.dtype(op.result)
    if kind is None or len(numbers) != 2 or any(np.isnan(numbers)):
        return None
    converted = [float(np.asarray(n, m.dtype(op.operand)).astype(kind)) for n in numbers]
    if any(np.isinf(c) != np.isinf(n) or 0 < abs(c) < 1e-30 for c, n in zip(converted, numbers, strict=True)):
        return None  # overflow and subnormal numbers are each target's own
    return stablehlo.select(inner.pred, *(m.like(op.result, c) for c in converted))


@rewrite(stablehlo.SelectOp, exact=True)
def select_by_known_begins_true(op):
    """Of a known predicate and its complement, the one whose first element is true is used.

    Before:
        func.func @main(%a: tensor<2x2xf32>, %b: tensor<2x2xf32>) -> tensor<2x2xf32> {
          %0 = stablehlo.constant dense<[[false, true], [false, false]]> : tensor<2x2xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<2x2xi1>, tensor<2x2xf32>
          return %1 : tensor<2x2xf32>
        }
    After:
        func.func @main(%a: tensor<2x2xf32>, %b: tensor<2x2xf32>) -> tensor<2x2xf32> {
          %0 = stablehlo.constant dense<[[true, false], [true, true]]> : tensor<2x2xi1>
          %1 = stablehlo.select %0, %b, %a : tensor<2x2xi1>, tensor<2x2xf32>
          return %1 : tensor<2x2xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2x2xf32>, %b: tensor<2x2xf32>) -> tensor<2x2xf32> {
          %0 = stablehlo.constant dense<[[true, false], [true, true]]> : tensor<2x2xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<2x2xi1>, tensor<2x2xf32>
          return %1 : tensor<2x2xf32>
        }
    """
    repeated = producer(op.pred, stablehlo.BroadcastInDimOp)
    array = m.constant_value(op.pred if repeated is None else repeated.operand)
    if array is None or not array.size or array.flat[0] or not array.any():
        return None
    complement = m.constant(~array)
    if repeated is not None:
        complement = m.broadcast(complement, m.shape(op.pred), integers(repeated.broadcast_dimensions))
    return stablehlo.select(complement, op.on_false, op.on_true)
