"""PyTorch models, through torch.export, Dynamo and lowering rules over JAX."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch.ahead import compile_for, example
from kpx.bridges.torch.engine import unchanged
from kpx.bridges.torch.graphs import Settings
from kpx.bridges.torch.module import OptimizedModule, settings_for, wrap
from kpx.bridges.torch.padding import BucketedModule, wrap_in_buckets
from kpx.bridges.torch.pure import functional
from kpx.bridges.torch.registry import lowers
from kpx.bridges.torch.validation import TorchReference
from kpx.buckets import Buckets
from kpx.config import Config
from kpx.errors import InputError
from kpx.hardware.target import Target
from kpx.jax_internals import compute_in_callers_thread
from kpx.runtime.compiled import Compiled

__all__ = [
    "BucketedModule", "OptimizedModule", "accepts", "compile", "functional", "load", "lowers", "optimize",
    "reference", "resolve_target", "weights_and_function",
]  # fmt: skip


def accepts(model: Any) -> bool:
    """Return whether this bridge takes a model."""
    return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def resolve_target(given: str | Target | None, *, may_be_absent: bool = False) -> Target:
    """The target of a name; the CPU, where PyTorch's tensors are, for None.

    Whoever called waits for a tensor's values anyway, so JAX's CPU client, where this process has none yet, is
    made to compute in the caller's thread: handing over to another takes tens of microseconds a call.
    """
    compute_in_callers_thread()
    return Target.resolve("cpu" if given is None else given, may_be_absent=may_be_absent)


def reference(model: torch.nn.Module, inputs: Sequence[Any]) -> TorchReference:
    """A model and its inputs, for `kpx.validate`."""
    return TorchReference(model, inputs)


def weights_and_function(model: torch.nn.Module) -> tuple[Any, Callable]:
    """A model's weights as JAX arrays, and it as a function of them and of its inputs, to a list of arrays."""
    compute_in_callers_thread()
    params, buffers, function = functional(model)

    def call(weights, *args, **kwargs):
        return [leaf for leaf in pytree.tree_leaves(function(*weights, *args, **kwargs)[0]) if hasattr(leaf, "shape")]

    return (params, buffers), call


def load(path: str | os.PathLike) -> torch.nn.Module:
    """The model of a saved ExportedProgram (`.pt2`), for `kpx.optimize`.

    Raises:
        InputError: there is no such file, or it is not an ExportedProgram.
    """
    try:
        return torch.export.load(os.fspath(path)).module()
    except Exception as error:  # torch.export.load raises what its unpickling, zip and schema checks raise
        raise InputError(
            f"`{path}` cannot be read as an ExportedProgram: {error}\nSave one with `torch.export.save(program, path)`."
        ) from None


def optimize(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence | None,
    example_kwargs: Mapping[str, Any] | None,
    target: Target,
    config: Config,
    *,
    training: bool | None = None,
    dynamic_shapes: Any = None,
    fullgraph: bool = False,
    inplace: bool = False,
) -> Any:
    """See `kpx.optimize`."""
    if target.platform != "cpu":
        raise InputError(
            f"PyTorch tensors live on the CPU or CUDA, and passing them to {target.platform} is not supported "
            "yet. Use `target='cpu'`."
        )
    if training is not None:
        warnings.warn(
            "`training=` has no effect any more and will be removed: outputs carry gradients where grad mode is on. Leave "
            "it out, and call the model under `torch.no_grad()` for inference.",
            DeprecationWarning,
            stacklevel=4,
        )
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    optimized = _optimized(model, settings_for(model, target, config, fullgraph), dynamic_shapes, inplace)
    if example_inputs is not None or example_kwargs is not None:
        _first_call(model, optimized, *_examples(example_inputs, example_kwargs))
    return optimized


def _optimized(model: torch.nn.Module, settings: Settings, shapes: Any, inplace: bool) -> Any:
    if isinstance(shapes, Buckets):
        if inplace:
            raise InputError("`inplace=True` does not take buckets. Leave one of them out.")
        return wrap_in_buckets(model, settings, shapes)
    if isinstance(model, OptimizedModule) and shapes is None and not inplace:
        return model
    return wrap(model, settings, inplace=inplace, dynamic=None if shapes is None else True)


def _first_call(model: torch.nn.Module, optimized: Any, args: list, kwargs: dict) -> None:
    """Compile for inputs by a call whose effects on buffers, gradients and random state are undone."""
    gradients = torch.is_grad_enabled() and model.training
    with torch.set_grad_enabled(gradients), unchanged(model):
        optimized(*args, **kwargs)


def compile(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence,
    kwargs: Mapping[str, Any],
    target: Target,
    config: Config,
) -> Compiled:
    """See `kpx.compile`."""
    if target.is_present and target.platform != "cpu":
        raise InputError(
            f"PyTorch tensors live on the CPU or CUDA, and passing them to {target.platform} is not supported "
            "yet. Use `target='cpu'`."
        )
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    if isinstance(module, OptimizedModule):
        module = type(module)._kpx_engine.model
    return compile_for(module, [example(a) for a in args], {k: example(v) for k, v in kwargs.items()}, target, config)


def _examples(inputs: Any, kwargs: Any) -> tuple[list, dict]:
    if isinstance(inputs, Mapping):
        raise InputError("`example_inputs` is a mapping. Pass named inputs as `example_kwargs={...}`.")
    if inputs is not None and not isinstance(inputs, (list, tuple)):
        inputs = (inputs,)
    return [example(a) for a in inputs or ()], {k: example(v) for k, v in (kwargs or {}).items()}
