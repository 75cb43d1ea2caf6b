"""Which products of a differentiated module are the forward pass's, and which compute gradients, of what."""

from __future__ import annotations

from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.split import COTANGENT, arguments_with

FORWARD, DGRAD, WGRAD = "forward", "dgrad", "wgrad"


class Provenance:
    """What is known of where a module's values come from, as it is now.

    A gradient is an argument that is marked as one, what JAX names as computed in a transposed function (recomputed forward
    values apart), and all that is computed from those.
    """

    def __init__(self, module: ir.Module):
        main = m.main(module)
        arguments = m.entry_block(main).arguments
        self._gradients: set[Value] = {arguments[i] for i in arguments_with(module, COTANGENT)}
        for op in m.walk(main):
            if _is_transposed(op) or any(v in self._gradients for v in op.operands):
                self._gradients.update(op.results)

    def of(self, op: Any) -> tuple[str, int | None]:
        """Whether a product is `forward`, or gives the gradient of data (`dgrad`) or of a parameter (`wgrad`); and which of its
        factors is the gradient that it reads."""
        read = [v in self._gradients for v in op.operands[:2]]
        if not any(read) and not _is_transposed(op):
            return FORWARD, None
        # JAX's transposed products have it first, where both, or none, are seen to be one.
        gradient = 1 if read == [False, True] else 0
        return (WGRAD if _sums_over_rows(op, gradient) else DGRAD), gradient


def _sums_over_rows(op: Any, gradient: int) -> bool:
    """Whether a gradient is summed over its rows, as for a parameter, and not over its channels, which come last."""
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    inner = list(numbers.lhs_contracting_dimensions if gradient == 0 else numbers.rhs_contracting_dimensions)
    value = op.operands[gradient]
    while (moved := m.producer(value, stablehlo.TransposeOp)) is not None:
        order = m.integers(moved.permutation)
        inner, value = [order[d] for d in inner], moved.operand
    return m.rank(value) - 1 not in inner


def _is_transposed(op: Any) -> bool:
    path = m.source_path(op)
    return "transpose(" in path and "rematted_computation" not in path
