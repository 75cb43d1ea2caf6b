"""Arithmetic, logic, selection and branches that do less, or nothing, with the same bits."""

from __future__ import annotations

import math

from kpx.ir import module as m
from kpx.ir.module import chlo, producer, splat, stablehlo
from kpx.ir.rewrite import rewrite


def _is(value, number) -> bool:
    """Whether every element is a number, -0.0 told from 0.0."""
    n = splat(value)
    return n is not None and n == number and math.copysign(1, n) == math.copysign(1, number)


@rewrite(stablehlo.AddOp, exact=True)
def add_zero(op):
    """Adding integer 0, or floating -0.0, changes nothing (adding 0.0 would turn -0.0 into 0.0).

    Before:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<0> : tensor<4xi32>
          %1 = stablehlo.add %0, %a : tensor<4xi32>
          return %1 : tensor<4xi32>
        }
    After:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          return %a : tensor<4xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %1 = stablehlo.add %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    for constant, other in ((op.rhs, op.lhs), (op.lhs, op.rhs)):
        if splat(constant) == 0 and _is(constant, -0.0 if m.is_float(constant) else 0):
            return other
    return None


@rewrite(stablehlo.SubtractOp, exact=True)
def subtract_zero(op):
    """Subtracting 0 changes nothing.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %1 = stablehlo.subtract %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<-0.0> : tensor<4xf32>
          %1 = stablehlo.subtract %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    return op.lhs if _is(op.rhs, 0) else None


@rewrite(stablehlo.SubtractOp, exact=True)
def subtract_self(op):
    """An integer less itself is 0 (a float may be NaN).

    Before:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.subtract %a, %a : tensor<4xi32>
          return %0 : tensor<4xi32>
        }
    After:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<0> : tensor<4xi32>
          return %0 : tensor<4xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.subtract %a, %a : tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    return m.like(op.result, 0) if op.lhs == op.rhs and m.is_integer(op.lhs) else None


@rewrite(stablehlo.MulOp, exact=True)
def multiply_by_one(op):
    """Multiplying by 1 changes nothing.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<1.0> : tensor<4xf32>
          %1 = stablehlo.multiply %0, %a : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<2.0> : tensor<4xf32>
          %1 = stablehlo.multiply %0, %a : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    if _is(op.rhs, 1):
        return op.lhs
    return op.rhs if _is(op.lhs, 1) else None


@rewrite(stablehlo.MulOp, exact=True)
def multiply_integer_by_zero(op):
    """An integer times 0 is 0 (a float may be NaN, infinite or negative).

    Before:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<0> : tensor<4xi32>
          %1 = stablehlo.multiply %a, %0 : tensor<4xi32>
          return %1 : tensor<4xi32>
        }
    After:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<0> : tensor<4xi32>
          return %0 : tensor<4xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %1 = stablehlo.multiply %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    zero = next((v for v in (op.lhs, op.rhs) if _is(v, 0)), None)
    return zero if zero is not None and m.is_integer(zero) else None


@rewrite(stablehlo.DivOp, exact=True)
def divide_by_one(op):
    """Dividing by 1 changes nothing.

    Before:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<1> : tensor<4xi32>
          %1 = stablehlo.divide %a, %0 : tensor<4xi32>
          return %1 : tensor<4xi32>
        }
    After:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          return %a : tensor<4xi32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<1.0> : tensor<4xf32>
          %1 = stablehlo.divide %0, %a : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    return op.lhs if _is(op.rhs, 1) else None


@rewrite(stablehlo.DivOp, exact=True)
def divide_by_power_of_two(op):
    """Dividing by a power of two is multiplying by its reciprocal, which is exact.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<8.0> : tensor<4xf32>
          %1 = stablehlo.divide %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<1.250000e-01> : tensor<4xf32>
          %1 = stablehlo.multiply %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<3.0> : tensor<4xf32>
          %1 = stablehlo.divide %a, %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    n = splat(op.rhs)
    if n is None or not m.is_float(op.rhs) or not math.isfinite(n) or n == 0:
        return None
    fraction, exponent = math.frexp(n)
    # f16 has the fewest exponents: reciprocals stay normal numbers in every floating type.
    if abs(fraction) != 0.5 or abs(exponent) > 13 or m.element_type(op.rhs).startswith("f8"):
        return None
    return stablehlo.multiply(op.lhs, m.like(op.rhs, 1 / n))


@rewrite(stablehlo.NegOp, exact=True)
def negate_of_negate(op):
    """Two negations cancel.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.negate %a : tensor<4xf32>
          %1 = stablehlo.negate %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.abs %a : tensor<4xf32>
          %1 = stablehlo.negate %0 : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    inner = producer(op.operand, stablehlo.NegOp)
    return None if inner is None else inner.operand


