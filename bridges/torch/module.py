"""An optimized `torch.nn.Module`: the user's own model, whose calls run compiled programs."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kpx.bridges.torch.ahead import compile_for
from kpx.bridges.torch.engine import Engine
from kpx.bridges.torch.graphs import Settings
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.errors import InputError
from kpx.runtime.compiled import Compiled
from kpx.runtime.memory import give_back_freed


class OptimizedModule:
    """A model whose calls are captured by Dynamo and compiled by kpx; everything else is the model's own.

    An optimized module is an instance of a subclass of the model's class that shares the model's `__dict__`: attributes,
    parameters, buffers, submodules, hooks and modes are the same objects through either, and a method that calls
    `self(...)` runs compiled. What the model's Python reads is guarded, so that a later change is seen. Where grad mode is
    on and an input or a parameter requires grad, the outputs carry gradients and the backward pass is compiled.
    """

    _kpx_engine: Engine
    _kpx_forward: Engine
    _kpx_hooks: Any = None  # a module around the engine, once the optimized module has hooks of its own

    def __call__(self, *args, **kwargs):
        """Return the model's outputs, in the model's own structure.

        Raises:
            CaptureError: with `fullgraph=True`, the model cannot be captured whole.
            UnsupportedError: with `fullgraph=True`, an operator has no lowering rule.
        """
        engine = type(self)._kpx_engine
        if self.__dict__ is not engine.model.__dict__:  # made by the class itself: a slice, say
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        hooks = type(self)._kpx_hooks
        return engine(*args, **kwargs) if hooks is None else hooks(*args, **kwargs)

    def register_forward_hook(self, hook: Callable, **options) -> Any:
        """Register a hook on calls of the optimized module; calls of the model itself do not run it."""
        return _hooked(self).register_forward_hook(_of(self, hook), **options)

    def register_forward_pre_hook(self, hook: Callable, **options) -> Any:
        """Register a hook before calls of the optimized module; calls of the model itself do not run it."""
        return _hooked(self).register_forward_pre_hook(_of(self, hook), **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        engine = type(self)._kpx_engine
        if self.__dict__ is not engine.model.__dict__:
            return super().__reduce_ex__(protocol)
        return _again, (type(self)._kpx_wrap, engine.model, _options(engine))  # type: ignore[attr-defined]

    def __copy__(self) -> Any:
        engine = type(self)._kpx_engine
        return _again(type(self)._kpx_wrap, copy.copy(engine.model), _options(engine))  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict) -> Any:
        engine = type(self)._kpx_engine
        model = copy.deepcopy(engine.model, memo)
        return _again(type(self)._kpx_wrap, model, _options(engine))  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"kpx.optimize({type(self)._kpx_engine.model!r})"

    def compile_for(self, args: Sequence, kwargs: Mapping[str, Any]) -> Compiled:
        """Compile the model for inputs ahead of any call, as `kpx.compile` does, and return what is known of it."""
        settings = type(self)._kpx_engine.settings
        return compile_for(type(self)._kpx_engine.model, args, kwargs, settings.target, settings.config)

    def compiled_programs(self) -> list[Compiled]:
        """Return what is known of each program that calls have compiled so far."""
        return type(self)._kpx_engine.settings.programs()

    @property
    def _entries(self) -> dict[int, Any]:
        """The programs that calls have compiled so far: `program` of each is the runtime's."""
        graphs = list(type(self)._kpx_engine.settings.graphs)
        return dict(enumerate(program for graph in graphs for program in graph.programs()))

    def free_programs(self) -> None:
        """Drop every captured graph and compiled program. Later calls capture and compile anew."""
        type(self)._kpx_engine.reset()
        type(self)._kpx_forward.reset()

    def free_originals(self) -> int:
        """Free the model's own copies of weights that were prepared at load; return the bytes freed.

        Programs compiled so far go on with the weights they have, and no longer look for changes. The model itself can
        then neither run nor be saved, and no new signature be compiled.

        Raises:
            InputError: nothing has been compiled yet, so that everything would be lost.
        """
        engine = type(self)._kpx_engine
        if not engine.settings.programs():
            raise InputError("Nothing is compiled yet. Call the model once, or pass `example_inputs`, and then free.")
        in_place = engine.settings.freeze()
        tensors = {id(t): t for t in (*engine.model.parameters(), *engine.model.buffers())}.values()
        kept = {t.untyped_storage()._cdata for t in tensors if t.numel() and t.data_ptr() in in_place}
        freed = sum(_freed(t) for t in tensors if t.untyped_storage()._cdata not in kept)
        give_back_freed()
        return freed


