"""Products in FP8 and in block formats take the place of others."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import ir, stablehlo
from kpx.passes import composites
from kpx.passes.composites import Device
from kpx.precision.formats import BLOCKS
from kpx.precision.products import How, in_f16, product

SCHEMES = ("fp8", "mxfp8", "mxfp4", "nvfp4")


@dataclass
class FewBits:
    """Puts products in few bits into a module.

    Attributes:
        units: the features of the target (see `Target.features`).
        emulated: schemes that it has no units for, with what is done instead.
    """

    module: ir.Module
    device: Device
    units: frozenset[str]
    emulated: dict[str, str] = field(default_factory=dict)
    _symbols: dict[Any, str] = field(default_factory=dict)

    def lower(
        self, op: Any, scheme: str, gradient: int | None, *, by_row: bool, stochastic: bool, static: float | None = None
    ) -> bool:
        """Puts it in a product's place; False, and nothing changes, where the product has batch dimensions.

        Args:
            gradient: which factor is a gradient.
            by_row: whether rows and columns have scales of their own, else each factor has one.
            stochastic: whether a gradient is rounded by chance.
            static: the first factor's scale, where it is known.
        """
        numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
        if list(numbers.lhs_batching_dimensions):
            return False
        contracting = tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)
        how = self._how(scheme, gradient, by_row, stochastic, static)
        if not how.native:
            self._tell(scheme)
        avals = tuple(map(composites.struct, op.operands))
        key = avals, contracting, how, m.element_type(op.result)
        if key not in self._symbols:
            dtype = m.element_dtype(m.tensor_type(op.result))

            def computed(lhs, rhs):
                return product(lhs, rhs, contracting=contracting, how=how).astype(dtype)

            name = f"kpx_{scheme}_product"
            self._symbols[key] = composites.spliced(self.module, name, computed, avals, self.device, 0.0)
        composites.call_instead(op, self._symbols[key])
        return True

    def lower_f16(self, op: Any, gradient: int) -> None:
        """Puts a product in f16 in a product's place, one factor of which is a gradient."""
        numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
        dimensions = (
            (tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions)),
            (tuple(numbers.lhs_batching_dimensions), tuple(numbers.rhs_batching_dimensions)),
        )
        avals = tuple(map(composites.struct, op.operands))
        key = avals, dimensions, gradient
        if key not in self._symbols:
            function = functools.partial(in_f16, dimensions=dimensions, gradient=gradient)
            self._symbols[key] = composites.spliced(self.module, "kpx_f16_product", function, avals, self.device, 0.0)
        composites.call_instead(op, self._symbols[key])

    def _how(self, scheme: str, gradient: int | None, by_row: bool, stochastic: bool, static: float | None) -> How:
        chance = stochastic and gradient == 0, stochastic and gradient == 1
        if scheme in BLOCKS:
            return How(scheme, native=scheme in self.units, stochastic=chance)
        kind = "fnuz" if "fp8_fnuz" in self.units else ""
        first, second = (("e5m2" if factor == gradient else "e4m3") + kind for factor in (0, 1))
        return How(scheme, (first, second), by_row, bool({"fp8", "fp8_fnuz"} & self.units), chance, static)

    def _tell(self, scheme: str) -> None:
        self.emulated[scheme] = (
            f"numbers are rounded to {scheme} and multiplied in bf16, which holds them: XLA has no {scheme} products for "
            f"{self.device.kind}"
        )