@rewrite(stablehlo.NotOp, exact=True)
def not_of_not(op):
    """Two complements cancel.

    Before:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          %0 = stablehlo.not %a : tensor<4xi1>
          %1 = stablehlo.not %0 : tensor<4xi1>
          return %1 : tensor<4xi1>
        }
    After:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          return %a : tensor<4xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.negate %a : tensor<4xi32>
          %1 = stablehlo.not %0 : tensor<4xi32>
          return %1 : tensor<4xi32>
        }
    """
    inner = producer(op.operand, stablehlo.NotOp)
    return None if inner is None else inner.operand


@rewrite(stablehlo.MaxOp, stablehlo.MinOp, stablehlo.AndOp, stablehlo.OrOp, exact=True)
def idempotent_with_itself(op):
    """The maximum, minimum, and, or of a value with itself is the value.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.maximum %a, %a : tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          return %a : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.maximum %a, %b : tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    return op.lhs if op.lhs == op.rhs else None


@rewrite(stablehlo.MaxOp, stablehlo.MinOp, exact=True)
def maximum_of_maximum(op):
    """Taking the maximum (minimum) with the same bound again changes nothing: relu of relu.

    Before:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.maximum %a, %b : tensor<4xf32>
          %1 = stablehlo.maximum %0, %b : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.maximum %a, %b : tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.minimum %a, %b : tensor<4xf32>
          %1 = stablehlo.maximum %0, %b : tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    """
    for inside, bound in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        inner = producer(inside, type(op))
        if inner is not None and any(m.same_value(bound, v) for v in (inner.lhs, inner.rhs)):
            return inside
    return None


@rewrite(stablehlo.AndOp, stablehlo.OrOp, exact=True)
def logic_with_constant(op):
    """And with true, or with false: the other operand. And with false, or with true: the constant.

    Before:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          %0 = stablehlo.constant dense<true> : tensor<4xi1>
          %1 = stablehlo.and %0, %a : tensor<4xi1>
          return %1 : tensor<4xi1>
        }
    After:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          return %a : tensor<4xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi32> {
          %0 = stablehlo.constant dense<1> : tensor<4xi32>
          %1 = stablehlo.and %0, %a : tensor<4xi32>
          return %1 : tensor<4xi32>
        }
    """
    if m.element_type(op.lhs) != "i1":
        return None
    neutral = isinstance(op, stablehlo.AndOp)
    for constant, other in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        if (n := splat(constant)) is not None:
            return other if bool(n) == neutral else constant
    return None


@rewrite(stablehlo.SelectOp, exact=True)
def select_on_constant(op):
    """A selection by a constant predicate, or between equal values, is one of them.

    Before:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.constant dense<false> : tensor<4xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<4xi1>, tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          return %b : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<2xf32>, %b: tensor<2xf32>) -> tensor<2xf32> {
          %0 = stablehlo.constant dense<[true, false]> : tensor<2xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<2xi1>, tensor<2xf32>
          return %1 : tensor<2xf32>
        }
    """
    if op.on_true == op.on_false:
        return op.on_true
    chosen = splat(op.pred)
    return None if chosen is None else (op.on_true if chosen else op.on_false)


@rewrite(stablehlo.SelectOp, exact=True)
def select_on_complement(op):
    """A selection by a complement is the selection with its values exchanged.

    Before:
        func.func @main(%p: tensor<4xi1>, %a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.not %p : tensor<4xi1>
          %1 = stablehlo.select %0, %a, %b : tensor<4xi1>, tensor<4xf32>
          return %1 : tensor<4xf32>
        }
    After:
        func.func @main(%p: tensor<4xi1>, %a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.select %p, %b, %a : tensor<4xi1>, tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%p: tensor<4xi1>, %a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.select %p, %a, %b : tensor<4xi1>, tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    """
    inner = producer(op.pred, stablehlo.NotOp)
    return None if inner is None else stablehlo.select(inner.operand, op.on_false, op.on_true)


@rewrite(stablehlo.SelectOp, exact=True)
def select_between_bools(op):
    """Selecting true or false by a predicate is the predicate.

    Before:
        func.func @main(%p: tensor<4xi1>) -> tensor<4xi1> {
          %0 = stablehlo.constant dense<true> : tensor<4xi1>
          %1 = stablehlo.constant dense<false> : tensor<4xi1>
          %2 = stablehlo.select %p, %0, %1 : tensor<4xi1>, tensor<4xi1>
          return %2 : tensor<4xi1>
        }
    After:
        func.func @main(%p: tensor<4xi1>) -> tensor<4xi1> {
          return %p : tensor<4xi1>
        }
    Unchanged:
        func.func @main(%p: tensor<4xi1>, %a: tensor<4xi1>) -> tensor<4xi1> {
          %0 = stablehlo.constant dense<true> : tensor<4xi1>
          %1 = stablehlo.select %p, %0, %a : tensor<4xi1>, tensor<4xi1>
          return %1 : tensor<4xi1>
        }
    """
    if m.element_type(op.on_true) != "i1" or op.pred.type != op.result.type:
        return None
    values = splat(op.on_true), splat(op.on_false)
    if None in values or values[0] == values[1]:
        return None
    return op.pred if values[0] else stablehlo.not_(op.pred)


@rewrite(stablehlo.CompareOp, exact=True)
def compare_self(op):
    """An integer equals itself (a float may be NaN).

    Before:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi1> {
          %0 = stablehlo.compare LE, %a, %a : (tensor<4xi32>, tensor<4xi32>) -> tensor<4xi1>
          return %0 : tensor<4xi1>
        }
    After:
        func.func @main(%a: tensor<4xi32>) -> tensor<4xi1> {
          %0 = stablehlo.constant dense<true> : tensor<4xi1>
          return %0 : tensor<4xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xi1> {
          %0 = stablehlo.compare EQ, %a, %a : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xi1>
          return %0 : tensor<4xi1>
        }
    """
    if op.lhs != op.rhs or not m.is_integer(op.lhs):
        return None
    return m.like(op.result, _direction(op) in ("EQ", "LE", "GE"))


def _direction(op) -> str:
    return stablehlo.ComparisonDirectionAttr(op.comparison_direction).value


@rewrite(stablehlo.CompareOp, exact=True)
def compare_of_widened_bool(op):
    """A bool made a number and compared with 0 is the bool again, or its complement.

    Before:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          %0 = stablehlo.convert %a : (tensor<4xi1>) -> tensor<4xf32>
          %1 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %2 = stablehlo.compare NE, %0, %1 : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xi1>
          return %2 : tensor<4xi1>
        }
    After:
        func.func @main(%a: tensor<4xi1>) -> tensor<4xi1> {
          return %a : tensor<4xi1>
        }
    Unchanged:
        func.func @main(%a: tensor<4xi8>) -> tensor<4xi1> {
          %0 = stablehlo.convert %a : (tensor<4xi8>) -> tensor<4xf32>
          %1 = stablehlo.constant dense<0.0> : tensor<4xf32>
          %2 = stablehlo.compare NE, %0, %1 : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xi1>
          return %2 : tensor<4xi1>
        }
    """
    inner, direction = producer(op.lhs, stablehlo.ConvertOp), _direction(op)
    if inner is None or m.element_type(inner.operand) != "i1" or direction not in ("EQ", "NE"):
        return None
    if splat(op.rhs) != 0:
        return None
    return inner.operand if direction == "NE" else stablehlo.not_(inner.operand)


@rewrite(stablehlo.CaseOp, stablehlo.IfOp, exact=True)
def branch_of_constant(op):
    """A branch chosen by a constant is that branch.

    Before:
        func.func @main(%a: tensor<f32>) -> tensor<f32> {
          %0 = stablehlo.constant dense<1> : tensor<i32>
          %1 = "stablehlo.case"(%0) ({
            stablehlo.return %a : tensor<f32>
          }, {
            %2 = stablehlo.negate %a : tensor<f32>
            stablehlo.return %2 : tensor<f32>
          }) : (tensor<i32>) -> tensor<f32>
          return %1 : tensor<f32>
        }
    After:
        func.func @main(%a: tensor<f32>) -> tensor<f32> {
          %0 = stablehlo.negate %a : tensor<f32>
          return %0 : tensor<f32>
        }
    Unchanged:
        func.func @main(%a: tensor<f32>, %i: tensor<i32>) -> tensor<f32> {
          %1 = "stablehlo.case"(%i) ({
            stablehlo.return %a : tensor<f32>
          }, {
            %2 = stablehlo.negate %a : tensor<f32>
            stablehlo.return %2 : tensor<f32>
          }) : (tensor<i32>) -> tensor<f32>
          return %1 : tensor<f32>
        }
    """
    chosen = splat(op.operands[0])
    if chosen is None:
        return None
    last = len(op.regions) - 1
    if isinstance(op, stablehlo.IfOp):
        branch = 0 if chosen else 1
    else:  # an index out of range takes the last branch
        branch = int(chosen) if 0 <= chosen <= last else last
    body = list(op.regions[branch].blocks[0].operations)
    new = {}
    for inner in body[:-1]:
        new.update(zip(inner.results, m.clone(inner, new).results, strict=True))
    return [new.get(v, v) for v in body[-1].operands]


@rewrite(chlo.SquareOp, exact=True)
def square_is_product(op):
    """A real square is a product by itself, which the other rewrites and every pattern know.

    Before:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = chlo.square %a : tensor<4xf32> -> tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    After:
        func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
          %0 = stablehlo.multiply %a, %a : tensor<4xf32>
          return %0 : tensor<4xf32>
        }
    Unchanged:
        func.func @main(%a: tensor<4xcomplex<f32>>) -> tensor<4xcomplex<f32>> {
          %0 = chlo.square %a : tensor<4xcomplex<f32>> -> tensor<4xcomplex<f32>>
          return %0 : tensor<4xcomplex<f32>>
        }
    """
    return stablehlo.multiply(op.operand, op.operand) if m.is_float(op.operand) else None
