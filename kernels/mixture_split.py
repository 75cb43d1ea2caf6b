"""A mixture of experts over a mesh: each device routes its own rows, and rows go to where their experts are and back.

Experts are split along one axis, over which rows are exchanged (GShard, arXiv 2006.16668), by an exchange of ragged parts where
the platform has one. No row is dropped, so that a device must be able to hold every row of those that it exchanges with. While a
plan is made, the mixture is one operation that says what it costs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

PLANNED, PLANNED_GRADIENT = "kpx_planned_mixture", "kpx_planned_mixture_gradient"
"""Calls that stand for a mixture while a plan is made; nothing computes them."""


@dataclass(frozen=True)
class Spread:
    """How a mixture is split.

    Attributes:
        mesh: of the devices, or an abstract one.
        lead: of the first dimensions of rows, the axes that split each.
        experts: the axis that splits experts, one of those of rows; None where every device has all.
    """

    mesh: Any
    lead: tuple[tuple[str, ...], ...]
    experts: str | None


_SPREAD: contextvars.ContextVar[Spread | str | None] = contextvars.ContextVar("kpx_mixture_spread", default=None)


@contextlib.contextmanager
def spread_over(spread: Spread | str | None) -> Iterator[None]:
    """Mixtures that are traced inside are split; or, with `PLANNED`, stand for themselves."""
    token = _SPREAD.set(spread)
    try:
        yield
    finally:
        _SPREAD.reset(token)


def around(x: Any) -> Spread | str | None:
    """How a mixture over rows like these is to be split here; None for not at all."""
    spread = _SPREAD.get()
    if not isinstance(spread, Spread):
        return spread
    sizes = [math.prod(spread.mesh.shape[a] for a in axes) for axes in spread.lead]
    fits = x.ndim - 1 >= len(sizes) and all(n % k == 0 for n, k in zip(x.shape, sizes, strict=False))
    return spread if fits and math.prod(sizes) > 1 else None


def split(computed: Callable, spread: Spread, x, logits, gate, up, down, **options):
    """A mixture over a mesh.

    Args:
        computed: `(x, weights, chosen, matrices, **options) -> rows`, of rows that are here, by the experts that are here.
    """
    rows = PartitionSpec(*(axes or None for axes in spread.lead))
    matrices = PartitionSpec(spread.experts)
    parts = spread.mesh.shape[spread.experts] if spread.experts else 1
    local = functools.partial(computed, parts=parts, axis=spread.experts, **options)
    run = jax.shard_map(
        local, mesh=spread.mesh, in_specs=(rows, rows, matrices, matrices, matrices), out_specs=rows, check_vma=False
    )
    return run(x, logits, gate, up, down)


def exchanged(rows: jax.Array, experts: jax.Array, count: int, parts: int, axis: str, computed: Callable) -> jax.Array:
    """Each row by its expert, wherever that is.

    Args:
        rows: `[n, size]`, sorted by expert; `experts`: `[n]`, each row's.
        count: how many experts there are in all; `parts`: devices along `axis`, which have as many each.
        computed: `(rows, sizes) -> rows` by the experts that are here; rows are sorted, those beyond the sizes' sum are none.
    """
    each, most = count // parts, rows.shape[0] * parts
    counts = jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.int32), 0, dtype=jnp.int32)
    every = jax.lax.all_gather(counts, axis).reshape(parts, parts, each)  # from, to, of whose experts
    here = jax.lax.axis_index(axis)
    sent = _Sent(jnp.sum(every, -1), here, axis)
    arrived = sent.forth(rows, most)
    of_source = every[:, here]  # [from, each]
    ends = jnp.cumsum(of_source.reshape(-1))
    place = jnp.arange(most)
    expert = jnp.where(place < ends[-1], jnp.searchsorted(ends, place, side="right") % each, each)
    order = jnp.argsort(expert, stable=True)
    found = computed(arrived[order], jnp.sum(of_source, 0, dtype=jnp.int32))
    return sent.back(found[jnp.argsort(order)], rows.shape[0])


@dataclass(frozen=True)
class _Sent:
    """Ragged parts along an axis: `sizes[i, j]` rows go from device `i` to `j`, in order of `i` there."""

    sizes: jax.Array
    here: jax.Array
    axis: str

    def forth(self, rows: jax.Array, most: int) -> jax.Array:
        """What arrives, `[most, size]`: rows in order of their devices, then zeros."""
        return self._moved(rows, most, self.sizes)

    def back(self, rows: jax.Array, most: int) -> jax.Array:
        """Rows where they came from, in the order that they had."""
        return self._moved(rows, most, self.sizes.T)

    def _moved(self, rows: jax.Array, most: int, sizes: jax.Array) -> jax.Array:
        ragged, padded = (functools.partial(f, most=most, sizes=sizes) for f in (self._ragged, self._padded))
        return jax.lax.platform_dependent(rows, cpu=padded, default=ragged)

    def _ragged(self, rows, most, sizes):
        here, mine, theirs = self.here, sizes[self.here], sizes[:, self.here]
        before = jnp.cumsum(sizes, 0) - sizes  # rows of devices before this one, at each
        out = jnp.zeros((most, rows.shape[1]), rows.dtype)
        starts = jnp.cumsum(mine) - mine
        return jax.lax.ragged_all_to_all(rows, out, starts, mine, before[here], theirs, axis_name=self.axis)

    def _padded(self, rows, most, sizes):
        """By parts of one size, for platforms that exchange no others."""
        parts, length = sizes.shape[0], rows.shape[0]
        mine, theirs = sizes[self.here], sizes[:, self.here]
        starts = jnp.cumsum(mine) - mine
        largest = min(length, most)
        place = jnp.arange(largest)
        from_rows = jnp.where(place < mine[:, None], starts[:, None] + place, length)
        cut = rows.at[from_rows].get(mode="fill", fill_value=0)  # [to, largest, size]
        arrived = jax.lax.all_to_all(cut, self.axis, 0, 0)
        first = jnp.cumsum(theirs) - theirs
        to = jnp.where(place < theirs[:, None], first[:, None] + place, most)
        out = jnp.zeros((most, rows.shape[1]), rows.dtype)
        return out.at[to.reshape(-1)].set(arrived.reshape(parts * largest, -1), mode="drop")


# While planning --------------------------------------------------------------------------------


def planned(x, logits, gate, up, down, *, top_k: int):
    """What stands for a mixture, forward and backward."""
    return _planned(x, logits, gate, up, down, top_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _planned(x, logits, gate, up, down, top_k):
    return _call(PLANNED, jax.ShapeDtypeStruct(x.shape, x.dtype), top_k, x, logits, gate, up, down)


def _planned_forward(*given):
    return _planned(*given), given[:5]


def _planned_backward(top_k, saved, cotangent):
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in saved]
    return tuple(_call(PLANNED_GRADIENT, structs, top_k, *saved, cotangent))


_planned.defvjp(_planned_forward, _planned_backward)


def _call(name: str, structs: Any, top_k: int, *arrays):
    return jax.ffi.ffi_call(name, structs)(*arrays, top_k=np.int64(top_k))
