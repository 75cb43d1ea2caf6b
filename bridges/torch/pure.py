"""A PyTorch model as a pure JAX function of its parameters, for training in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.capture import capture
from kpx.bridges.torch.dtypes import to_jax, to_torch
from kpx.bridges.torch.exported import TENSOR, ExportedFunction
from kpx.errors import InputError


def functional(model: torch.nn.Module) -> tuple[dict[str, jax.Array], dict[str, jax.Array], Callable]:
    """`(params, buffers, fn)` of a model, in the mode (training or evaluation) that it is in now.

    `fn(params, buffers, *inputs, key=None, **named) -> (outputs, buffers)` is pure: it can be jitted, differentiated
    with respect to `params`, vmapped. `buffers` comes back with what the model wrote, BatchNorm's statistics say.
    Random ops, dropout say, draw from `key`, a JAX key. The model is captured once for each set of input shapes.

    Args:
        model: on the CPU. A parameter that several modules share is one entry of `params`, under its first name.

    Returns:
        `params`: the parameters that require a gradient, by name. `buffers`: everything else. Both are copies, so
        that training in JAX leaves the model as it is. 64-bit values become 32-bit where JAX's x64 is off.

    Raises:
        InputError: (from `fn`) an input is not an array or a constant, or a key is needed and was not given.
        CaptureError, UnsupportedError: (from `fn`) the model could not be brought over.
    """
    names = _first_names(model)
    params = {n: _array(p) for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: _array(p) for n, p in model.named_parameters() if not p.requires_grad}
    buffers |= {n: _array(b) for n, b in model.named_buffers()}
    training = {name: module.training for name, module in model.named_modules()}
    captured: dict[Any, tuple] = {}

    def fn(params: dict, buffers: dict, *inputs, key: jax.Array | None = None, **named):
        leaves, spec = pytree.tree_flatten((inputs, named))
        signature = (repr(spec), *((a.shape, a.dtype) if _is_array(a) else a for a in leaves))
        if signature not in captured:
            captured[signature] = _captured(model, training, leaves, spec)
        function, out_spec, constants, dtypes = captured[signature]
        if function.is_random and key is None:
            raise InputError("The model draws random numbers (dropout, say). Pass a JAX key: `fn(..., key=key)`.")
        held = constants | buffers | params

        def value(name):
            return held[names.get(name, name)].astype(dtypes[name])

        with jax.enable_x64(True):
            arrays = [a for a in leaves if _is_array(a)]
            results = function([value(n) for n in function.weights], [value(n) for n in function.state], arrays, key)
        left = iter(results.outputs)
        outputs = [_narrow(next(left)) if p is TENSOR else (next(left), p)[1] for p in function.outputs]
        written = {names.get(n, n): _narrow(a) for n, a in zip(function.state, results.state, strict=True)}
        return pytree.tree_unflatten(outputs, out_spec), {**buffers, **written}

    return params, buffers, fn


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, to the first name of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names[name] = first.setdefault(id(tensor), name)
    return names


def _captured(model, training, leaves, spec):
    examples = [torch.zeros(a.shape, dtype=to_torch(a.dtype)) if _is_array(a) else a for a in leaves]
    args, kwargs = pytree.tree_unflatten(examples, spec)
    now = {name: module.training for name, module in model.named_modules()}
    _set_modes(model, training)
    try:
        program = capture(model, args, kwargs)
    finally:
        _set_modes(model, now)
    constants = {n: _array(t) for n, t in program.constants.items() if isinstance(t, torch.Tensor)}
    function = ExportedFunction(program)
    # 64-bit state, which JAX held in 32 bits, is 64-bit inside.
    held = {**program.state_dict, **program.constants}
    dtypes = {name: to_jax(held[name].dtype) for name in (*function.weights, *function.state)}
    return function, program.call_spec.out_spec, constants, dtypes


def _set_modes(model: torch.nn.Module, modes: dict[str, bool]) -> None:
    for name, module in model.named_modules():
        module.training = modes[name]


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, torch.Tensor)


def _array(tensor: torch.Tensor) -> jax.Array:
    detached = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return jnp.array(jnp.from_dlpack(detached)) if detached.numel() else jnp.zeros(tuple(detached.shape))


def _narrow(array: Any) -> Any:
    """An array with the dtype that JAX would give it outside of our 64-bit scope."""
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
