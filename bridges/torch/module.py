"""An optimized `torch.nn.Module`: the user's own model, run by a compiled program."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.capture import capture
from kpx.bridges.torch.dtypes import to_torch
from kpx.bridges.torch.exported import TENSOR, ExportedFunction, Signature, takes
from kpx.bridges.torch.fingerprint import fingerprint
from kpx.bridges.torch.invoke import Invocation
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.bridges.torch.tensors import LiveWeights, dense_order, plain
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
        """Whether the weights are as they were, or could be read again."""
        return not self.weights.changed() or self.load()

    def __call__(self, leaves: list[Any]) -> Any:
        tensors = self.invocation([leaves[i] for i in self.tensor_positions])
        if self.is_one_tensor:
            return tensors[0]
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if p is TENSOR else p for p in self.outputs], self.spec)


class OptimizedModule(torch.nn.Module):
    """A model whose forward pass runs as a compiled program; everything else is the model's own.

    Parameters, buffers, submodules and hooks of `state_dict` are the model's, under the same names: what
    is loaded or updated through either is seen by both. A new signature (shapes, dtypes, constants,
    training mode) is compiled at its first call. The outputs carry no gradient.
    """

    def __init__(self, model: torch.nn.Module, target: Target, config: Config, dynamic_shapes: Any = None):
        super().__init__()
        shared = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks",
                  "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")  # fmt: skip
        for name in shared:
            if name in model.__dict__:
                self.__dict__[name] = model.__dict__[name]
        self.__dict__["_model"] = model
        self.__dict__["_target"] = target
        self.__dict__["_config"] = config
        self.__dict__["_entries"] = {}
        self.__dict__["_dynamic_shapes"] = dynamic_shapes
        self.__dict__["_captured"] = []
        self.__dict__["_freed"] = False
        self.__dict__["_shapes"] = ShapeHistory(type(model).__name__)
        self.__dict__["_lock"] = threading.Lock()
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_model" not in self.__dict__:  # while it is being copied
                raise
            return getattr(self.__dict__["_model"], name)

    def __reduce__(self):
        return OptimizedModule, (self._model, self._target, self._config, self._dynamic_shapes)

    def train(self, mode: bool = True) -> OptimizedModule:
        self._model.train(mode)
        self.training = mode
        return self

    def __repr__(self):
        return f"kpx.optimize({self._model!r})"

    def forward(self, *args, **kwargs):
        """The model's outputs, in the model's own structure.

        Raises:
            InputError: an argument is not a tensor on this target's device, or a constant.
            CaptureError: a new signature, and the model could not be captured for it.
            UnsupportedError: a new signature, and the model uses ops that have no lowering rule.
        """
        leaves, key = _flatten(args, kwargs)
        return self._entry(args, kwargs, (key, self.training))(leaves)

    def free_originals(self) -> int:
        """Gives up the model's own copies of weights that were prepared at load; gives the bytes freed.

        Programs compiled so far go on with the weights they have, and no longer look for changes. The model
        itself can then neither run nor be saved, and no new signature be compiled.

        Raises:
            InputError: nothing has been compiled yet, so that everything would be lost.
        """
        if not self._entries:
            raise InputError("Nothing is compiled yet. Call the model once, or pass `example_inputs`, and then free.")
        read_in_place: set[int] = set()
        for entry in self._entries.values():
            entry.weights.freeze()
            read_in_place |= {a.unsafe_buffer_pointer() for a in entry.program.held}
        self.__dict__["_freed"] = True
        freed = 0
        for tensor in {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}.values():
            if tensor.numel() and tensor.data_ptr() not in read_in_place:
                freed += tensor.numel() * tensor.element_size()
                tensor.data = tensor.data.new_empty(0)
        give_back_freed()
        return freed

    def compile_for(self, args: Sequence, kwargs: Mapping[str, Any]) -> Compiled:
        """Compiles a signature now. Calling the result with another one is an `InputError`."""
        leaves, key = _flatten(tuple(args), dict(kwargs))
        entry = self._entry(args, kwargs, (key, self.training))

        def call(*given_args, **given_kwargs):
            given, given_key = _flatten(given_args, given_kwargs)
            if given_key != key:
                raise InputError(
                    f"This was compiled for {_described(leaves)}, and was called with {_described(given)}. "
                    "Call it with the same shapes and dtypes, or use `kpx.optimize(model)`, which compiles anew."
                )
            if not entry.is_current():
                raise InputError(
                    "The weights' shapes or dtypes have changed since this was compiled. Compile it again."
                )
            return entry(given)

        compiled = entry.program.compiled
        compiled._call = call
        return compiled

    def generate(self, *args, **kwargs):
        """Hugging Face's `generate()` over a static KV cache: prompt and decoding steps are compiled programs.

        With `cache_precision="int8"` keys and values are kept in int8, each token's and head's by a scale of its own.

        Raises:
            InputError: the model has no `generate`, or another kind of cache was asked for.
        """
        if not hasattr(self._model, "generate"):
            raise InputError(f"`{type(self._model).__name__}` has no `generate`. Call the model itself.")
        from kpx.bridges.torch import dynamo, generation

        if "_generation" not in self.__dict__:
            backend = functools.partial(dynamo.compile_with, target=self._target, config=dynamo.training(self._config))
            self.__dict__["_generation"] = generation.compile_config(backend)
            remedy = "Pad prompts to a few lengths, on the left: `tokenizer(..., pad_to_multiple_of=32)`."
            self.__dict__["_prompts"] = ShapeHistory(f"{type(self._model).__name__}.generate", remedy)
        return generation.generate(self._model, self._generation, self._prompts, *args, **kwargs)

    def _capture(
        self, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> torch.export.ExportedProgram:
        """The model's graph for these inputs: with `dynamic_shapes`, one for all sizes that it allows."""
        if self._dynamic_shapes is None:
            return capture(self._model, args, kwargs)
        structure = repr(pytree.tree_flatten((args, kwargs))[1]), self.training
        for known, program in self._captured:
            if known == structure and takes(program, tensors):
                return program
        program = capture(self._model, args, kwargs, self._dynamic_shapes)
        self._captured.append((structure, program))
        return program

    def _compile(self, args: Sequence, kwargs: Mapping[str, Any], key: Any) -> _Entry:
        clean_args, clean_kwargs = pytree.tree_map_only(torch.Tensor, plain, (tuple(args), dict(kwargs)))
        leaves, _ = pytree.tree_flatten((clean_args, clean_kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = [leaves[i] for i in positions]
        word = self._fingerprint(key, tensors)
        if word is not None and (found := self._restored(word, tensors, positions)) is not None:
            return found
        program = self._capture(clean_args, clean_kwargs, tensors)
        function, spec, constants = ExportedFunction(program), program.call_spec.out_spec, dict(program.constants)
        entry = self._made(function, tensors, positions, spec, constants, None)
        if word is not None:
            kept = {"signature": Signature.of(function), "spec": spec, "constants": constants}
            programs.save(self._config.cache_dir, word, {**kept, "program": entry.invocation.saved()})
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
        if config.cache_dir is None or self._dynamic_shapes is not None or not target.is_present:
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
        kept = programs.load(self._config.cache_dir, word)
        if kept is None:
            return None
        try:
            parts = kept["signature"], tensors, positions, kept["spec"], kept["constants"], kept["program"]
            return self._made(*parts)
        except (KeyError, TypeError, AttributeError, ValueError, KpxError) as error:
            told = f"A program in `{self._config.cache_dir}` was not used: {type(error).__name__}: {error}."
            warnings.warn(f"{told} The model is compiled anew.", KernelCacheWarning, stacklevel=2)
            return None

    def _entry(self, args: Sequence, kwargs: Mapping[str, Any], key: Any) -> _Entry:
        entry = self._entries.get(key)
        if entry is not None and entry.is_current():
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.is_current():  # another thread compiled it meanwhile
                return entry
            if self._freed:
                raise InputError(
                    "This signature is not compiled, and the weights to compile it with were freed by "
                    "`free_originals()`. Compile every signature first, or optimize a new copy of the model."
                )
            leaves = pytree.tree_leaves((args, kwargs))
            self._shapes.note([leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)])
            entry = self._compile(args, kwargs, key)
            self._entries[key] = entry
            give_back_freed()
            return entry


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
            f"A tensor that requires grad was given ({_described([tensor])}), and the optimized model computes no "
            "gradients. Use `kpx.optimize(model, training=True)`, pass `x.detach()`, or call it under `torch.no_grad()`."
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
