"""Recognise the activation that an elementwise region computes, by the expression itself.

A region becomes a polynomial in its input and in functions of polynomials (`tanh`, `erf`, `exp`, ...), in one normal form:
products are expanded, and `1 / (1 + exp(-u))` and `logistic(u)` are `(1 + tanh(u / 2)) / 2`. Two spellings of one activation
have the same normal form, but for how their constants are rounded; a clamp, another constant or another function has another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, stablehlo

# What the last op of each activation may be.
ROOTS = (
    stablehlo.MulOp, stablehlo.AddOp, stablehlo.MaxOp, stablehlo.DivOp, stablehlo.TanhOp, stablehlo.LogisticOp,
)  # fmt: skip
_FUNCTIONS = {stablehlo.TanhOp: "tanh", m.chlo.ErfOp: "erf", stablehlo.ExpOp: "exp"}
_OPS = (
    *ROOTS, *_FUNCTIONS, m.chlo.ErfcOp, stablehlo.SubtractOp, stablehlo.NegOp, stablehlo.PowOp, stablehlo.ConvertOp,
)  # fmt: skip
_TYPES = ("bf16", "f32", "f64")  # of one range of exponents, or a wider one: a conversion between them only rounds

_MOST_OPS = 24
_MOST_TERMS = 16
_ROUNDING = {"bf16": 2.0**-9, "f32": 1e-6, "f64": 1e-6}  # of a constant, relative; models write six digits or more

# By the atom's place in a table (the input is 0), its power.
Monomial = tuple[tuple[int, int], ...]


class _Unknown(Exception):
    """No activation computes this."""


@dataclass(frozen=True)
class _Number:
    """A coefficient, and how far it may be from what was meant, relative to it."""

    value: float
    error: float = 0.0


Polynomial = Mapping[Monomial, _Number]


@dataclass
class _Algebra:
    """Polynomials over a table of atoms: the input, and functions of polynomials."""

    atoms: list[tuple[str, Polynomial]] = field(default_factory=lambda: [("input", {})])

    def input(self) -> Polynomial:
        return {((0, 1),): _Number(1.0)}

    def constant(self, number: float, error: float = 0.0) -> Polynomial:
        return {(): _Number(number, error)} if number else {}

    def add(self, a: Polynomial, b: Polynomial, sign: float = 1.0) -> Polynomial:
        total = dict(a)
        for monomial, term in b.items():
            before = total.get(monomial, _Number(0.0))
            value = before.value + sign * term.value
            total[monomial] = _Number(value, max(before.error, term.error))
            if not value:
                if monomial:
                    raise _Unknown  # NaN less NaN is no zero
                del total[monomial]
        return self._checked(total)

    def multiply(self, a: Polynomial, b: Polynomial) -> Polynomial:
        if not a or not b:
            raise _Unknown  # NaN times zero is no zero
        total: Polynomial = {}
        for left, x in a.items():
            for right, y in b.items():
                powers = dict(left)
                for atom, power in right:
                    powers[atom] = powers.get(atom, 0) + power
                term = _Number(x.value * y.value, x.error + y.error)
                total = self.add(total, {tuple(sorted(powers.items())): term})
        return total

    def power(self, a: Polynomial, exponent: Polynomial) -> Polynomial:
        number = self.number(exponent)
        if number not in (1.0, 2.0, 3.0):
            raise _Unknown
        result = a
        for _ in range(int(number) - 1):
            result = self.multiply(result, a)
        return result

    def divide(self, a: Polynomial, b: Polynomial) -> Polynomial:
        constant = b.get(())
        if constant is not None and len(b) == 1:
            return self.multiply(a, {(): _Number(1 / constant.value, constant.error)})
        # 1 / (1 + exp(-u))
        for monomial, factor in b.items():
            if len(monomial) == 1 and monomial[0][1] == 1 and self.atoms[monomial[0][0]][0] == "exp":
                rest = {k: v for k, v in b.items() if k != monomial}
                if factor.value == 1 and self.same(rest, self.constant(1.0)):
                    return self.multiply(a, self.logistic(self.negated(self.atoms[monomial[0][0]][1])))
        raise _Unknown

    def logistic(self, u: Polynomial) -> Polynomial:
        half = self.constant(0.5)
        return self.add(half, self.multiply(half, self.odd("tanh", self.multiply(half, u))))

    def negated(self, a: Polynomial) -> Polynomial:
        return self.multiply(self.constant(-1.0), a)

    def odd(self, name: str, u: Polynomial) -> Polynomial:
        """An odd function, of an argument whose first coefficient is positive."""
        if u and u[min(u)].value < 0:
            return self.negated(self.function(name, self.negated(u)))
        return self.function(name, u)

    def function(self, name: str, u: Polynomial) -> Polynomial:
        for place, (known, argument) in enumerate(self.atoms):
            if known == name and self.same(argument, u):
                return {((place, 1),): _Number(1.0)}
        self.atoms.append((name, u))
        return {((len(self.atoms) - 1, 1),): _Number(1.0)}

    def relu(self, a: Polynomial, b: Polynomial) -> Polynomial:
        if not b:
            return self.function("relu", a)
        if not a:
            return self.function("relu", b)
        raise _Unknown

    def number(self, a: Polynomial) -> float | None:
        return 0.0 if not a else a[()].value if set(a) == {()} else None

    @staticmethod
    def same(a: Polynomial, b: Polynomial) -> bool:
        """Whether two polynomials are one, but for the rounding of constants."""
        return a.keys() == b.keys() and all(
            math.isclose(a[k].value, b[k].value, rel_tol=max(a[k].error, b[k].error, 1e-12)) for k in a
        )

    @staticmethod
    def _checked(a: Polynomial) -> Polynomial:
        if len(a) > _MOST_TERMS or not all(math.isfinite(n.value) for n in a.values()):
            raise _Unknown
        return a


def _known(algebra: _Algebra) -> dict[str, Polynomial]:
    """The activations' normal forms."""
    x, half, one = algebra.input(), algebra.constant(0.5), algebra.constant(1.0)
    half_x = algebra.multiply(half, x)

    def gated(function: Polynomial) -> Polynomial:
        return algebra.multiply(half_x, algebra.add(one, function))

    cube = algebra.multiply(algebra.constant(0.044715), algebra.power(x, algebra.constant(3.0)))
    inner = algebra.multiply(algebra.constant(math.sqrt(2 / math.pi)), algebra.add(x, cube))
    return {
        "relu": algebra.relu(x, {}),
        "gelu": gated(algebra.odd("erf", algebra.multiply(algebra.constant(math.sqrt(0.5)), x))),
        "gelu_tanh": gated(algebra.odd("tanh", inner)),
        "silu": algebra.multiply(x, algebra.logistic(x)),
        "tanh": algebra.odd("tanh", x),
        "logistic": algebra.logistic(x),
    }


