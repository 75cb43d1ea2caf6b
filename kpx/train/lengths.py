"""Sequences of many lengths in a few: batches are padded to buckets, each of which is compiled once, on the same mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kpx.buckets import Buckets
from kpx.errors import ConfigError


class Lengths:
    """Pads batches along their sequences.

    Args:
        buckets: the lengths, `Buckets(sequence=...)`.
        padding: by the name of a batch's entry, the number that it is padded with; others are padded with zeros. The loss must
            leave padded positions out: labels of -100 where it knows them so, or a mask.

    Raises:
        ConfigError: the buckets are of rows, which a plan splits and a mean counts.
    """

    def __init__(self, buckets: Buckets, padding: Mapping[str, float] | None = None):
        if buckets.sequence is None or buckets.batch is not None or buckets.by_row:
            raise ConfigError(
                f"A trainer pads sequences alone, and was given {buckets}. Use, say, `kpx.Buckets(sequence=[512, 1024, 2048])`."
            )
        self._buckets, self._padding = buckets, dict(padding or {})

    def padded(self, batch: Any, *, largest: bool = False) -> Any:
        """A batch at its bucket's length, or at that of the largest bucket.

        Raises:
            InputError: a sequence is longer than every bucket.
        """
        length = max((np.shape(leaf)[1] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 1), default=0)
        if not length:
            return batch
        size = self._buckets.fit("sequence", length)
        if largest:
            size = self._buckets.largest("sequence", length)

        def at(path, leaf):
            if np.ndim(leaf) < 2 or np.shape(leaf)[1] != length:
                return leaf
            wide = [(0, 0)] * np.ndim(leaf)
            wide[1] = (0, size - length)
            return np.pad(np.asarray(leaf), wide, constant_values=self._padding.get(_name(path), 0))

        return jax.tree_util.tree_map_with_path(at, batch)

    def check(self, parts: int) -> None:
        """Raises where devices along `context` do not divide every bucket."""
        sizes = self._buckets.sequence
        if isinstance(sizes, tuple) and (odd := [n for n in sizes if n % parts]):
            raise ConfigError(
                f"The plan splits sequences over {parts} devices, which do not divide the buckets {odd}. Take lengths that they divide, "
                "or `plan={'context': 1}`."
            )


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else ""
