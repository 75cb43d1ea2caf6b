"""Products summed over a tensor-parallel axis, a part of their rows after another: while one is computed, the sum before it goes round.

A product whose inner dimension is split has each device hold a part of the sum, which XLA exchanges once all of it is there. Here it
is a loop of as many steps as there are devices: each computes a part of the rows and adds it to what came from its neighbour, which
the exchange of the step before brought meanwhile (Wang et al., ASPLOS 2023: overlap by decomposition). Then each has the sum of its
own rows, and they are gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.rewrite import Fuel
from kpx.passes import manual
from kpx.passes.composites import Device
from kpx.passes.manual import Groups, Product
from kpx.passes.shardings import Sharding, Shardings, constrained_to

NAME = "kpx.ring_product"
"""What it is called where rewrites are disabled, counted, or bisected."""

FEATURE = "rings"
"""A target's feature: its compiler runs an exchange of a loop's step beside what the step computes."""

AXIS = "tensor"
"""The axis of plans that splits weights within layers."""

LEAST = 1e10
"""FLOPs of a part of the rows on a device: a step that takes less, some 15 us of an H100, would wait for its exchange's start."""


@dataclass(frozen=True)
class Ring:
    """A sum of products, each split along its inner dimension alike.

    Attributes:
        products: that are summed.
        operands: how they lie, two of each product.
        result: how the sum lies.
        rows: the dimension of the result's that is computed part after part.
        sides: of each product, which operand has the rows, and which dimension of its they are.
        element: of the result.
        among: the devices that it goes round among.
    """

    products: tuple[Product, ...]
    operands: tuple[Sharding, ...]
    result: Sharding
    rows: int
    sides: tuple[tuple[int, int], ...]
    element: Any
    among: Groups

    def __call__(self, *operands: jax.Array) -> jax.Array:
        """A device's result, of its parts of the operands."""
        count, here = dict(self.among.mesh)[AXIS], jax.lax.axis_index(AXIS)
        is_float = jnp.issubdtype(self.element, jnp.floating)
        wide = jnp.promote_types(self.element, jnp.float32) if is_float else self.element

        def part(number: Any) -> jax.Array:
            made = []
            for place, (product, (side, dim)) in enumerate(zip(self.products, self.sides, strict=True)):
                pair = list(operands[2 * place : 2 * place + 2])
                size = pair[side].shape[dim] // count
                pair[side] = jax.lax.dynamic_slice_in_dim(pair[side], number * size, size, dim)
                made.append(dataclasses.replace(product, element=wide)(*pair))
            return functools.reduce(jnp.add, made)

        def further(step: Any, so_far: jax.Array) -> jax.Array:
            came = jax.lax.ppermute(so_far, AXIS, [(d, (d + 1) % count) for d in range(count)])
            return (came.astype(wide) + part((here - 1 - step) % count)).astype(self.element)

        mine = jax.lax.fori_loop(1, count, further, part((here - 1) % count).astype(self.element))
        return jax.lax.all_gather(mine, AXIS, axis=self.rows, tiled=True)


def overlap(module: ir.Module, device: Device, least: float, fuel: Fuel) -> int:
    """Has sums of products along the tensor axis go round while they are computed, in place; gives how many.

    Args:
        least: FLOPs that a part must have on a device.
        fuel: a unit is burnt for each.
    """
    if m.mesh_axes(module).get(AXIS, 1) == 1:
        return 0
    shardings, found, taken = Shardings(module), [], set()
    for op in reversed(list(m.walk(m.main(module)))):
        if len(op.operation.results) != 1 or op.operation in taken:
            continue
        tree = _tree(op.operation.results[0])
        leaves = [one for one in tree or () if isinstance(one, stablehlo.DotGeneralOp)]
        ring = ring_of(leaves, tree, shardings, least) if tree else None
        if tree and ring is not None and fuel.burn(NAME, op):
            taken.update(one.operation for one in tree)
            found.append((tree, leaves, ring))
    for tree, leaves, ring in found:
        operands = [v for leaf in leaves for v in leaf.operands]
        structs = tuple((m.shape(v), m.dtype(v)) for v in operands)
        donor = m.parse(_lowered(ring, structs, device), module.context)
        made = m.call(module, donor, "kpx.ring", operands, tree[0])[0]
        tree[0].operation.results[0].replace_all_uses_with(made)
        for dead in tree:
            dead.operation.erase()
    return len(found)


