"""A module compiled ahead of its calls, for one signature: through torch.export, for this machine or an absent one."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.capture import capture
from kpx.bridges.torch.dtypes import to_torch
from kpx.bridges.torch.exported import TENSOR, ExportedFunction, Signature
from kpx.bridges.torch.fingerprint import fingerprint
from kpx.bridges.torch.invoke import Invocation
from kpx.bridges.torch.tensors import dense_order, plain
from kpx.bridges.torch.weights import LiveWeights
from kpx.config import Config
from kpx.errors import InputError, KernelCacheWarning, KpxError
from kpx.hardware.target import Target
from kpx.runtime import programs
from kpx.runtime.build import environment
from kpx.runtime.compiled import Compiled
from kpx.runtime.memory import give_back_freed

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class _Entry:
    """A compiled signature."""

    invocation: Invocation
    weights: LiveWeights
    weight_kinds: list[tuple[torch.Size, torch.dtype]]
    tensor_positions: list[int]
    outputs: list[Any]
    spec: pytree.TreeSpec
    device: jax.Device

    def __post_init__(self):
        self.is_one_tensor = self.spec.is_leaf() and self.outputs == [TENSOR]
        self.program = self.invocation.program

    def load(self) -> bool:
        """Reads the weights; False where their shapes or dtypes are not those this was compiled for."""
        if [(t.shape, t.dtype) for t in self.weights.tensors()] != self.weight_kinds:
            return False
        self.program.load(self.weights.read(self.device, self.program.prepare_weights))
        return True

    def is_current(self) -> bool:
        """Return whether the weights are as they were, or could be read again."""
        return not self.weights.changed() or self.load()

    def __call__(self, leaves: list[Any]) -> Any:
        tensors = self.invocation([leaves[i] for i in self.tensor_positions])
        if self.is_one_tensor:
            return tensors[0]
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if p is TENSOR else p for p in self.outputs], self.spec)


def compile_for(
    model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any], target: Target, config: Config
) -> Compiled:
    """Compile a module for one signature. Calling the result with another one is an `InputError`.

    Args:
        args, kwargs: tensors and constants; tensors' values matter to what a first call measures alone.

    Raises:
        CaptureError, UnsupportedError: the model could not be captured whole.
        CompileError: the target's compiler refused it.
    """
    leaves, key = _flatten(tuple(args), dict(kwargs))
    entry = _Ahead(model, target, config).compile(args, kwargs, (key, model.training))
    give_back_freed()

    def call(*call_args, **call_kwargs):
        inputs, inputs_key = _flatten(call_args, call_kwargs)
        if inputs_key != key:
            raise InputError(
                f"This was compiled for {_described(leaves)}, and was called with {_described(inputs)}. "
                "Call it with the same shapes and dtypes, or use `kpx.optimize(model)`, which compiles anew."
            )
        if not entry.is_current():
            raise InputError("The weights' shapes or dtypes have changed since this was compiled. Compile it again.")
        return entry(inputs)

    compiled = entry.program.compiled
    compiled._call = call
    return compiled


class _Ahead:
    """A model, and what it is compiled with."""

    def __init__(self, model: torch.nn.Module, target: Target, config: Config):
        self._model, self._target, self._config = model, target, config

    def compile(self, args: Sequence, kwargs: Mapping[str, Any], key: Any) -> _Entry:
        """Compile a signature, or restore what another process compiled."""
        clean_args, clean_kwargs = pytree.tree_map_only(torch.Tensor, plain, (tuple(args), dict(kwargs)))
        leaves, _ = pytree.tree_flatten((clean_args, clean_kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in positions]
        word = self._fingerprint(key, tensors)
        if word is not None and (found := self._restored(word, tensors, positions)) is not None:
            return found
        program = capture(self._model, clean_args, clean_kwargs)
        function, spec, constants = ExportedFunction(program), program.call_spec.out_spec, dict(program.constants)
        entry = self._made(function, tensors, positions, spec, constants, None)
        if word is not None:
            kept = {"signature": Signature.of(function), "spec": spec, "constants": constants}
            programs.save(str(self._config.cache_dir), word, {**kept, "program": entry.invocation.saved()})
        return entry

    def _made(self, function, tensors, positions, spec, constants, saved) -> _Entry:
        """A compiled signature, of an exported function or of what was saved of one."""
        weights = LiveWeights(self._model, function.weights, constants)
        state = LiveWeights(self._model, function.state, {})
        invocation = Invocation(function, weights.tensors(), state, tensors, self._target, self._config, saved)
        kinds = [(t.shape, t.dtype) for t in weights.tensors()]
        entry = _Entry(invocation, weights, kinds, positions, function.outputs, spec, self._target.device)
        entry.load()
        return entry

    def _fingerprint(self, key: Any, tensors: Sequence[torch.Tensor]) -> str | None:
        """The word that a program of this signature is kept under; None where none is kept."""
        config, target = self._config, self._target
        if config.cache_dir is None or not target.is_present:
            return None
        if os.environ.get("KPX_FUEL"):  # a part of the rewrites makes another program
            return None
        made = environment(target) | {"target": target.text, "features": repr(sorted(target.features))}
        kept = dataclasses.replace(config, cache_dir=None, compile_seconds=1.0)
        orders = [(dense_order(t), t.stride()) for t in tensors]
        for file in (config.kernel_cache, config.choices):  # what they say, too
            made[f"file {file}"] = str(os.path.exists(file) and os.stat(file).st_mtime_ns) if file else ""
        return fingerprint(self._model, (key, orders), made, kept)

    def _restored(self, word: str, tensors: list[torch.Tensor], positions: list[int]) -> _Entry | None:
        """A signature that another process compiled, or None."""
        kept = programs.load(str(self._config.cache_dir), word)
        if kept is None:
            return None
        try:
            parts = kept["signature"], tensors, positions, kept["spec"], kept["constants"], kept["program"]
            return self._made(*parts)
        except (KeyError, TypeError, AttributeError, ValueError, KpxError) as error:
            told = f"A program in `{self._config.cache_dir}` was not used: {type(error).__name__}: {error}."
            warnings.warn(f"{told} The model is compiled anew.", KernelCacheWarning, stacklevel=2)
            return None


def _flatten(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments' leaves, and a key of all that a compiled program depends on."""
    leaves: list[Any] = [*args, *kwargs.values()]
    parts: list[Any] = [len(args), *kwargs]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            _check(leaf)
            parts.append(leaf.shape)
            parts.append(leaf.dtype)
        elif isinstance(leaf, _CONSTANTS):
            parts.append((type(leaf), leaf))
        else:
            return _flatten_nested(args, kwargs)
    return leaves, tuple(parts)


