"""A kernel over several devices: each computes its own part, under Shardy's manual computation, and nothing is gathered.

XLA cannot partition what it cannot see: a kernel in a partitioned module would have its operands gathered. Where Shardy
splits only dimensions along which a pattern's results are independent (attention's batch and heads), the kernel is put
in at the shapes of one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from kpx.ir import module as m
from kpx.ir.module import Value
from kpx.jax_internals import lower_alone
from kpx.kernels.patterns import Pattern
from kpx.kernels.registry import SplitSequence
from kpx.passes.composites import Device
from kpx.passes.shardings import Axes, Shardings


@dataclass(frozen=True)
class Spread:
    """Over which axes of a mesh a pattern's independent dimensions are split.

    Attributes:
        mesh: names and sizes of all axes.
        axes: by letter of `Pattern.parallel`, the axes.
        letters: those of each array, "." for a dimension of size 1 of a constant one, which is broadcast; and of the result.
        groups: how many such meshes there are, one after another, under a manual computation of each.
    """

    mesh: tuple[tuple[str, int], ...]
    axes: tuple[tuple[str, Axes], ...]
    letters: tuple[str, ...]
    groups: int = 1

    def spec(self, letters: str) -> PartitionSpec:
        """How an array with these letters is split."""
        axes = dict(self.axes)
        return PartitionSpec(*(axes.get(letter) or None for letter in letters))

    def part(self, struct: jax.ShapeDtypeStruct, letters: str) -> jax.ShapeDtypeStruct:
        """What one device has of an array."""
        sizes, axes = dict(self.mesh), dict(self.axes)
        over = [math.prod(sizes[a] for a in axes.get(letter, ())) for letter in letters]
        return jax.ShapeDtypeStruct([n // k for n, k in zip(struct.shape, over, strict=True)], struct.dtype)

    @property
    def sequence(self) -> SplitSequence | None:
        """How a sequence is split, where it is."""
        over = dict(self.axes).get(SEQUENCE)
        return SplitSequence(over, math.prod(dict(self.mesh)[a] for a in over)) if over else None

    @property
    def parts(self) -> int:
        """Over how many devices work is split."""
        return math.prod(dict(self.mesh)[a] for _, axes in self.axes for a in axes)

    @property
    def pieces(self) -> PartitionSpec:
        """One device's arrays, whatever they are, laid one after another along their first dimension."""
        return PartitionSpec(tuple(a for _, axes in self.axes for a in axes))


def spread_of(pattern: Pattern, inputs: Sequence[Value], around: Any, shardings: Shardings) -> Spread | None:
    """How a pattern that was found is split; None where it is not, or not along independent dimensions alone.

    Args:
        around: an operation beside it.
    """
    if not pattern.parallel:
        return None
    if (found := shardings.groups_around(around)) is None:
        return None
    mesh, groups = found
    axes: dict[str, Axes] = {}
    gathered: set[str] = set()
    given = [_letters(pattern, place, v) for place, v in enumerate(inputs)]
    for place, (value, letters) in enumerate(zip(inputs, given, strict=True)):
        if not letters:
            continue  # a scalar has no sharding
        found = shardings.of(value)
        if found is None:
            if place >= len(pattern.example) and SEQUENCE in axes:
                continue  # propagation does not go through scores that are split both ways
            return None
        for letter, size, over in zip(letters, m.shape(value), found, strict=True):
            if letter == SEQUENCE and not over and SEQUENCE not in axes:
                continue
            if letter == WHOLE:
                gathered.update(over)
            elif letter == ".":
                if over:
                    return None
            elif size % math.prod(mesh[a] for a in axes.setdefault(letter, over)) or over not in (
                (),
                axes[letter],
            ):
                return None
    split = {a for over in axes.values() for a in over}
    # Without a split every device does everything: as well as Shardy knows, that is no one's intention. What is split over
    # other axes than the results (tensor parallelism) must not be gathered: devices along those would do the same.
    if not split or not gathered <= split:
        return None
    return Spread(tuple(mesh.items()), tuple(sorted(axes.items())), tuple(given[: len(pattern.example)]), groups)


SEQUENCE = "s"
"""The letter of dimensions along which each result needs every device's part, in turn (see `Kernel.over_sequence`)."""

