"""Buckets: few sizes to compile for, where inputs come in many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kpx.errors import ConfigError, InputError


@dataclass(frozen=True)
class Buckets:
    """The sizes that inputs are padded to.

    Attributes:
        batch: sizes for dimension 0, increasing; `"pow2"` for the next power of two; None leaves it as it is.
        sequence: the same for dimension 1.
        by_row: rows of a batch that is padded on the right, by its `attention_mask`, go into buckets by their own
            lengths, so that padding is not computed. What the model gives at padded positions is then 0.

    Raises:
        ConfigError: sizes that are not positive, not increasing, or not given at all; `by_row` without both of them.
    """

    batch: Sequence[int] | str | None = None
    sequence: Sequence[int] | str | None = None
    by_row: bool = False

    def __post_init__(self):
        for name in ("batch", "sequence"):
            sizes = getattr(self, name)
            if sizes is None or sizes == "pow2":
                continue
            if isinstance(sizes, str) or not sizes or any(not isinstance(n, int) or n < 1 for n in sizes):
                raise ConfigError(f"`{name}={sizes!r}` is not a list of sizes. Use positive ints, or 'pow2'.")
            if list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"`{name}={sizes!r}` is not increasing. Use, say, {sorted(set(sizes))}.")
            object.__setattr__(self, name, tuple(sizes))
        if self.batch is None and self.sequence is None:
            raise ConfigError("No sizes were given. Use, say, `kpx.Buckets(batch=[1, 8, 32], sequence='pow2')`.")
        if self.by_row and (self.batch is None or self.sequence is None):
            raise ConfigError(
                "`by_row=True` needs sizes for both dimensions. Use, say, "
                "`kpx.Buckets(batch=[8, 32], sequence=[16, 32, 64], by_row=True)`."
            )

    def largest(self, name: str, size: int) -> int:
        """The largest bucket along `"batch"` or `"sequence"`, or the bucket of a size where there is no largest."""
        sizes = getattr(self, name)
        return self.fit(name, size) if sizes is None or sizes == "pow2" else sizes[-1]

    def fit(self, name: str, size: int) -> int:
        """The bucket of a size along `"batch"` or `"sequence"`.

        Raises:
            InputError: it is larger than the largest.
        """
        sizes = getattr(self, name)
        if sizes is None:
            return size
        if sizes == "pow2":
            return 1 << max(size - 1, 0).bit_length()
        for bucket in sizes:
            if size <= bucket:
                return bucket
        raise InputError(f"A {name} of {size} was given, and the largest bucket is {sizes[-1]}. Add one, or split it.")
