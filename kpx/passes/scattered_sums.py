"""Sums of which each device has a part, as the gradients of weights are: their parts are exchanged as planned.

XLA's partitioner decides for itself how parts become a sum that is split: on several slices of TPUs it sums all of it on every
device and keeps a part, twice the bytes. Here the product and its exchange stand under Shardy's manual computation: summed
along the axes over which the result is split, and what is left of it along the others (hierarchical where those are between slices).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kpx.ir import module as m
from kpx.ir.module import ir, stablehlo
from kpx.ir.rewrite import Fuel
from kpx.passes import manual
from kpx.passes.composites import Device
from kpx.passes.manual import Groups, Product
from kpx.passes.shardings import Axes, Sharding, Shardings, constrained_to

NAME = "kpx.scattered_sum"
"""What it is called where rewrites are disabled, counted, or bisected."""

FEATURE = "scatters"
"""A target's feature: its compiler keeps sums that are scattered, where it is given them."""

_TILE = (8, 128)
_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """A sum of rows into the places of a table that indices tell, as the gradient of a lookup is.

    Attributes:
        shape, element: of the table.
    """

    dimension_numbers: jax.lax.ScatterDimensionNumbers
    shape: tuple[int, ...]
    element: Any

    def __call__(self, indices: jax.Array, updates: jax.Array) -> jax.Array:
        kept = [d for d in range(len(self.shape)) if d not in self.dimension_numbers.inserted_window_dims]
        shape = list(self.shape)  # a device may have a part of the rows' elements
        for d, window in zip(kept, self.dimension_numbers.update_window_dims, strict=True):
            shape[d] = updates.shape[window]
        table = jnp.zeros(shape, self.element)
        return jax.lax.scatter_add(table, indices, updates, self.dimension_numbers, mode="drop")