def _tree(value: Value, below: bool = False) -> list[Any] | None:
    """The operations of a sum of products that nothing else uses, each before those that it is of; None where it is none."""
    op = m.producer(value)
    if op is None or (below and not (m.has_one_use(value) and m.users(value)[0].operation.block == op.operation.block)):
        return None
    if isinstance(op, stablehlo.DotGeneralOp):
        return [op]
    if not isinstance(op, stablehlo.AddOp) and op.operation.name != "sdy.sharding_constraint":
        return None
    parts = [_tree(v, below=True) for v in op.operation.operands]
    return None if any(part is None for part in parts) else [op, *(one for part in parts for one in part or ())]


def ring_of(leaves: Sequence[Any], tree: Sequence[Any], shardings: Shardings, least: float) -> Ring | None:
    """How a sum of products goes round; None where it is not split along the tensor axis alone, or takes too little."""
    around = shardings.groups_around(leaves[0])
    if around is None or (count := around[0].get(AXIS, 1)) == 1:
        return None
    mesh, groups = around
    products, operands, lies = [], [], set()
    for leaf in leaves:
        first, second = (shardings.of(v) for v in leaf.operands)
        read = None if first is None or second is None else manual.product(leaf, first, second)
        if read is None or read[1] != [AXIS]:
            return None
        products.append(read[0])
        operands += [first, second]
        lies.add(tuple(read[2]))
    lies |= {constrained_to(op) for op in tree if op.operation.name == "sdy.sharding_constraint"}
    if len(lies) != 1 or (result := lies.pop()) is None or any(AXIS in axes for axes in result):
        return None
    values = [v for leaf in leaves for v in leaf.operands]
    arrays = [*zip(values, operands, strict=True), (leaves[0].result, result)]
    if not all(manual.divides(mesh, v, lie) for v, lie in arrays):
        return None
    local = manual.local(mesh, leaves[0].result, result)
    flops = sum(
        2.0 * math.prod(local) * _inner(mesh, leaf, lie) for leaf, lie in zip(leaves, operands[::2], strict=True)
    )
    if flops / count < least:
        return None
    for rows, size in enumerate(local):
        sides = [_side(leaf, rows) for leaf in leaves]
        if size % count == 0 and all(sides):
            further = (m.dtype(leaves[0].result), Groups(tuple(mesh.items()), groups))
            return Ring(tuple(products), tuple(operands), result, rows, tuple(s for s in sides if s), *further)
    return None


def _inner(mesh: dict[str, int], product: Any, lies: Sharding) -> int:
    """The size of what a device sums over."""
    numbers = stablehlo.DotDimensionNumbers(product.dot_dimension_numbers)
    local = manual.local(mesh, product.operands[0], lies)
    return math.prod(local[d] for d in numbers.lhs_contracting_dimensions)


def _side(product: Any, dimension: int) -> tuple[int, int] | None:
    """The operand that has a dimension of a product's result, and which of its dimensions it is; None for one that both have."""
    numbers = stablehlo.DotDimensionNumbers(product.dot_dimension_numbers)
    batch = (numbers.lhs_batching_dimensions, numbers.rhs_batching_dimensions)
    inner = (numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions)
    free = [
        (side, d)
        for side, value in enumerate(product.operands)
        for d in range(m.rank(value))
        if d not in (*batch[side], *inner[side])
    ]
    place = dimension - len(batch[0])
    return free[place] if place >= 0 else None


@functools.lru_cache(maxsize=64)
def _lowered(ring: Ring, types: tuple, device: Device) -> str:
    """The loop over whole arrays, as a module: layers that are alike share it."""
    return ring.among.lowered(ring, ring.operands, ring.result, types, device)
