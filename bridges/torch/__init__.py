"""PyTorch models, through torch.export and lowering rules over JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpx.bridges.torch.module import OptimizedModule, example
from kpx.bridges.torch.registry import lowers
from kpx.config import Config
from kpx.errors import InputError
from kpx.runtime.compiled import Compiled
from kpx.runtime.jax_internals import compute_in_callers_thread
from kpx.targets.target import Target

__all__ = ["OptimizedModule", "accepts", "compile", "lowers", "optimize", "resolve_target"]


def accepts(model: Any) -> bool:
    """Whether this bridge takes a model."""
    return isinstance(model, torch.nn.Module)


def resolve_target(given: str | Target | None) -> Target:
    """The target of a name; the CPU, where PyTorch's tensors are, for None.

    Whoever called waits for a tensor's values anyway, so JAX's CPU client, where this process has none yet, is
    made to compute in the caller's thread: handing over to another takes tens of microseconds a call.
    """
    compute_in_callers_thread()
    return Target.resolve("cpu" if given is None else given)


def optimize(
    model: torch.nn.Module,
    example_inputs: Sequence | None,
    example_kwargs: Mapping[str, Any] | None,
    target: Target,
    config: Config,
) -> OptimizedModule:
    """See `kpx.optimize`."""
    if target.platform != "cpu":
        raise InputError(
            f"PyTorch tensors live on the CPU or CUDA, and passing them to {target.platform} is not supported "
            "yet. Use `target='cpu'`."
        )
    optimized = model if isinstance(model, OptimizedModule) else OptimizedModule(model, target, config)
    if example_inputs is not None or example_kwargs is not None:
        args, kwargs = _examples(example_inputs, example_kwargs)
        optimized.compile_for(args, kwargs)
    return optimized


def compile(
    model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any], target: Target, config: Config
) -> Compiled:
    """See `kpx.compile`."""
    optimized = optimize(model, None, None, target, config)
    return optimized.compile_for([example(a) for a in args], {k: example(v) for k, v in kwargs.items()})


def _examples(inputs: Any, kwargs: Any) -> tuple[list, dict]:
    if isinstance(inputs, Mapping):
        raise InputError("`example_inputs` is a mapping. Pass named inputs as `example_kwargs={...}`.")
    if inputs is not None and not isinstance(inputs, (list, tuple)):
        inputs = (inputs,)
    return [example(a) for a in inputs or ()], {k: example(v) for k, v in (kwargs or {}).items()}
