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
