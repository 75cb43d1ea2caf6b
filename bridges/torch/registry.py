"""Lowering rules: which JAX function stands for which ATen op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kpx.errors import KpxError

RULES: dict[Any, Callable] = {}
# Ops whose rule draws random numbers: it takes a JAX key as `key=`.
RANDOM: set[Any] = set()


def lowers(*overloads, random: bool = False) -> Callable[[Callable], Callable]:
    """Registers a pure JAX function as the lowering of exact ATen overloads.

    The function takes the overload's own arguments, tensors as JAX arrays, and gives an array or a
    tuple of arrays with the dtypes and shapes that PyTorch would give.

        @lowers(torch.ops.aten.tanh.default)
        def tanh(x): return jnp.tanh(x)

    Args:
        random: the op draws random numbers; the function then takes `key=`, a JAX key of its own at each call.

    Raises:
        KpxError: an overload has a rule already.
    """

    def register(function: Callable) -> Callable:
        for overload in overloads:
            if overload in RULES:
                raise KpxError(
                    f"`{overload}` was given a second lowering rule ({function.__module__}); "
                    f"the first is in {RULES[overload].__module__}. Remove one of them."
                )
            RULES[overload] = function
            if random:
                RANDOM.add(overload)
        return function

    return register
