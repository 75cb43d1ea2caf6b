"""A layout: over which axes of a mesh each class of dimensions is split, and so how every value lies."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from kpx.sharding.dims import Dims

Axes: TypeAlias = tuple[str, ...]
Sharding: TypeAlias = tuple[Axes, ...]
"""For each dimension of an array, the axes of the mesh that it is split over, major to minor."""

# An inner dimension that an axis does not divide is padded where that adds at most an eighth.
_PADDED = 8


@dataclass
class Layout:
    """How a step lies on a mesh.

    Attributes:
        mesh: sizes of axes by name, the outermost first.
        split: by class of dimensions, the axes.
        storage: axes over which weights and the optimizer's state are split beside, and gathered where they are used.
        given: of arguments, by value, how they lie whatever the rest says.
    """

    dims: Dims
    mesh: Mapping[str, int]
    split: Mapping[int, Axes]
    storage: Axes = ()
    given: Mapping[int, Sharding] = field(default_factory=dict)

    def __post_init__(self):
        self._of: dict[int, Sharding] = {}
        self._inner: dict[int, Sharding] = {}
        self._ranks: dict[int, float] | None = None
        graph = self.dims.graph
        self._exact = frozenset([*graph.arguments, *graph.returned])  # JAX holds no uneven array
        self._of.update(self.given)

    def of(self, value: int) -> Sharding:
        """How a value lies: as weights do where it is one of theirs, else as its classes say."""
        if (found := self._of.get(value)) is None:
            found = self.used(value)
            if value in self.dims.stored and self.storage:
                found = self._stored(value, found)
            self._of[value] = found
        return found

    def used(self, value: int) -> Sharding:
        """How a value lies where it is computed with."""
        if (found := self._inner.get(value)) is None:
            graph, taken = self.dims.graph, set()
            classes, shape = self.dims.classes[value], graph.shapes[value]
            dims: list[Axes] = [()] * len(shape)
            for c, axes in self.split.items():  # those that come first have an axis before others do
                for d in (d for d, here in enumerate(classes) if here == c):
                    free = [a for a in self._free(value, axes) if a not in taken]
                    dims[d] = self.fitting(shape[d], free, exact=value in self._exact)
                    taken.update(dims[d])
            found = self._inner[value] = tuple(dims)
        return found

    def split_of(self, value: int, dimension: int) -> Axes:
        """Over which axes a value's dimension is to be split, where they divide it."""
        return self._free(value, self.split.get(self.dims.classes[value][dimension], ()))

    def _free(self, value: int, axes: Axes) -> Axes:
        manual = self.dims.graph.manual.get(value)
        return axes if manual is None else tuple(a for a in axes if a not in manual)

    def fitting(self, size: int, axes: Sequence[str], *, exact: bool = False) -> Axes:
        """The first axes that a dimension can be split over."""
        found, parts = [], 1
        for axis in axes:
            parts *= self.mesh[axis]
            padded = math.ceil(size / parts) * parts - size
            if padded and (exact or padded * _PADDED > size):
                break
            found.append(axis)
        return tuple(found)

    def parts(self, axes: Sequence[str]) -> int:
        """Over how many devices axes split."""
        return math.prod(self.mesh[a] for a in axes)

    def bytes(self, value: int, sharding: Sharding | None = None) -> float:
        """What a device has of a value."""
        graph = self.dims.graph
        total = graph.itemsizes[value]
        for size, axes in zip(graph.shapes[value], self.of(value) if sharding is None else sharding, strict=True):
            total *= math.ceil(size / self.parts(axes)) if axes else size
        return total

    def _stored(self, value: int, used: Sharding) -> Sharding:
        """Beside its use, over the axes of storage: as the argument that it is of lies, where that is given; else each on the
        first dimension, by rank, that it divides."""
        classes, shape = self.dims.classes[value], self.dims.graph.shapes[value]
        if (given := self._given_by_classes.get(self._key(value))) is not None:
            rest = iter(given)
            return tuple(next(rest) if self._counts(c, n) else () for c, n in zip(classes, shape, strict=True))
        free = [d for d, c in enumerate(classes) if c not in self.dims.stacked and shape[d] > 1]
        free.sort(key=lambda d: (-self.rank(classes[d]), d))
        dims, taken = list(used), {a for axes in used for a in axes}
        for axis in self.storage:
            if axis in taken:
                continue
            for d in free:
                if shape[d] % self.parts((*dims[d], axis)) == 0:
                    dims[d] = (*dims[d], axis)
                    taken.add(axis)
                    break
        return tuple(dims)

    def _counts(self, dim_class: int, size: int) -> bool:
        return dim_class not in self.dims.stacked and size > 1

    def _key(self, value: int) -> tuple[int, ...]:
        """The classes of a value, less those of stacked layers, of which it may be a slice."""
        shape = self.dims.graph.shapes[value]
        return tuple(c for c, n in zip(self.dims.classes[value], shape, strict=True) if self._counts(c, n))

    @functools.cached_property
    def _given_by_classes(self) -> dict[tuple[int, ...], Sharding]:
        found: dict[tuple[int, ...], Sharding] = {}
        for value, sharding in self.given.items():
            shape, classes = self.dims.graph.shapes[value], self.dims.classes[value]
            counted = [a for a, c, n in zip(sharding, classes, shape, strict=True) if self._counts(c, n)]
            if value in self.dims.stored and shape:
                found.setdefault(self._key(value), tuple(counted))
        return found

    def rank(self, dim_class: int) -> float:
        """How many bytes of state have a class: nearly all weights have the model's width."""
        if self._ranks is None:
            graph, self._ranks = self.dims.graph, {}
            for place in self.dims.roles.state:
                value = graph.arguments[place]
                for c in set(self.dims.classes[value]):
                    self._ranks[c] = self._ranks.get(c, 0.0) + graph.bytes(value)
        return self._ranks.get(dim_class, 0.0)