def _freed(tensor: torch.Tensor) -> int:
    """Free a tensor's memory, and return its bytes; shape and strides stay, so that Dynamo's guards hold."""
    size = tensor.untyped_storage().size()
    if size:
        empty = torch.UntypedStorage(
            size
        )  # of its own, since what NumPy has seen cannot be resized; no page is touched
        with torch.no_grad():
            tensor.set_(empty, tensor.storage_offset(), tensor.shape, tensor.stride())
        empty.resize_(0)
    return size


class _Hooked(torch.nn.Module):
    """An engine's calls, with the hooks that were registered on an optimized module."""

    def __init__(self, engine: Engine):
        super().__init__()
        self.forward = engine


def _hooked(optimized: OptimizedModule) -> torch.nn.Module:
    cls = type(optimized)
    if cls._kpx_hooks is None:
        cls._kpx_hooks = _Hooked(cls._kpx_engine)
    return cls._kpx_hooks


def _of(optimized: OptimizedModule, hook: Callable) -> Callable:
    """Return a hook that is called with the optimized module in place of the one that holds its hooks."""
    return functools.wraps(hook)(lambda _, *args: hook(optimized, *args))


def wrap(model: torch.nn.Module, settings: Settings, *, inplace: bool = False, dynamic: bool | None = None) -> Any:
    """Return a module that shares a model's state and whose calls are compiled; with `inplace`, the model itself.

    Raises:
        InputError: the model's class cannot be subclassed (TorchScript).
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"`{type(model).__name__}` is a TorchScript module, whose Python cannot be captured. Optimize the "
            "`torch.nn.Module` that it was scripted or traced from."
        )
    if inplace:
        model._compiled_call_impl = Engine(model, settings, "call_impl", dynamic)  # type: ignore[assignment]
        return model
    return subclass_instance(model, settings, OptimizedModule, wrap, dynamic)


def subclass_instance(
    model: torch.nn.Module, settings: Settings, mixin: type, again: Callable, dynamic: bool | None = None, **attributes
) -> Any:
    """Return an instance of a new subclass of a mixin and a model's class that shares the model's `__dict__`.

    Args:
        again: `(model, settings, **options)` that wraps a copy of the model in the same way.
        attributes: of the new class.
    """
    base = type(model)
    engine, forward = Engine(model, settings, "call", dynamic), Engine(model, settings, "forward", dynamic)

    @functools.wraps(base.forward)
    def compiled_forward(self, *args, **kwargs):
        if self.__dict__ is model.__dict__:
            return forward(*args, **kwargs)
        return base.forward(self, *args, **kwargs)

    namespace = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
        "_kpx_engine": engine, "_kpx_forward": forward, "_kpx_wrap": staticmethod(again), "forward": compiled_forward,
        **attributes,
    }  # fmt: skip
    if hasattr(base, "generate"):
        namespace["generate"] = _generate
    cls = types.new_class(base.__name__, (mixin, base), exec_body=lambda ns: ns.update(namespace))
    wrapper = object.__new__(cls)
    object.__setattr__(wrapper, "__dict__", model.__dict__)
    return wrapper


def _options(engine: Engine) -> dict[str, Any]:
    settings = engine.settings
    options = {"target": settings.target, "config": settings.config, "fullgraph": settings.fullgraph}
    return {**options, "dynamic": engine._dynamic}


def _again(wrap_again: Callable, model: torch.nn.Module, options: dict[str, Any]) -> Any:
    options = dict(options)
    dynamic = options.pop("dynamic")
    return wrap_again(model, settings_for(model, **options), dynamic=dynamic)


def settings_for(model: torch.nn.Module, target: Any, config: Any, fullgraph: bool = False) -> Settings:
    """Return the settings of a model's graphs."""
    import dataclasses

    label = f"`{type(model).__name__}`"
    history = ShapeHistory(type(model).__name__)
    training = dataclasses.replace(config, prepare=False)
    return Settings(target, config, training, fullgraph, label, history=history)


def _generate(self, *args, **kwargs):
    """Generate as Hugging Face's `generate()` does, over a static KV cache: prompt and decoding steps are compiled programs.

    With `cache_precision="int8"` keys and values are kept in int8, each token's and head's by a scale of its own.

    Raises:
        InputError: another kind of cache was asked for.
    """
    from kpx.bridges.torch import dynamo, generation

    engine = type(self)._kpx_engine
    cls = type(self)
    if "_kpx_generation" not in cls.__dict__:
        settings = settings_for(engine.model, engine.settings.target, engine.settings.config)
        cls._kpx_generation = generation.compile_config(functools.partial(dynamo.compile_with, settings=settings))
        remedy = "Pad prompts to a few lengths, on the left: `tokenizer(..., pad_to_multiple_of=32)`."
        cls._kpx_prompts = ShapeHistory(f"{cls.__name__}.generate", remedy)
    return generation.generate(engine.model, cls._kpx_generation, cls._kpx_prompts, *args, **kwargs)
