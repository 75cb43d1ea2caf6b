"""Lowering rules: which JAX function stands for which ATen op."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from kpx.bridges.torch.operators import Absent
from kpx.errors import KpxError, UnsupportedError

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


# What the symbolic sizes of that graph stand for in this call: `{sympy symbol: int}`.
SIZES: ContextVar[dict[Any, int]] = ContextVar("kpx_sizes", default={})  # noqa: B039  (never written)


def was_contiguous(position: int) -> bool:
    """Return whether an operand of the current op was row-major when it was captured."""
    node = CURRENT.get()
    value = node.args[position].meta.get("val") if node is not None else None
    return value is None or value.is_contiguous()


def is_read(item: int) -> bool:
    """Return whether the graph reads an item of the tuple that the current op gives."""
    node = CURRENT.get()
    if node is None:
        return True
    return not all(user.target is operator.getitem and user.args[1] != item for user in node.users)


def memory_layout(position: int, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """`(storage_offset, strides)` that an operand of the current op had when it was captured, in elements.

    An array of a program has none of its own: it is row-major where the operand is not known.

    Args:
        shape: the operand's shape.

    Raises:
        UnsupportedError: a stride is not known in terms of the graph's sizes.
    """
    value = _captured(CURRENT.get(), position)
    if not isinstance(value, torch.Tensor):
        return 0, tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return _size(value.storage_offset()), tuple(map(_size, value.stride()))


def _captured(node: Any, position: int) -> Any:
    """The tensor that stood for a node's operand at capture, or a constant itself; None where that is not known."""
    if node is None or not isinstance(node.args[position], torch.fx.Node):
        return None
    operand = node.args[position]
    if operand.op == "get_attr" and "val" not in operand.meta:
        return operator.attrgetter(str(operand.target))(operand.graph.owning_module)
    return operand.meta.get("val")


def bound_sizes(values: Iterable[tuple[Any, Any]]) -> dict[Any, int]:
    """What symbols stand for, of pairs of a captured value (a size or a tensor) and what is given for it."""
    bound: dict[Any, int] = {}
    for captured, actual in values:
        pairs = [(captured, actual)]
        if isinstance(captured, torch.Tensor) and hasattr(actual, "shape"):
            pairs = list(zip(captured.shape, actual.shape, strict=False))
        for size, number in pairs:
            if isinstance(size, torch.SymInt) and isinstance(number, int) and size.node.expr.is_Symbol:
                bound[size.node.expr] = number
    return bound


def _size(number: Any) -> int:
    if not isinstance(number, torch.SymInt):
        return number
    value = number.node.expr.subs(SIZES.get())
    if not value.is_Integer:
        raise UnsupportedError(f"A stride or an offset, {number}, is not known from the sizes of the graph's inputs.")
    return int(value)


def _always(*args, **kwargs) -> bool:
    return True


def lowers(*overloads, random: bool | Callable[..., bool] = False) -> Callable[[Callable], Callable]:
    """Registers a pure JAX function as the lowering of exact overloads.

    The function takes the overload's own arguments, tensors as JAX arrays, and gives an array or a
    tuple of arrays with the dtypes and shapes that PyTorch would give.

        @lowers(torch.ops.aten.tanh.default)
        def tanh(x): return jnp.tanh(x)

    Args:
        overloads: `torch.ops.aten.tanh.default` (one that this PyTorch lacks is left out); or a name, `"library::op"` (`"library::op.overload"` where it is not
            the default one), of an op whose library need not be imported.
        random: the op draws random numbers; the function then takes `key=`, a JAX key of its own at each call. A
            function of the op's arguments tells when it draws (dropout in training alone); else `key` is None.

    Raises:
        KpxError: an overload has a rule already.
    """

    def register(function: Callable) -> Callable:
        for overload in (o for o in overloads if not isinstance(o, Absent)):
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
