"""Running compiled programs on tensors: state comes back into the module, keys advance, checks are looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch import checks
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.exported import TENSOR, ExportedFunction, Signature
from kpx.bridges.torch.outputs import Layout
from kpx.bridges.torch.tensors import InputArrays, canonical, dense_order, to_array, to_tensor
from kpx.bridges.torch.weights import LiveWeights
from kpx.config import Config
from kpx.hardware.target import Target
from kpx.runtime.build import ModelProgram

_KEY = jax.ShapeDtypeStruct((4,), np.uint32)


def struct(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    """A tensor's shape and dtype as JAX's."""
    return jax.ShapeDtypeStruct(tuple(tensor.shape), to_jax(tensor.dtype))


def _wrap_key(bits: jax.Array) -> jax.Array:
    """A JAX key of four 32-bit words. Its generator (Philox) is the fastest that XLA has on the CPU."""
    return jax.random.wrap_key_data(bits, impl="rbg")


def _draw_key(device: jax.Device) -> jax.Array:
    """Four words drawn from PyTorch's default generator, so that `torch.manual_seed` decides them."""
    return to_array(torch.empty(4, dtype=torch.int32).random_(-(2**31), 2**31).view(torch.uint32), device)


class TensorProgram:
    """`function(weights, arrays, key) -> arrays`, compiled, as a function of tensors."""

    def __init__(
        self,
        function: Callable,
        weights: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        needs_key: bool,
        target: Target,
        config: Config,
        saved: Mapping[str, Any] | None = None,
        gradients: Collection[int] = (),
    ):
        """Compiles for weights and inputs like those given; what `saved` gave is taken as it is.

        Args:
            gradients: which inputs are gradients of a result.

        Raises:
            UnsupportedError: a rule does not take this case.
            CompileError: the target's compiler refused the module.
        """
        self._device = target.device
        self._needs_key = needs_key
        self._messages: list[tuple[str, str]] = []
        count = len(inputs)
        self._orders = [dense_order(t) for t in inputs]
        self._is_row_major = not any(self._orders)
        self._arrays = [InputArrays(self._device) for _ in inputs]
        back = [None if o is None else tuple(np.argsort(o)) for o in self._orders]

        def with_checks(weights, arrays):
            found = checks.Checks()
            given = [a if b is None else jnp.transpose(a, b) for a, b in zip(arrays[:count], back, strict=True)]
            with checks.collecting(found):
                results = function(weights, given, _wrap_key(arrays[count]) if needs_key else None)
            self._messages = found.messages
            return [*results, *found.outputs()]

        structs = [struct(t) for t in self._ordered(inputs)] + [_KEY] * needs_key
        holds_numbers = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in inputs)
        given = [t.detach() for t in self._ordered(inputs)] if target.is_present and holds_numbers else []

        def example():
            key = [np.zeros(_KEY.shape, _KEY.dtype)] * needs_key
            return [*(to_array(canonical(t), self._device) for t in given), *key]

        self.model = ModelProgram(
            with_checks, [struct(t) for t in weights], structs, target, config, x64=True,
            example=example if given else None, saved=None if saved is None else saved["model"], gradients=gradients,
        )  # fmt: skip
        if saved is not None:
            self._messages = list(saved["messages"])
        self._is_plain = not (needs_key or self._messages)

    def saved(self) -> dict[str, Any]:
        """What makes the same program in another process."""
        return {"model": self.model.saved(), "messages": self._messages}

    def __call__(self, tensors: Sequence[torch.Tensor], held: Sequence[jax.Array] | None = None) -> list[jax.Array]:
        """Return the results for tensors that carry no gradient.

        Args:
            held: what `ModelProgram.prepared` returned of the weights; by default, of those loaded last.

        Raises:
            IndexError: an index is out of range.
            LinAlgError: a matrix is singular, or not positive-definite.
        """
        held = self.model.held if held is None else held
        if not self._is_row_major:
            tensors = self._ordered(tensors)
        arrays = [array_of(t) for array_of, t in zip(self._arrays, tensors, strict=True)]
        if self._needs_key:
            arrays.append(_draw_key(self._device))
        results = self.model.call([*held, *arrays])
        if self._is_plain:
            return results
        if self._messages:
            checks.raise_failed(np.asarray(results.pop()), self._messages)
        return results

    def _ordered(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors with their dimensions in the order in which they lie in memory."""
        return [t if o is None else t.permute(o) for t, o in zip(tensors, self._orders, strict=True)]


class Invocation:
    """An exported function, compiled: what the model writes is written back after each call."""

    def __init__(
        self,
        function: ExportedFunction | Signature,
        weights: Sequence[torch.Tensor],
        state: LiveWeights,
        inputs: Sequence[torch.Tensor],
        target: Target,
        config: Config,
        saved: Mapping[str, Any] | None = None,
    ):
        """Compiles for weights and inputs like those given (see `TensorProgram`)."""
        self._state = state
        self._changed = function.changed
        self._is_pure = not (function.state or function.changed)
        count = len(inputs)

        def flat(weights, arrays, key):
            assert isinstance(function, ExportedFunction)  # a signature comes with the program that was saved
            results = function(weights, arrays[count:], arrays[:count], key)
            outputs = [r for r, p in zip(results.outputs, function.outputs, strict=True) if p is TENSOR]
            self._layouts = function.layouts
            stored = [r if n is None else n.stored(r) for r, n in zip(outputs, self._layouts, strict=True)]
            return [*stored, *results.state, *results.changed_inputs]

        given = [*inputs, *state.tensors()]
        self._layouts: list[Layout | None] = [] if saved is None else saved["layouts"]
        self._call = TensorProgram(flat, weights, given, function.is_random, target, config, saved)
        self._outputs = function.outputs.count(TENSOR)
        self._is_row_major = not any(self._layouts)
        self.program = self._call.model

    def saved(self) -> dict[str, Any]:
        """What makes the same program in another process."""
        return {**self._call.saved(), "layouts": self._layouts}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The output tensors; what the model writes has been written.

        Raises:
            IndexError, LinAlgError: see `TensorProgram`; nothing was written then.
        """
        if self._is_pure:
            return self._as_tensors(self._call(inputs))
        held = self._state.tensors()
        results = self._call([*inputs, *(t.detach() for t in held)])
        targets = [*held, *(inputs[p] for p in self._changed)]
        with torch.no_grad():
            for tensor, new in zip(targets, results[self._outputs :], strict=True):
                tensor.copy_(to_tensor(new))
        return self._as_tensors(results[: self._outputs])

    def _as_tensors(self, results: Sequence[jax.Array]) -> list[torch.Tensor]:
        tensors = list(map(to_tensor, results))
        if self._is_row_major:
            return tensors
        return [t if n is None else n.viewed(t) for t, n in zip(tensors, self._layouts, strict=True)]