def _flatten_nested(args: tuple, kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parts: list[Any] = [repr(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            _check(leaf)
            parts.append((leaf.shape, leaf.dtype))
        elif isinstance(leaf, _CONSTANTS):
            parts.append((type(leaf), leaf))
        else:
            raise InputError(
                f"An argument of type `{type(leaf).__module__}.{type(leaf).__qualname__}` was given. A model takes "
                "tensors, constants (bool, int, float, str, None), and lists, tuples and dicts of them; convert it "
                "with `torch.as_tensor(x)`."
            )
    return leaves, tuple(parts)


def _check(tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"A tensor that requires grad was given ({_described([tensor])}), and what was compiled ahead computes "
            "no gradients. Use `kpx.optimize(model)`, pass `x.detach()`, or call it under `torch.no_grad()`."
        )
    if tensor.device.type != "cpu":
        plain(tensor)


def _described(leaves: Sequence[Any]) -> str:
    words = [
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
        for x in leaves
    ]
    return "(" + ", ".join(words) + ")"


def example(spec: Any) -> Any:
    """A tensor to capture with, for a `jax.ShapeDtypeStruct` or a JAX array; anything else as it is."""
    if isinstance(spec, torch.Tensor) or not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
        return spec
    return torch.zeros(tuple(spec.shape), dtype=to_torch(spec.dtype))
