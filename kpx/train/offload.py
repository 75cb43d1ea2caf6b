"""An optimizer's state in the host's memory, streamed through the device: array after array is brought, updated, and put back.

As ZeRO-Offload (arXiv 2101.06840) holds it; the update itself runs on the device. Arrays wait for one another, since a compiler
that is free to would bring all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kpx.jax_internals import Lazy, inputs_of

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


def updated(optimizer: optax.GradientTransformation, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """New parameters, and the optimizer's new state in the host's memory.

    Args:
        state: its arrays are in the host's memory, but for those of no dimensions.
    """

    def update(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    given = (gradient, state, params)
    leaves, tree = jax.tree.flatten(given)
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
    closed, shape = jax.make_jaxpr(lambda *flat: update(*jax.tree.unflatten(tree, flat)), return_shape=True)(*structs)
    variables = dict(zip(closed.jaxpr.invars, leaves, strict=True))
    before, after = len(jax.tree.leaves(gradient)), len(leaves) - len(jax.tree.leaves(params))
    away = {v for v, a in [*variables.items()][before:after] if a.ndim}
    out = _Stream(closed, variables, away).values(len(jax.tree.leaves(params)))
    return jax.tree.unflatten(jax.tree.structure(shape), out)


class _Stream:
    def __init__(self, closed: Any, variables: dict[Any, jax.Array], away: set[Any]):
        self._closed, self._variables, self._away = closed, variables, away
        self._lazy = Lazy(closed, {v: a for v, a in variables.items() if v not in away})
        self._needs = {n: inputs_of(closed, [v]) & away for n, v in enumerate(closed.jaxpr.outvars)}
        self._here: set[Any] = set()

    def values(self, params: int) -> list[jax.Array]:
        """Parameters first, each with what of the state follows from the same arrays."""
        found: dict[int, jax.Array] = {}
        last: Sequence[jax.Array] = ()
        for number in range(len(self._needs)):
            if number in found:
                continue
            self._bring(self._needs[number], last)
            ready = [n for n, needed in self._needs.items() if n not in found and needed <= self._here]
            made = {n: self._lazy.value(self._closed.jaxpr.outvars[n]) for n in ready}
            found |= {n: jax.device_put(a, _HOST) if n >= params and jnp.ndim(a) else a for n, a in made.items()}
            last = [a for n, a in made.items() if n < params] or last
        return [found[n] for n in range(len(self._needs))]

    def _bring(self, needed: set[Any], last: Sequence[jax.Array]) -> None:
        """Brings arrays, once what was computed last is there."""
        for variable in [v for v in self._variables if v in needed - self._here]:
            array = self._variables[variable]
            if last:
                array, *_ = jax.lax.optimization_barrier((array, *last))
            self._lazy.learn(variable, jax.device_put(array, _DEVICE))
            self._here.add(variable)