@dataclass(frozen=True)
class Scattered:
    """A sum whose parts, a device's each, are summed and scattered.

    Attributes:
        part: what a device computes, of its parts of the operands.
        operands: how both lie.
        result: how the sum lies.
        dimension: the one of the result's that the sum is scattered over.
        along: the axes of that.
        rest: further axes that parts are summed along.
        among: the devices that they are summed among.
    """

    part: Product | Rows
    operands: tuple[Sharding, Sharding]
    result: Sharding
    dimension: int
    along: Axes
    rest: Axes
    among: Groups

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A device's part of the sum."""
        made = jnp.moveaxis(self.part(a, b), self.dimension, 0)
        parts = math.prod(dict(self.among.mesh)[a] for a in self.along)
        mine = (made.shape[0] // parts, *made.shape[1:])
        if (shape := kept(mine)) != mine:
            made = made.reshape(parts * shape[0], *shape[1:])
        made = jax.lax.psum_scatter(made, self.along, scatter_dimension=0, tiled=True)
        made = jnp.moveaxis(made.reshape(mine), 0, self.dimension)
        return jax.lax.psum(made, self.rest) if self.rest else made


def scatter(module: ir.Module, device: Device, fuel: Fuel) -> int:
    """Has every sum that is to be split along what it sums over exchange its parts itself, in place; gives how many.

    Args:
        fuel: a unit is burnt for each.
    """
    shardings = Shardings(module) if m.partitions(module) > 1 else None
    if shardings is None:
        return 0
    found = []
    for op in m.walk(m.main(module)):
        if isinstance(op, (stablehlo.DotGeneralOp, stablehlo.ScatterOp)):
            constraints = _constraints(op.results[0])
            way = scattered(op, constrained_to(constraints[-1]), shardings) if constraints else None
            if way is not None and fuel.burn(NAME, op):
                found.append((op, constraints, way))
    for op, constraints, way in found:
        operands = [*op.operands][-2:]
        structs = tuple((m.shape(v), m.dtype(v)) for v in operands)
        donor = m.parse(_lowered(way, structs, device), module.context)
        made = m.call(module, donor, "kpx.scattered", operands, op)[0]
        constraints[-1].operation.results[0].replace_all_uses_with(made)
        for dead in (*reversed(constraints), op):
            dead.operation.erase()
    return len(found)


def _constraints(value: m.Value) -> list[Any]:
    """The constraints that are all that uses a value, one after another."""
    found = []
    while len(users := m.users(value)) == 1 and users[0].operation.name == "sdy.sharding_constraint":
        found.append(users[0])
        value = users[0].operation.results[0]
    return found


def scattered(op: Any, wanted: Sharding | None, shardings: Shardings) -> Scattered | None:
    """How a sum is scattered that is wanted split; None where it is not, or not by its operands' shardings alone."""
    values = [*op.operands][-2:]
    first, second = (shardings.of(v) for v in values)
    around = shardings.groups_around(op)
    if wanted is None or first is None or second is None or around is None:
        return None
    mesh, count = around
    read = manual.product if isinstance(op, stablehlo.DotGeneralOp) else _of_rows
    if (found := read(op, first, second)) is None:
        return None
    part, summed, made = found
    used = [a for axes in made for a in axes]
    further = [axes[len(has) :] for axes, has in zip(wanted, made, strict=True)]
    split = [d for d, axes in enumerate(further) if axes]
    if len(split) != 1 or any(axes[: len(has)] != has for axes, has in zip(wanted, made, strict=True)):
        return None
    along = further[split[0]]
    if not {*along} <= {*summed} or len({*used, *summed}) < len(used) + len(summed):
        return None
    arrays = [*zip(values, (first, second), strict=True), (op.results[0], wanted)]
    if not all(manual.divides(mesh, value, lies) for value, lies in arrays):
        return None
    rest = tuple(a for a in mesh if a in summed and a not in along)
    among = Groups(tuple(mesh.items()), count)
    return Scattered(part, (first, second), wanted, split[0], along, rest, among)


def _of_rows(op: Any, indices: Sharding, updates: Sharding) -> tuple[Rows, list[str], list[Axes]] | None:
    """A sum of rows into nothing, as `manual.product` gives a product."""
    body = [inner.operation.name for inner in op.regions[0].blocks[0].operations]
    if len(op.results) != 1 or body != ["stablehlo.add", "stablehlo.return"] or m.splat(op.operands[0]) != 0:
        return None
    numbers = stablehlo.ScatterDimensionNumbers(op.scatter_dimension_numbers)
    windows, inserted = tuple(numbers.update_window_dims), tuple(numbers.inserted_window_dims)
    last = m.rank(op.operands[1]) - 1
    if numbers.input_batching_dims or numbers.index_vector_dim != last or indices[last]:
        return None
    outer = [axes for d, axes in enumerate(updates) if d not in windows]
    if outer != [*indices[:last]] or any(n != m.shape(op.results[0])[d] for d, n in _whole(op, windows, inserted)):
        return None
    dims = jax.lax.ScatterDimensionNumbers(windows, inserted, tuple(numbers.scattered_dims_to_operand_dims))
    window = iter(updates[d] for d in windows)
    made = [() if d in inserted else next(window) for d in range(m.rank(op.results[0]))]
    return Rows(dims, m.shape(op.results[0]), m.dtype(op.results[0])), [a for axes in outer for a in axes], made


def _whole(op: Any, windows: tuple[int, ...], inserted: tuple[int, ...]) -> list[tuple[int, int]]:
    """Of a table's dimensions that rows have, which it is, and the rows' size."""
    kept = [d for d in range(m.rank(op.results[0])) if d not in inserted]
    return [(d, m.shape(op.operands[2])[w]) for d, w in zip(kept, windows, strict=True)]


def kept(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, of as many elements, in which a device's part of a scattered sum stays one.

    libtpu (0.0.42) makes a sum of all and a slice of others: those of 32 rows or fewer, and those of an odd number of tiles in a
    row. A part's elements follow one another, so that they may as well be more rows that are shorter.
    """
    size = math.prod(shape)

    def waste(rows: int) -> float:
        return math.ceil(size / rows / _TILE[1]) * _TILE[1] * rows / size

    def stays(rows: int) -> bool:
        return size % rows == 0 and math.ceil(size // rows / _TILE[1]) % 2 == 0

    if len(shape) == 2 and shape[0] >= _ROWS and shape[0] % _TILE[0] == 0 and stays(shape[0]):
        return shape
    found = [n for n in range(_ROWS, 16 * _ROWS, _TILE[0]) if stays(n)]
    rows = min(found, key=lambda n: (waste(n), n), default=0)
    return (rows, size // rows) if rows else shape


@functools.lru_cache(maxsize=64)
def _lowered(way: Scattered, types: tuple, device: Device) -> str:
    """The sum and its exchange, of whole arrays, as a module: layers that are alike share it."""
    return way.among.lowered(way, way.operands, way.result, types, device)
