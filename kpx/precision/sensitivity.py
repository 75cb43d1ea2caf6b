"""How sensitive a model's products are to rounding, estimated without running the model once for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.jax_internals import called_jaxpr, name_stack
from kpx.passes.lowered_precision import path_of
from kpx.precision.budget import relative_error

Sensitivities = dict[Any, list[float]]
_DIRECTIONS = 4  # random combinations of the outputs whose derivative is taken
_PLAIN = (((1,), (1,)), ((), ()))


def local(study: Any, choices: Mapping[Any, Sequence[str]], ways: Mapping[Any, Sequence[Any]]) -> Sensitivities:
    """By place, how far the product's own result is from exact, by each choice."""

    def look(place: Any) -> Callable:
        def found(x, w):
            rows = x.reshape(-1, x.shape[-1])
            exact = ways[place.key][0](rows, w, dimensions=_PLAIN)
            errors = [way(rows, w, dimensions=_PLAIN) - exact for way in ways[place.key][1:]]
            return jnp.stack([jnp.linalg.norm(e) / jnp.maximum(jnp.linalg.norm(exact), 1e-30) for e in errors])

        return found

    return _completed(study, choices, ways, _means(study.observe(look)))


def entropy(study: Any, choices: Mapping[Any, Sequence[str]], ways: Mapping[Any, Sequence[Any]]) -> Sensitivities:
    """By place, how few of eight bits' levels its input uses, times how far its largest number is from the usual ones; a choice of
    more bits costs as much less."""
    from kpx.precision.budget import BITS

    def look(place: Any) -> Callable:
        def found(x, w):
            numbers = jnp.abs(x.reshape(-1))
            largest = jnp.maximum(numbers.max(), 1e-30)
            counts = jnp.histogram(numbers / largest, bins=128, range=(0.0, 1.0))[0]
            shares = counts / numbers.size
            bits = 1 - jnp.sum(jnp.where(shares > 0, shares * jnp.log2(jnp.maximum(shares, 1e-30)), 0.0))  # 1: the sign
            outlying = largest / jnp.maximum(jnp.sqrt(jnp.mean(numbers**2)), 1e-30)
            return (9 - bits) * outlying

        return found

    found = _means([{k: np.atleast_1d(v) for k, v in r.items()} for r in study.observe(look)])
    scaled = {
        key: [float(v[0]) * (0.0 if name == "f32" else 2.0 ** (8 - min(BITS[name], 12)) / 100) for name in choices[key]]
        for key, v in found.items()
    }
    return _completed(study, choices, ways, scaled)


def gradient(study: Any, choices: Mapping[Any, Sequence[str]], ways: Mapping[Any, Sequence[Any]]) -> Sensitivities:
    """By place, how far the outputs move to first order when each choice is taken there: its error, through the derivative of random
    combinations of the outputs."""
    totals = [{} for _ in study.batches]
    for found, (function, arrays, weights) in zip(totals, study.functions(), strict=True):
        probes = _Probes(function, arrays, weights, ways)
        for seed in range(_DIRECTIONS):
            for key, value in probes.moved(seed).items():
                found[key] = found.get(key, 0.0) + np.asarray(value, np.float64) ** 2 / _DIRECTIONS
    return _completed(study, choices, ways, _means([{k: np.sqrt(v) for k, v in found.items()} for found in totals]))


def _means(results: Sequence[Mapping[Any, np.ndarray]]) -> Sensitivities:
    keys = {key for result in results for key in result}
    return {key: list(map(float, np.mean([r[key] for r in results if key in r], axis=0))) for key in keys}


def _completed(study, choices, ways, found: Sensitivities) -> Sensitivities:
    """With what could not be estimated measured: products of no weights, and those in loops."""
    run = study.chooser(ways)
    for key, names in choices.items():
        if key not in found:
            found[key] = [
                0.0 if n == "f32" else relative_error(run({key: i + 1}), study.outputs) for i, n in enumerate(names)
            ]
    return found