def activation(op: Any) -> tuple[Value, str] | None:
    """Return the array of which an op's result is an activation, and the activation's name.

    None where the region computes none that is known, or where a value within it, or the array, has users outside of it.
    """
    region = _region(op)
    if region is None:
        return None
    ops, x = region
    inside = {o.operation for o in ops}
    inner = [x, *(o.operation.results[0] for o in ops[1:])]
    if not all(user.operation in inside for value in inner for user in m.users(value)):
        return None
    algebra = _Algebra()
    known = _known(algebra)
    try:
        form = _normal_form(op.operation.results[0], algebra, {x: algebra.input()})
    except _Unknown:
        return None
    return next(((x, name) for name, wanted in known.items() if algebra.same(form, wanted)), None)


def _region(op: Any) -> tuple[list[Any], Value] | None:
    """Return the elementwise ops that compute an op's result, itself first, and the one array that they begin with."""
    ops, seen, pending, leaf = [], set(), [op], None
    while pending:
        current = pending.pop()
        if current.operation in seen:
            continue
        seen.add(current.operation)
        ops.append(current)
        if len(ops) > _MOST_OPS:
            return None
        for operand in current.operation.operands:
            if m.splat(operand) is not None:
                continue
            producer = m.producer(operand)
            if isinstance(producer, _OPS) and m.element_type(operand) in _TYPES:
                pending.append(producer)
            elif leaf is None or leaf == operand:
                leaf = operand
            else:
                return None
    return None if leaf is None or m.element_type(leaf) not in _TYPES else (ops, leaf)


def _normal_form(value: Value, algebra: _Algebra, known: dict[Value, Polynomial]) -> Polynomial:
    if value in known:
        return known[value]
    if (number := m.splat(value)) is not None:
        return algebra.constant(float(number), _ROUNDING.get(m.element_type(value), 0.0))
    op = m.producer(value)
    operands = [_normal_form(o, algebra, known) for o in op.operation.operands]
    known[value] = _applied(op, algebra, operands)
    return known[value]


def _applied(op: Any, algebra: _Algebra, operands: list[Polynomial]) -> Polynomial:
    first, last = operands[0], operands[-1]
    if type(op) in _FUNCTIONS:
        name = _FUNCTIONS[type(op)]
        return algebra.function(name, first) if name == "exp" else algebra.odd(name, first)
    rules = {
        stablehlo.AddOp: lambda: algebra.add(first, last),
        stablehlo.SubtractOp: lambda: algebra.add(first, last, -1.0),
        stablehlo.MulOp: lambda: algebra.multiply(first, last),
        stablehlo.DivOp: lambda: algebra.divide(first, last),
        stablehlo.NegOp: lambda: algebra.negated(first),
        stablehlo.PowOp: lambda: algebra.power(first, last),
        stablehlo.MaxOp: lambda: algebra.relu(first, last),
        stablehlo.LogisticOp: lambda: algebra.logistic(first),
        m.chlo.ErfcOp: lambda: algebra.add(algebra.constant(1.0), algebra.odd("erf", first), -1.0),
        stablehlo.ConvertOp: lambda: first,
    }
    return rules[type(op)]()
