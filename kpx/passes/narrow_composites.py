"""Fused ops that hold products (attention, a loss over its last layer, grouped products) over narrower arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from kpx.errors import KpxError
from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.kernels import patterns, registry
from kpx.passes import composites
from kpx.passes.composites import Device

_KERNELS = {
    "kpx.attention": 3, "kpx.linear": 2, "kpx.gated_linear": 3, "kpx.linear_cross_entropy": 2, "kpx.grouped_matmul": 2,
    "kpx.grouped_matmul_sums": 2,
}  # fmt: skip
"""Of kernels with products, how many arrays, from the first on, are factors."""

_PRODUCTS = ("stablehlo.dot_general", "chlo.ragged_dot")
_SAME = ("transpose", "reshape", "convert", "broadcast_in_dim", "multiply", "divide", "slice", "pad")


def factors(module: ir.Module, op: Any) -> tuple[int, ...]:
    """Which of a composite's arrays are factors of products in it, at most moved or scaled before."""
    if (count := _KERNELS.get(op.operation.attributes["name"].value)) is not None:
        return tuple(i for i in range(count) if m.element_type(op.operands[i]) == "f32")
    arguments = m.entry_block(m.functions(module)[op.operation.attributes["decomposition"].value]).arguments
    return tuple(i for i, a in enumerate(arguments) if m.element_type(a) == "f32" and m.rank(a) > 1 and _is_factor(a))


def _is_factor(value: Value, depth: int = 8) -> bool:
    if not depth:
        return False
    for user in m.users(value):
        name = user.operation.name
        if name in _PRODUCTS:
            return True
        if name.removeprefix("stablehlo.") in _SAME and _is_factor(user.operation.results[0], depth - 1):
            return True
    return False


def label(op: Any) -> str:
    """What a composite is recognised as: `kpx.attention`."""
    name = op.operation.attributes["name"].value
    pattern = patterns.find(name)
    return name if pattern is None else pattern.label


def narrow(module: ir.Module, op: Any, places: Sequence[int], element: str, device: Device) -> bool:
    """Has a composite read arrays in a narrower type; its results are as they were. False, and nothing changes, where what is
    made of it does not take them."""
    name = op.operation.attributes["name"].value
    kernel, pattern = registry.find(name), patterns.find(name)
    run = kernel if pattern is None else pattern.replace
    assert run is not None  # one of kpx's composites
    avals = tuple(map(composites.struct, op.operands))
    dtype = m.element_dtype(m.tensor([], element))
    wanted = [m.element_dtype(m.tensor_type(r)) for r in op.results]

    def narrower(*arrays, **attributes):
        narrow = [a.astype(dtype) if i in places else a for i, a in enumerate(arrays)]
        found = run(*narrow, **attributes)
        many = found if isinstance(found, (tuple, list)) else [found]
        results = [r.astype(d) for r, d in zip(many, wanted, strict=True)]
        return results if isinstance(found, (tuple, list)) else results[0]

    try:
        function = functools.partial(narrower, **composites.attributes(op))
        symbol = composites.spliced(module, name, function, avals, device, 0.0)
    except (KpxError, TypeError, ValueError):
        return False
    composites.call_instead(op, symbol)
    return True


def is_composite(op: Any) -> bool:
    """Whether an op is one of kpx's composites."""
    if op.operation.name != stablehlo.CompositeOp.OPERATION_NAME:
        return False
    name = op.operation.attributes["name"].value
    return registry.find(name) is not None or patterns.find(name) is not None
