"""A mesh on a machine's links: which physical links each axis has, and how long an exchange along axes takes.

A torus: axes take whole dimensions where they can, which are rings with two links each way round; a part of a dimension is
a line. Beyond a slice or a host, devices share the network, and exchanges are hierarchical: what is reduced or gathered
inside first goes between in parts. A model of links, with no contention; Chan et al. 2007 give the counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kpx.errors import TargetError
from kpx.hardware.target import Target

_HOP_SECONDS = 1e-6  # between neighbours
_NETWORK_SECONDS = 2e-5  # between hosts or slices
_LOCAL_LINK = 5e9  # bytes/s between processes of one machine, which the table does not have


@dataclass(frozen=True)
class Piece:
    """A part of an axis: so many devices along one physical dimension (-1: the network), every `stride`-th of it."""

    dimension: int
    extent: int
    stride: int


class Fabric:
    """The links of a mesh's axes.

    Attributes:
        order: the mesh's axes, the outermost first.
    """

    def __init__(self, target: Target, mesh: Mapping[str, int]):
        self.target, self.mesh, self.order = target, dict(mesh), tuple(mesh)
        devices = target.device_count if target.shape else math.prod(mesh.values())
        if math.prod(mesh.values()) != devices:
            given = ", ".join(f"{name}={n}" for name, n in mesh.items())
            raise TargetError(
                f"The mesh {given} has {math.prod(mesh.values())} devices, and {target} has {devices}. The axes' product "
                "must be that."
            )
        chip = target.spec
        per_chip = chip.devices_per_chip if chip else 1
        if target.platform == "tpu":
            self._extents = [*target.shape[:-1], target.shape[-1] * per_chip]
        else:
            self._extents = [target.shape[-1]] if target.shape else [devices]
        self.pieces = self._placed()

    def seconds(self, kind: str, size: float, axes: Sequence[str]) -> float:
        """How long an exchange takes, of `size` bytes as `kpx.ir.hlo_cost.Collective` counts them."""
        inner = [p for a in axes for p in self.pieces[a] if p.dimension >= 0]
        outer = math.prod(p.extent for a in axes for p in self.pieces[a] if p.dimension < 0)
        n = math.prod(p.extent for p in inner)
        passes = 2.0 if kind == "all-reduce" else 1.0
        total = 0.0
        if n > 1:
            longest = max(p.extent for p in inner)
            share = 1.0 if kind == "collective-permute" else (n - 1) / n
            if kind == "all-to-all" and self.target.platform == "tpu":
                share *= max(longest / 4, 1.0)
            total += passes * size * share / self._bandwidth(inner) + passes * _HOP_SECONDS * (
                1 if kind == "collective-permute" else longest - 1
            )
        if outer > 1:
            part = size if kind in ("all-to-all", "collective-permute") else size / n
            share = 1.0 if kind == "collective-permute" else (outer - 1) / outer
            total += passes * (part * share / self._network + _NETWORK_SECONDS)
        return total

    @property
    def _network(self) -> float:
        return self.target.spec.network if self.target.spec else _LOCAL_LINK

    def _bandwidth(self, pieces: Sequence[Piece]) -> float:
        """Bytes/s of a device inside a slice or a host."""
        chip = self.target.spec
        if chip is None:
            return _LOCAL_LINK
        if chip.links.kind == "switch":
            return chip.links.bandwidth
        extents: dict[int, int] = {}
        for piece in pieces:
            if piece.extent > 1:
                extents[piece.dimension] = extents.get(piece.dimension, 1) * piece.extent
        links = 0
        for dimension, extent in extents.items():
            whole = extent == self._extents[dimension] and extent % max(chip.links.wraps_at, 1) == 0
            links += 2 if whole else 1
        return max(links, 1) * chip.links.bandwidth

    def _placed(self) -> dict[str, list[Piece]]:
        """Axes on physical dimensions: the innermost axes take links first, the outermost what is left, and the network."""
        left, found = list(self._extents), {}
        strides = [1] * len(left)
        for axis in reversed(self.order):
            found[axis] = self._taken(self.mesh[axis], left, strides)
        return found

    def _taken(self, size: int, left: list[int], strides: list[int]) -> list[Piece]:
        pieces: list[Piece] = []

        def take(dimension: int, extent: int) -> None:
            pieces.append(Piece(dimension, extent, strides[dimension]))
            left[dimension] //= extent
            strides[dimension] *= extent

        whole = next((d for d, n in enumerate(left) if n == size and strides[d] == 1 and size > 1), None)
        if whole is not None:
            take(whole, size)
            return pieces
        for d in sorted(range(len(left)), key=lambda d: (strides[d] == 1, -left[d])):
            if size > 1 and left[d] > 1 and (extent := math.gcd(size, left[d])) > 1:
                take(d, extent)
                size //= extent
        if size > 1:
            pieces.append(Piece(-1, size, 1))
        return pieces