WHOLE = "*"
"""The letter of dimensions of an array that every device needs whole; its gradient is the sum of theirs."""


def _letters(pattern: Pattern, place: int, value: Value) -> str:
    """The letters of an input's dimensions; after the arrays come the result's cotangent, and what is carried."""
    letters, shape = (*pattern.parallel, pattern.parallel[0])[place], m.shape(value)
    if not shape:
        return ""  # a cotangent that is alike everywhere
    if place == pattern.mask:
        letters = letters[-len(shape) :]  # it may lack the first
    if place in pattern.stacked:
        letters = letters.rjust(len(shape), WHOLE)
    if place not in pattern.constant:
        return letters
    # Only constant ones: each device's gradient of another would be a part of a sum.
    return "".join("." if size == 1 else letter for letter, size in zip(letters, shape, strict=True))


def lowered(
    forward: Any,
    backward: Any,
    structs: Sequence[jax.ShapeDtypeStruct],
    pattern: Pattern,
    device: Device,
    spread: Spread,
) -> list[Any]:
    """Both passes of a pattern, of one device's arrays, as modules over whole arrays.

    Args:
        forward: `arrays -> result, saved`. `backward`: `saved, cotangents -> gradients`, or None.
        structs: the arrays, whole; and for the backward pass the cotangents.
    """
    letters, count = spread.letters, len(pattern.example)
    specs, result = tuple(map(spread.spec, letters)), spread.spec(pattern.parallel[-1])
    saved = _saved(forward, structs[:count], specs, result, spread)
    pieces = tuple(spread.pieces if s.shape else PartitionSpec() for s in saved)
    over = spread.parts
    whole = [jax.ShapeDtypeStruct((s.shape[0] * over, *s.shape[1:]) if s.ndim else (), s.dtype) for s in saved]
    shard = functools.partial(jax.shard_map, check_vma=False)
    parts = [(shard(forward, in_specs=specs, out_specs=(result, *pieces)), structs[:count])]
    if backward is not None:
        variable = [place for place in range(count) if place not in pattern.constant]
        everywhere = [WHOLE in letters[place] for place in variable]
        axes = tuple(a for _, named in spread.axes for a in named)

        def summed(*given):
            gradients = backward(*given)
            return tuple(jax.lax.psum(g, axes) if w else g for g, w in zip(gradients, everywhere, strict=True))

        cotangents = (result if structs[count].ndim else PartitionSpec(), *[specs[0]] * (len(structs) - count - 1))
        operands = (*pieces, *cotangents)
        gradients = tuple(specs[place] for place in variable)
        parts.append((shard(summed, in_specs=operands, out_specs=gradients), [*whole, *structs[count:]]))
    modules = [lower_alone(f, given, device.platform, device.kind, dict(spread.mesh)) for f, given in parts]
    for module in modules:
        exchange_in_each_group(module, spread.mesh, spread.groups)
    return modules


def exchange_in_each_group(module: Any, mesh: Sequence[tuple[str, int]], groups: int) -> None:
    """Has each group of devices exchange what the first does, in place.

    Args:
        mesh: a group's axes and their sizes.
    """
    devices = math.prod(n for _, n in mesh)
    for op in m.walk(module.operation) if groups > 1 else ():
        for name in _NUMBERED & {*op.operation.attributes}:
            first = np.array(op.operation.attributes[name])
            every = np.concatenate([first + group * devices for group in range(groups)])
            op.operation.attributes[name] = m.ir.DenseElementsAttr.get(every, context=module.context)


_NUMBERED = {"replica_groups", "source_target_pairs"}


def _saved(
    forward: Any,
    structs: Sequence[jax.ShapeDtypeStruct],
    specs: tuple[PartitionSpec, ...],
    result: PartitionSpec,
    spread: Spread,
) -> list[jax.ShapeDtypeStruct]:
    """What a device keeps of a forward pass, which may speak of the mesh's axes."""
    found: list[list[jax.ShapeDtypeStruct]] = []

    def result_alone(*arrays):
        out, *saved = forward(*arrays)
        found.append([jax.ShapeDtypeStruct(s.shape, s.dtype) for s in saved])
        return out

    sizes = dict(spread.mesh)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    split = jax.shard_map(result_alone, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)
    jax.eval_shape(split, *structs)
    return found[-1]
