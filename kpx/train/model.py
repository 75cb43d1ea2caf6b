"""What is trained, whatever framework it came from: parameters, what is carried beside them, and a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from kpx.bridges import registry
from kpx.errors import InputError


@dataclass(frozen=True)
class Model:
    """A model to train.

    Attributes:
        params: what gradients are taken by, a pytree of arrays.
        carried: what is carried along and written by the forward pass (BatchNorm's statistics, say).
        loss: `(params, carried, batch, key) -> (loss, (carried, metrics))`.
    """

    params: Any
    carried: Any
    loss: Callable


def adapted(model: Any, loss: Callable | None, params: Any) -> Model:
    """A model and its loss as a `Model`.

    Args:
        model: a `torch.nn.Module`, a flax nnx module, a bound flax linen module; or a JAX loss, `(params, batch) -> loss`, or
            `(params, batch, key)`.
        loss: of a module: `(call, batch) -> loss`, or `(loss, metrics)`, where `call` is the module. By default the
            first of what the module gives for a batch's entries by name, which is Hugging Face's loss where there are labels.
        params: of a JAX loss, the parameters.

    Raises:
        InputError: the model is none of these, or parameters are missing.
    """
    if (bridge := registry.find(model)) is not None and hasattr(bridge, "functional"):
        held, buffers, function = bridge.functional(model)
        return Model(held, buffers, _of_module(function, loss or _first_output))
    if not callable(model):
        raise InputError(
            f"`{type(model).__module__}.{type(model).__qualname__}` is not a model. Pass a torch.nn.Module, a flax module, or a "
            "loss in JAX, `(params, batch) -> loss`, with `params=`."
        )
    if params is None:
        raise InputError("A loss in JAX was given without its parameters. Pass them: `params=`.")
    takes_key = len(inspect.signature(model).parameters) > 2

    def of_params(params, carried, batch, key):
        value, metrics = _with_metrics(model(params, batch, key) if takes_key else model(params, batch))
        return value, (carried, metrics)

    return Model(params, {}, of_params)


def _of_module(function: Callable, loss: Callable) -> Callable:
    def of_params(params, carried, batch, key):
        written = [carried]

        def call(*inputs, **named):
            outputs, written[0] = function(params, written[0], *inputs, key=key, **named)
            return outputs

        value, metrics = _with_metrics(loss(call, batch))
        return value, (written[0], metrics)

    return of_params


def _first_output(call: Callable, batch: Any) -> jax.Array:
    outputs = (
        call(**batch) if isinstance(batch, dict) else call(*batch) if isinstance(batch, (tuple, list)) else call(batch)
    )
    first = next(leaf for leaf in jax.tree.leaves(outputs if not hasattr(outputs, "to_tuple") else outputs.to_tuple()))
    if getattr(first, "shape", None) != ():
        raise InputError(
            f"The model's first output is no loss: it has the shape {tuple(first.shape)}. Pass `loss=`, a function of the model "
            "and a batch, or labels in the batch where the model makes a loss of them."
        )
    return first


def _with_metrics(given: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    value, metrics = given if isinstance(given, tuple) else (given, {})
    if getattr(value, "shape", None) != ():
        raise InputError(
            f"The loss is not one number: it has the shape {getattr(value, 'shape', type(value))}. Take its mean."
        )
    return value, dict(metrics)
