"""`kpx.ops` for PyTorch models: tensors in and out, in eager PyTorch, under `torch.compile`, and through kpx.

    from kpx.bridges.torch import ops

    y = ops.attention(q, k, v, causal=True, window=128)

Each takes what the function of its name in `kpx.ops` takes, tensors for arrays. A model that kpx optimizes has its target's
kernel there; eager PyTorch computes it in JAX, on the CPU. Gradients are the op's own.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import library

from kpx import ops as _jax_ops
from kpx.bridges.torch.dtypes import to_jax, to_torch
from kpx.bridges.torch.registry import lowers
from kpx.bridges.torch.tensors import to_array, to_tensor
from kpx.errors import InputError

__all__ = list(_jax_ops.__all__)


# What crosses PyTorch's dispatcher: the op's name, its tensors, and as text, which Dynamo can make, the parameters that
# these are, those that are numbers, and the numbers: "query;key;value|causal;scale|True;0.5".


@functools.lru_cache(maxsize=1024)
def _function(name: str, given: str) -> Callable:
    """The op as a function of its arrays, which gives a list."""
    tensors, keys, values = (part.split(";") if part else [] for part in given.split("|"))
    numbers = {key: ast.literal_eval(value) for key, value in zip(keys, values, strict=True)}
    op = getattr(_jax_ops, name)

    def function(*arrays):
        return jax.tree.leaves(op(**dict(zip(tensors, arrays, strict=True)), **numbers))

    return function


def _gradients(name: str, given: str, count: int) -> Callable:
    """The gradients by every floating array, from the arrays and the cotangents of the floating results."""
    function = _function(name, given)

    def gradients(*values):
        arrays, cotangents = values[:count], list(values[count:])
        places = [i for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of_floating(*variable):
            whole = list(arrays)
            for place, value in zip(places, variable, strict=True):
                whole[place] = value
            return [r for r in function(*whole) if jnp.issubdtype(r.dtype, jnp.inexact)]

        return list(jax.vjp(of_floating, *(arrays[i] for i in places))[1](cotangents))

    return gradients


def _structs(function: Callable, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Empty tensors like the results."""
    with jax.enable_x64(True):
        given = [jax.ShapeDtypeStruct(tuple(t.shape), to_jax(t.dtype)) for t in tensors]
        found = jax.eval_shape(function, *given)
    return [torch.empty(r.shape, dtype=to_torch(r.dtype), device=tensors[0].device) for r in found]


def _computed(function: Callable, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    device = jax.local_devices(backend="cpu")[0]
    with jax.enable_x64(True):
        results = jax.jit(function)(*(to_array(t.detach(), device) for t in tensors))
    return [to_tensor(r).clone() for r in results]


@library.custom_op("kpx::op", mutates_args=())
def _op(tensors: Sequence[torch.Tensor], name: str, given: str) -> list[torch.Tensor]:
    return _computed(_function(name, given), tensors)


@_op.register_fake
def _(tensors, name, given):
    return _structs(_function(name, given), tensors)


@library.custom_op("kpx::op_backward", mutates_args=())
def _op_backward(
    tensors: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], name: str, given: str
) -> list[torch.Tensor]:
    return _computed(_gradients(name, given, len(tensors)), [*tensors, *cotangents])


@_op_backward.register_fake
def _(tensors, cotangents, name, given):
    return [torch.empty_like(t) for t in tensors if t.is_floating_point()]


def _save(ctx, inputs, output):
    tensors, ctx.name, ctx.given = inputs
    ctx.save_for_backward(*tensors)
    ctx.like = [(o.shape, o.dtype, o.device) for o in output]


def _backward(ctx, gradients):
    tensors = list(ctx.saved_tensors)
    cotangents = [
        torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient.contiguous()
        for gradient, (shape, dtype, device) in zip(gradients, ctx.like, strict=True)
        if dtype.is_floating_point
    ]
    found = iter(torch.ops.kpx.op_backward(tensors, cotangents, ctx.name, ctx.given))
    return [next(found) if t.is_floating_point() else None for t in tensors], None, None


_op.register_autograd(_backward, setup_context=_save)


@lowers(torch.ops.kpx.op.default)
def _lower(tensors, name, given):
    return tuple(_function(name, given)(*tensors))


@lowers(torch.ops.kpx.op_backward.default)
def _lower_backward(tensors, cotangents, name, given):
    return tuple(_gradients(name, given, len(tensors))(*tensors, *cotangents))


# The functions ------------------------------------------------------------------------------------


def _wrapped(name: str) -> Callable:
    op = getattr(_jax_ops, name)
    signature = inspect.signature(op)

    def function(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"`kpx.bridges.torch.ops.{name}`: {error}. It takes {signature}.") from None
        tensors = {key: value for key, value in bound.items() if isinstance(value, torch.Tensor)}
        numbers = {key: _number(name, key, value) for key, value in bound.items() if key not in tensors}
        if not tensors:
            raise InputError(
                f"`kpx.bridges.torch.ops.{name}` was given no tensor. For JAX arrays, use `kpx.ops.{name}`."
            )
        given = "|".join(map(";".join, (tensors, numbers, [f"{value!r}" for value in numbers.values()])))
        results = torch.ops.kpx.op(list(tensors.values()), name, given)
        return results[0] if len(results) == 1 else tuple(results)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"`kpx.ops.{name}`, of tensors.\n\n{inspect.getdoc(op)}"
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _number(name: str, key: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return to_jax(value).name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        f"`kpx.bridges.torch.ops.{name}` was given `{key}={value!r}`. It takes tensors, numbers, strings and dtypes."
    )


for _name in __all__:
    globals()[_name] = _wrapped(_name)
