"""JAX's ragged products become composites, which a target's kernels take."""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import ir, stablehlo
from kpx.ir.pattern import outline

# The dimensions of the forms that there are kernels for, as MLIR writes them; and the kernel, with its attributes.
_FORMS: dict[str, tuple[str, dict[str, bool]]] = {
    "lhs_contracting_dimensions = [1], rhs_contracting_dimensions = [1], lhs_ragged_dimensions = [0], "
    "rhs_group_dimensions = [0]": ("kpx.grouped_matmul", {"transposed": False}),
    "lhs_contracting_dimensions = [1], rhs_contracting_dimensions = [2], lhs_ragged_dimensions = [0], "
    "rhs_group_dimensions = [0]": ("kpx.grouped_matmul", {"transposed": True}),
    "lhs_contracting_dimensions = [0], rhs_contracting_dimensions = [0], lhs_ragged_dimensions = [0]": (
        "kpx.grouped_matmul_sums",
        {},
    ),
}


def raise_products(module: ir.Module) -> int:
    """Holds every ragged product that a kernel may take as a composite, in place; gives how many."""
    found = [(op, form) for op in m.walk(m.main(module)) if (form := _form(op)) is not None]
    for op, (name, attributes) in found:
        _hold(module, op, name, attributes)
    return len(found)


def _form(op: Any) -> tuple[str, dict[str, bool]] | None:
    if op.operation.name != "chlo.ragged_dot" or m.element_type(op.operands[2]) != "i32":
        return None
    x, other, result = (m.element_type(v) for v in (*op.operands[:2], op.results[0]))
    dimensions = str(op.operation.attributes["ragged_dot_dimension_numbers"])
    return _FORMS.get(dimensions.removeprefix("#chlo.ragged_dot<").removesuffix(">")) if x == other == result else None


def _hold(module: ir.Module, op: Any, name: str, attributes: dict[str, bool]) -> None:
    operands, results = list(op.operands), list(op.results)
    symbol = outline(module, name, operands, results, [op])
    with module.context, ir.InsertionPoint(op.operation), op.operation.location:
        composite = stablehlo.CompositeOp(
            [r.type for r in results],
            operands,
            name=name,
            composite_attributes=ir.DictAttr.get({k: ir.BoolAttr.get(v) for k, v in attributes.items()}),
            decomposition=ir.FlatSymbolRefAttr.get(symbol),
            version=1,
        )
    for old, new in zip(results, composite.results, strict=True):
        old.replace_all_uses_with(new)
    op.operation.erase()
