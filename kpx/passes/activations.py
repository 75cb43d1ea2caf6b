"""Which activation an elementwise region computes, told by its values and not by how it is spelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kpx.ir import module as m
from kpx.ir.module import Value, stablehlo

_erf = np.vectorize(math.erf)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# Of f64 arrays.
_OPS: dict[type, Callable[..., np.ndarray]] = {
    stablehlo.AddOp: np.add, stablehlo.SubtractOp: np.subtract, stablehlo.MulOp: np.multiply,
    stablehlo.DivOp: np.divide, stablehlo.MaxOp: np.maximum, stablehlo.NegOp: np.negative,
    stablehlo.PowOp: np.power, stablehlo.ExpOp: np.exp, stablehlo.TanhOp: np.tanh, stablehlo.LogisticOp: _logistic,
    m.chlo.ErfOp: _erf, stablehlo.ConvertOp: lambda x: x,
}  # fmt: skip

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * _logistic(x),
    "tanh": np.tanh,
    "logistic": _logistic,
}
# What the last op of each may be.
ROOTS = (stablehlo.MulOp, stablehlo.MaxOp, stablehlo.DivOp, stablehlo.TanhOp, stablehlo.LogisticOp)

_POINTS = np.linspace(-6, 6, 41)
_WANTED = {name: f(_POINTS) for name, f in ACTIVATIONS.items()}
_MOST_OPS = 20
_TOLERANCE = 1e-6  # constants are rounded to f32
_NARROW_TOLERANCE = 2.0**-8  # or to bf16, as every value in between is then: the activation itself is nearer


def activation(op: Any) -> tuple[Value, str] | None:
    """The array of which an op's result is an activation, and the activation's name.

    None where nothing known is computed, or a value within the region, or the array, is used outside of it too.
    """
    region = _region(op)
    if region is None:
        return None
    ops, x = region
    inside = {o.operation for o in ops}
    inner = [x, *(o.operation.results[0] for o in ops[1:])]
    if not all(user.operation in inside for value in inner for user in m.users(value)):
        return None
    with np.errstate(all="ignore"):
        found = _value(op.operation.results[0], x, {x: _POINTS})
    narrow = any(
        m.element_type(o.operation.results[0]) == "bf16" for o in ops if not isinstance(o, stablehlo.ConvertOp)
    )
    name = min(_WANTED, key=lambda n: np.nan_to_num(np.abs(found - _WANTED[n]), nan=np.inf).max())
    rtol, atol = (_NARROW_TOLERANCE, _NARROW_TOLERANCE) if narrow else (0, _TOLERANCE)
    return (x, name) if np.allclose(found, _WANTED[name], rtol=rtol, atol=atol) else None


def _region(op: Any) -> tuple[list[Any], Value] | None:
    """The elementwise ops that an op's result is computed by, itself first, and the one array that they begin with."""
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
            maker = m.producer(operand)
            if maker is not None and type(maker) in _OPS and m.is_float(operand):
                pending.append(maker)
            elif leaf is None or leaf == operand:
                leaf = operand
            else:
                return None
    return None if leaf is None or not m.is_float(leaf) else (ops, leaf)


def _value(value: Value, x: Value, known: dict[Value, np.ndarray]) -> np.ndarray:
    if value in known:
        return known[value]
    if (number := m.splat(value)) is not None:
        return np.full_like(_POINTS, number)
    op = m.producer(value)
    known[value] = _OPS[type(op)](*(_value(o, x, known) for o in op.operation.operands))
    return known[value]
