"""Canonicalization: what every later pass may rely on. `RULES` is the list, in the order tried."""

from __future__ import annotations

from kpx.ir.rewrite import Rewrite
from kpx.passes.canonicalize import algebra, constants, masks, movement, products, reductions, slices

RULES: list[Rewrite] = [
    rule
    for family in (movement, slices, algebra, masks, reductions, constants, products)
    for rule in vars(family).values()
    if isinstance(rule, Rewrite)
]

LAST: list[Rewrite] = [products.transpose_of_batches_into_dot]
"""Of those, what comes after fusion where kernels are looked for: it moves what patterns begin and end with."""

FOR_FUSION: list[Rewrite] = [rule for rule in RULES if rule not in LAST]
