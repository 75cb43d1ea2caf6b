"""Integers of an operator's call in the dtype that eager PyTorch computes in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch.dtypes import result_type, to_jax
from kpx.bridges.torch.operators import aten
from kpx.errors import UnsupportedError

# PyTorch refuses an integer that the dtype of these operators, or of these arguments, cannot hold; others wrap around.
_CHECKED = {
    "clamp", "clamp_max", "clamp_min", "constant_pad_nd", "fill", "full", "full_like", "hardtanh", "index_fill",
    "masked_fill", "new_full", "scalar_tensor", "scatter", "threshold", "where", "alpha", "beta", "value",
}  # fmt: skip
_EXPONENTS = {aten.pow.Tensor_Scalar}


def in_range(op: Any, expected: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of an operator with integers as eager PyTorch converts them to its integer dtype.

    Args:
        expected: the operator's result at capture.

    Raises:
        UnsupportedError: PyTorch refuses the integer.
    """
    if not isinstance(op, torch._ops.OpOverload) or op in _EXPONENTS:
        return args, kwargs
    numbers = _numbers(op, args, kwargs)
    dtype = _computed(args, kwargs, expected) if numbers else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        return args, kwargs
    limits = jnp.iinfo(dtype)
    for key, number in numbers.items():
        if limits.min <= number <= limits.max:
            continue
        # An unsigned dtype takes negative numbers down to its negated maximum.
        is_negative = limits.min == 0 and -limits.max <= number < 0
        name = key if isinstance(key, str) else op._schema.arguments[key].name
        if not _CHECKED.isdisjoint((name, op.overloadpacket.__name__)) and not is_negative:
            raise UnsupportedError(
                f"The number {number} cannot be converted to {np.dtype(dtype).name} without overflow."
            )
        wrapped = (number - limits.min) % (limits.max - limits.min + 1) + limits.min
        if isinstance(key, int):
            args = (*args[:key], wrapped, *args[key + 1 :])
        else:
            kwargs = kwargs | {key: wrapped}
    return args, kwargs


def _numbers(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[int | str, int]:
    """Return the integers that are given for scalars, or in place of tensors, by index or keyword."""
    names: dict[int | str, int] = {}
    for i, argument in enumerate(op._schema.arguments):
        key: int | str = argument.name if argument.kwarg_only or i >= len(args) else i
        value = kwargs.get(argument.name) if isinstance(key, str) else args[key]
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        if isinstance(value, int) and not isinstance(value, bool) and kind in ("number", "Tensor"):
            names[key] = value
    return names


def _computed(args: tuple, kwargs: dict[str, Any], expected: Any) -> Any:
    """Return the dtype that the operator computes in: its result's, or for a comparison that of its arrays."""
    if not isinstance(expected, torch.Tensor):
        return None
    if expected.dtype is not torch.bool:
        return to_jax(expected.dtype)
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and hasattr(a, "ndim")]
    return result_type(*arrays) if arrays else None
