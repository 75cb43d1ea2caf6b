"""Whether a fusion pattern's replacement computes what the pattern does: both against f64, on random arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels.patterns import Pattern

_SIZES = (1, 2, 3, 5, 8, 16, 24, 32, 64)
_TRIES = 40  # random shapes, of which some cannot be traced


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        cases: how many (shapes, dtype) were compared, gradients included where the replacement has them.
        failures: where the replacement is farther from f64 than what it replaces, in words.
    """

    cases: int
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures


def check(pattern: Pattern, *, seed: int = 0, cases: int = 6, spellings: int | None = None) -> Verdict:
    """Compares a pattern's replacement with each of its spellings, values and gradients, on random shapes and dtypes.

    Both are measured against the spelling in f64: the replacement may be no farther from it than the spelling is in the
    same dtype, or than a few roundings.

    Args:
        cases: how many shapes are tried with each spelling and dtype, beside the example's.
        spellings: how many of the pattern's spellings are tried, drawn at random; all by default.

    Raises:
        InputError: no shapes but the example's could be traced.
    """
    rng = np.random.default_rng(seed)
    failures, count = [], 0
    searches = list(pattern.spellings())
    if spellings is not None and spellings < len(searches):
        searches = [searches[i] for i in rng.choice(len(searches), spellings, replace=False)]
    for search in searches:
        for structs in _shapes(pattern, search, rng, cases):
            for dtype in _dtypes(pattern):
                found = _compare(pattern, search, [_cast(s, dtype) for s in structs], rng)
                failures += found
                count += 1
    return Verdict(count, tuple(failures))


@functools.lru_cache(maxsize=256)
def verdict(pattern: Pattern) -> Verdict:
    """`check` with few cases, once for each pattern."""
    return check(pattern, cases=1)


def _shapes(pattern: Pattern, search: Callable, rng: Any, cases: int) -> Iterator[list[jax.ShapeDtypeStruct]]:
    """The example's shapes, and others in which dimensions that are equal in the example are equal."""
    yield list(pattern.example)
    sizes = sorted({d for s in pattern.example for d in s.shape})
    made = 0
    for _ in range(_TRIES):
        if made == cases:
            return
        new = dict(zip(sizes, rng.choice(_SIZES, len(sizes)).tolist(), strict=True))
        structs = [jax.ShapeDtypeStruct([new[d] for d in s.shape], s.dtype) for s in pattern.example]
        try:
            for function in (search, pattern.replace):
                jax.eval_shape(functools.partial(function, **pattern.numbers), *structs)
        except (TypeError, ValueError):
            continue  # heads that do not divide each other, and the like
        made += 1
        yield structs
    if cases and not made and sizes:
        raise InputError(f"The pattern `{pattern.name}` cannot be traced at any shapes but its example's.")


def _dtypes(pattern: Pattern) -> Sequence[Any]:
    floats = [s for s in pattern.example if jnp.issubdtype(s.dtype, jnp.floating)]
    return (jnp.float32, jnp.bfloat16) if floats else (None,)


def _cast(struct: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    is_float = jnp.issubdtype(struct.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(struct.shape, dtype if is_float and dtype is not None else struct.dtype)


def _compare(pattern: Pattern, search: Callable, structs: Sequence[jax.ShapeDtypeStruct], rng: Any) -> list[str]:
    arrays = [_random(rng, s) for s in structs]
    arrays = [np.abs(a) if place in pattern.positive else a for place, a in enumerate(arrays)]
    numbers = {name: value * float(rng.uniform(0.5, 2)) for name, value in pattern.numbers.items()}
    ours, theirs = (_all_results(functools.partial(f, **numbers), arrays) for f in (pattern.replace, search))
    candidate, competitor = ours(*arrays), theirs(*arrays)
    with jax.enable_x64(True):
        exact = theirs(*map(widened, arrays))
    failures = []
    for what in candidate:
        scale = max(map(root_mean_square, exact[what]), default=1.0) or 1.0
        for i, (got, plain, wanted) in enumerate(zip(candidate[what], competitor[what], exact[what], strict=True)):
            allowed = max(1.5 * distance(plain, wanted, scale), 4 * epsilon(got))
            if not (found := distance(got, wanted, scale)) <= allowed:
                given = ", ".join(f"{s.dtype}{list(s.shape)}" for s in structs)
                failures.append(
                    f"{what} {i} at {given} are {found:.2g} from f64, and may be {allowed:.2g} ({pattern.name})"
                )
    return failures


def _all_results(function: Callable, arrays: Sequence[np.ndarray]) -> Callable:
    """The results, and the gradients of their sum, each weighed differently, by every floating input."""
    inexact = tuple(i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating))

    def total(*given):
        leaves = jax.tree.leaves(function(*given))
        floating = [
            leaf if leaf.dtype.itemsize > 1 else leaf.astype(jnp.float32)  # f8 is promoted by nothing
            for leaf in leaves
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return sum((jnp.sum(_weights(leaf) * leaf) for leaf in floating), jnp.zeros(())), leaves

    def results(*given):
        if not inexact:
            return {"values": total(*given)[1]}
        gradients, leaves = jax.grad(total, argnums=inexact, has_aux=True)(*given)
        return {"values": leaves, "gradients": list(gradients)}

    return jax.jit(results)


def _weights(leaf: Any) -> np.ndarray:
    """Numbers that every dtype holds alike."""
    return np.sin(np.arange(leaf.size)).astype(jnp.bfloat16).astype(leaf.dtype).reshape(leaf.shape)


def _random(rng: Any, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    if jnp.issubdtype(struct.dtype, jnp.floating):
        return rng.standard_normal(struct.shape).astype(struct.dtype)
    if struct.dtype == bool:
        return rng.random(struct.shape) < 0.5
    return rng.integers(0, 4, struct.shape).astype(struct.dtype)


def widened(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def root_mean_square(array: Any) -> float:
    array = np.asarray(array, np.float64)
    return math.sqrt(float(np.nanmean(np.square(array)))) if array.size else 0.0


def distance(values: Any, reference: Any, scale: float) -> float:
    """The root-mean-square difference over a scale; infinite where NaNs differ."""
    values, reference = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if not np.array_equal(np.isnan(values), np.isnan(reference)):
        return math.inf
    return root_mean_square(values - reference) / scale


def epsilon(array: Any) -> float:
    return float(jnp.finfo(array.dtype).eps) if jnp.issubdtype(array.dtype, jnp.floating) else 0.0
