"""Lowering rules: which JAX function stands for which ATen op."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from kpx.errors import KpxError

# By overload; by name for the ops of a library that may not be imported.
RULES: dict[Any, Callable] = {}
# Ops whose rule takes a JAX key as `key=`, and when: a function of the op's own arguments.
RANDOM: dict[Any, Callable[..., bool]] = {}


def rule_of(op: Any) -> Callable | None:
    """The lowering rule of an overload, or None."""
    if (rule := RULES.get(op)) is None and isinstance(op, torch._ops.OpOverload):
        rule = RULES.get(op.name())
    return rule


# The node of the captured graph whose rule is being run: a few rules depend on how an operand lay in memory.
CURRENT: ContextVar[Any] = ContextVar("kpx_node", default=None)


def was_contiguous(position: int) -> bool:
    """Whether an operand of the current op was row-major when it was captured."""
    node = CURRENT.get()
    value = node.args[position].meta.get("val") if node is not None else None
    return value is None or value.is_contiguous()


def _always(*args, **kwargs) -> bool:
    return True


def lowers(*overloads, random: bool | Callable[..., bool] = False) -> Callable[[Callable], Callable]:
    """Registers a pure JAX function as the lowering of exact overloads.

    The function takes the overload's own arguments, tensors as JAX arrays, and gives an array or a
    tuple of arrays with the dtypes and shapes that PyTorch would give.

        @lowers(torch.ops.aten.tanh.default)
        def tanh(x): return jnp.tanh(x)

    Args:
        overloads: `torch.ops.aten.tanh.default`; or a name, `"library::op"` (`"library::op.overload"` where it is not
            the default one), of an op whose library need not be imported.
        random: the op draws random numbers; the function then takes `key=`, a JAX key of its own at each call. A
            function of the op's arguments tells when it draws (dropout in training alone); else `key` is None.

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
                RANDOM[overload] = _always if random is True else random
        return function

    return register
