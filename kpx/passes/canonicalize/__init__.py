"""Canonicalization: what every later pass may rely on. `RULES` is the list, in the order tried."""

from __future__ import annotations

from kpx.ir.rewrite import Rewrite
from kpx.passes.canonicalize import algebra, constants, masks, movement, products, reductions, slices

_OFF_CPU: list[Rewrite] = [products.transposed_product_swaps_operands]  # before transposes join in what comes after

RULES: list[Rewrite] = [
    rule
    for family in (movement, slices, algebra, masks, reductions, constants, products)
    for rule in vars(family).values()
    if isinstance(rule, Rewrite) and rule not in _OFF_CPU
]

LAST: list[Rewrite] = [products.transpose_of_batches_into_dot, movement.reshape_of_reshape]
"""Of those, what comes after fusion where kernels are looked for: it joins what patterns begin and end with to others."""

FOR_FUSION: list[Rewrite] = [*_OFF_CPU, *(rule for rule in RULES if rule not in LAST)]
