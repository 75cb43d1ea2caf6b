"""What a device computes of its own parts, and exchanges, put into a module under Shardy's manual computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.jax_internals import lower_alone
from kpx.passes.composites import Device
from kpx.passes.shardings import Axes, Sharding
from kpx.passes.spread import exchange_in_each_group


@dataclass(frozen=True)
class Groups:
    """Devices that compute together: all of them, or those inside each group of a manual computation around.

    Attributes:
        mesh: the axes of a group, and their sizes.
        count: how many groups there are, one after another.
    """

    mesh: tuple[tuple[str, int], ...]
    count: int

    def lowered(
        self, part: Callable, lies: Sequence[Sharding], result: Sharding, types: Sequence[tuple], device: Device
    ) -> str:
        """A function of each device's parts, as a module over whole arrays.

        Args:
            lies, result: how arrays and result lie.
            types: shapes and dtypes of the arrays, whole.
        """
        specs = [PartitionSpec(*(axes or None for axes in sharding)) for sharding in (*lies, result)]
        function = jax.shard_map(part, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)
        structs = [jax.ShapeDtypeStruct(*kind) for kind in types]
        module = lower_alone(function, structs, device.platform, device.kind, dict(self.mesh))
        exchange_in_each_group(module, self.mesh, self.count)
        return m.text(module, large_constants=True)


@dataclass(frozen=True)
class Product:
    """A product, as `jax.lax.dot_general` takes it."""

    dimension_numbers: Any
    precision: tuple[str, ...] | None
    element: Any

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        precision = None if self.precision is None else tuple(map(jax.lax.Precision, self.precision))
        return jax.lax.dot_general(lhs, rhs, self.dimension_numbers, precision, self.element)


def product(op: Any, lhs: Sharding, rhs: Sharding) -> tuple[Product, list[str], list[Axes]] | None:
    """A product, the axes that it sums over, and how it lies but for that; None where its operands lie otherwise."""
    if "algorithm" in op.attributes:
        return None
    numbers = stablehlo.DotDimensionNumbers(op.dot_dimension_numbers)
    inner = (tuple(numbers.lhs_contracting_dimensions), tuple(numbers.rhs_contracting_dimensions))
    batch = (tuple(numbers.lhs_batching_dimensions), tuple(numbers.rhs_batching_dimensions))
    if any(lhs[i] != rhs[j] for i, j in [*zip(*inner, strict=True), *zip(*batch, strict=True)]):
        return None
    made = [lhs[i] for i in batch[0]]
    made += [axes for d, axes in enumerate(lhs) if d not in inner[0] + batch[0]]
    made += [axes for d, axes in enumerate(rhs) if d not in inner[1] + batch[1]]
    precision = None
    if "precision_config" in op.attributes:
        given = ir.ArrayAttr(op.attributes["precision_config"])
        precision = tuple(stablehlo.PrecisionAttr(a).value.lower() for a in given)
    return Product((inner, batch), precision, m.dtype(op.result)), [a for i in inner[0] for a in lhs[i]], made


def divides(mesh: Mapping[str, int], value: Value, lies: Sharding) -> bool:
    """Whether axes divide the dimensions that they split."""
    return all(n % math.prod(mesh[a] for a in axes) == 0 for n, axes in zip(m.shape(value), lies, strict=True))


def local(mesh: Mapping[str, int], value: Value, lies: Sharding) -> list[int]:
    """A device's part of a value."""
    return [n // math.prod(mesh[a] for a in axes) for n, axes in zip(m.shape(value), lies, strict=True)]
