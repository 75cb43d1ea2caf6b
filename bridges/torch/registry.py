"""Lowering rules: which JAX function stands for which ATen op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kpx.errors import KpxError, UnsupportedError

RULES: dict[Any, Callable] = {}


def lowers(*overloads) -> Callable[[Callable], Callable]:
    """Registers a pure JAX function as the lowering of exact ATen overloads.

    The function takes the overload's own arguments, tensors as JAX arrays, and gives an array or a
    tuple of arrays with the dtypes and shapes that PyTorch would give.

        @lowers(torch.ops.aten.tanh.default)
        def tanh(x): return jnp.tanh(x)

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
        return function

    return register


def refuse_dropout(p: float) -> None:
    """Raises `UnsupportedError` where dropout is active: random ops have no rules yet."""
    if p > 0:
        raise UnsupportedError(
            f"Dropout with p={p} is active (the model is in training mode), and kpx does not lower random ops yet. "
            "Call `model.eval()` first."
        )