class _Probes:
    """A model's derivative by the results of its products by weights."""

    def __init__(
        self, function: Callable, arrays: Sequence[jax.Array], weights: int, ways: Mapping[Any, Sequence[Any]]
    ):
        self._jaxpr, self._ways = jax.make_jaxpr(function)(*arrays), ways
        self._arrays = arrays
        self._weights = weights
        shapes: dict[Any, Any] = {}
        jax.eval_shape(lambda: self._run({}, shapes))
        self._zeros = {key: jnp.zeros(s.shape, s.dtype) for key, (s, _) in shapes.items() if key in ways}
        self._gradient = jax.jit(jax.grad(self._combined, has_aux=True))

    def moved(self, seed: int) -> dict[Any, np.ndarray]:
        """By place, how far a random combination of the outputs moves with each choice, over how large it is by chance."""
        gradients, (errors, size) = self._gradient(self._zeros, jax.random.key(seed))
        return {
            key: np.array([float(jnp.vdot(g, e)) for e in errors[key]]) / max(float(size), 1e-30)
            for key, g in gradients.items()
        }

    def _combined(self, added: Mapping[Any, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
        seen: dict[Any, Any] = {}
        outputs = [o for o in self._run(added, seen) if jnp.issubdtype(o.dtype, jnp.floating)]
        keys = jax.random.split(key, len(outputs))
        total = sum(jnp.vdot(jax.random.normal(k, o.shape, o.dtype), o) for k, o in zip(keys, outputs, strict=True))
        size = jnp.sqrt(sum(jnp.sum(jnp.square(jax.lax.stop_gradient(o))) for o in outputs))
        errors = {key: jax.lax.stop_gradient(seen[key][1]) for key in added}
        return total, (errors, size)

    def _run(self, added: Mapping[Any, jax.Array], seen: dict[Any, Any]) -> list[jax.Array]:
        fixed = [i < self._weights for i in range(len(self._arrays))]
        outputs, _ = self._eval(self._jaxpr.jaxpr, self._jaxpr.consts, list(self._arrays), fixed, "", added, seen)
        return outputs

    def _eval(self, jaxpr, consts, arrays, fixed, around: str, added, seen) -> tuple[list[Any], list[bool]]:
        """A jaxpr, its products by weights noted and added to; and which results depend on weights alone."""
        env: dict[Any, Any] = {}
        alone: dict[Any, bool] = {}
        for variables, values, known in (
            (jaxpr.constvars, consts, [True] * len(consts)),
            (jaxpr.invars, arrays, fixed),
        ):
            env.update(zip(variables, values, strict=True))
            alone.update(zip(variables, known, strict=True))

        def read(atom):
            return (atom.val, True) if hasattr(atom, "val") else (env[atom], alone[atom])

        for eqn in jaxpr.eqns:
            values, known = zip(*map(read, eqn.invars), strict=True) if eqn.invars else ((), ())
            path = f"{around}/{name_stack(eqn)}"
            if (inner := called_jaxpr(eqn)) is not None:
                results, depend = self._eval(inner.jaxpr, inner.consts, values, known, path, added, seen)
            else:
                found = eqn.primitive.bind(*values, **eqn.params)
                results = list(found) if eqn.primitive.multiple_results else [found]
                depend = [all(known)] * len(results)
                if eqn.primitive is jax.lax.dot_general_p and _by_weight(eqn, known):
                    results = [self._noted(values, eqn, results[0], path, added, seen)]
            env.update(zip(eqn.outvars, results, strict=True))
            alone.update(zip(eqn.outvars, depend, strict=True))
        out = [read(atom) for atom in jaxpr.outvars]
        return [value for value, _ in out], [a for _, a in out]

    def _noted(self, values, eqn, result, path: str, added, seen):
        place = path_of(path + "/dot_general")
        key = place, sum(known[0] == place for known in seen)
        ways = self._ways.get(key)
        errors = []
        if added and ways is not None:
            errors = [way(*values, dimensions=eqn.params["dimension_numbers"]) - result for way in ways[1:]]
        seen[key] = result, errors
        return result + added[key] if key in added else result


def _by_weight(eqn: Any, known: Sequence[bool]) -> bool:
    (lhs, rhs), batch = eqn.params["dimension_numbers"]
    last = eqn.invars[0].aval.ndim - 1
    plain = not batch[0] and eqn.invars[1].aval.ndim == 2 and len(rhs) == 1 and tuple(lhs) == (last,)
    return plain and known[1] and not known[0]


STRATEGIES: Mapping[str, Callable] = {"local": local, "entropy": entropy, "gradient": gradient}
