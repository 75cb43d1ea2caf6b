"""Fusion patterns of one's own: a computation and what computes it better, both as JAX functions.

    def search(x, w, *, eps):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w

    kpx.fusion.pattern(search, my_kernel, example=(struct(4, 64), struct(64)), numbers={"eps": 1e-6})

From then on, wherever a module computes what `search` does, in a model of any framework and in its backward pass too,
`my_kernel` computes it. Packages register theirs by an entry point of the group `kpx.patterns`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kpx.kernels import patterns as _registry
from kpx.kernels.pattern_check import Verdict, check
from kpx.kernels.patterns import Pattern, unregister

__all__ = ["Pattern", "Verdict", "check", "pattern", "patterns", "unregister"]


def pattern(
    search: Callable | Sequence[Callable],
    replace: Callable,
    *,
    example: Sequence[Any],
    numbers: Mapping[str, float] | None = None,
    supports: Callable[..., str | None] | None = None,
    name: str | None = None,
) -> Pattern:
    """Has kpx compute by `replace` what a module computes as `search` does.

    Matching is blind to the order of operands, to how an operand is broadcast or converted, and to whatever kpx's
    canonicalization makes equal. What is between `search`'s inputs and outputs must be used by nothing else. Before a
    pattern is first used it is checked (`kpx.fusion.check`); one that fails is left out, with a warning.

    Args:
        search: `(*arrays, **numbers)` in plain JAX; or several spellings of one computation.
        replace: the same arguments; results of the same shapes and dtypes.
        example: arrays, or `jax.ShapeDtypeStruct`s, that both can be traced at. Dimensions that are equal there are
            equal in the checks.
        numbers: keyword arguments that are constants in a module (`eps`, a scale), with an example of each.
        supports: `(*structs, **numbers)` gives the reason why a case is to be left alone, or None.
        name: what reports call it; the first search's name by default.

    Raises:
        InputError: the name is taken, a function cannot be traced at the example, or the results' types differ.
    """
    searches = (search,) if callable(search) else tuple(search)
    structs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in example)
    label = name or getattr(searches[0], "__name__", "pattern")
    return _registry.register(
        Pattern(label, tuple((s,) for s in searches), replace, structs, dict(numbers or {}), supports)
    )


def patterns() -> list[Pattern]:
    """Every pattern that is looked for: kpx's own, those of packages, and those registered here."""
    return _registry.patterns()
