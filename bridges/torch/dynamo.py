"""`torch.compile(model, backend="kpx")`: graphs that Dynamo captures, forward and backward, compiled by kpx.

AOTAutograd differentiates a graph in PyTorch's own words and hands over two functional ATen graphs; both go through
the same lowering rules and rewrites as an exported model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from kpx.bridges.torch import joint
from kpx.bridges.torch.exported import TENSOR
from kpx.bridges.torch.interpret import as_jax_function, is_random
from kpx.bridges.torch.invoke import TensorProgram
from kpx.bridges.torch.outputs import Outputs
from kpx.bridges.torch.registry import RULES
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.bridges.torch.tensors import to_tensor
from kpx.config import Config, resolve
from kpx.errors import InputError, UnsupportedError
from kpx.hardware.target import Target
from kpx.jax_internals import compute_in_callers_thread
from kpx.runtime.memory import keep_freed


class _Program:
    """A graph compiled for the sizes of its inputs."""

    def __init__(
        self,
        function: Callable,
        needs_key: bool,
        args: Sequence[Any],
        gradients: frozenset[int],
        target: Target,
        config: Config,
    ):
        """Compiles it.

        Args:
            gradients: places of the arguments that are gradients of a result.
        """
        self._tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        self._outputs: list[Any] = []
        constants = [None if isinstance(a, torch.Tensor) else a for a in args]

        def arrays_only(weights, arrays, key):
            values = list(constants)
            for i, array in zip(self._tensors, arrays, strict=True):
                values[i] = array
            results = function(values, key)
            is_array = [isinstance(r, (jax.Array, np.ndarray)) for r in results]
            self._outputs = [TENSOR if a else r for a, r in zip(is_array, results, strict=True)]
            return [r for a, r in zip(is_array, results, strict=True) if a]

        inputs = [args[i] for i in self._tensors]
        given = {p for p, i in enumerate(self._tensors) if i in gradients}
        self._call = TensorProgram(arrays_only, [], inputs, needs_key, target, config, gradients=given)
        self._call.model.load([])  # what depends on nothing is computed once

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        left = iter(self._call([args[i].detach() for i in self._tensors]))
        return [to_tensor(next(left)) if p is TENSOR else p for p in self._outputs]


def compile_graph(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    target: Target,
    config: Config,
    backward: bool = False,
) -> Callable[[list[Any]], list[Any]]:
    """A functional ATen graph as a function of tensors and sizes; each new set of sizes is compiled once.

    Raises:
        UnsupportedError: an op has no rule.
    """
    if backward:
        keep_freed()
    outputs = Outputs(graph, backward)
    function = as_jax_function(outputs.graph)
    needs_key = is_random(outputs.graph)
    places = enumerate(n.name for n in outputs.graph.find_nodes(op="placeholder"))
    # AOTAutograd's own name for what the backward pass is given beside saved values.
    gradients = frozenset(i for i, name in places if name.startswith("tangents_")) if backward else frozenset()
    programs: dict[Any, _Program] = {}
    # A graph without symbolic sizes is only ever called with those it was captured for: Dynamo guards them.
    fixed = not any(isinstance(a, (torch.SymInt, torch.SymFloat)) for a in example_inputs)
    history = ShapeHistory("the graph of torch.compile")

    def run(args: list[Any]) -> list[Any]:
        key = None if fixed else tuple(a.shape if isinstance(a, torch.Tensor) else a for a in args)
        if (program := programs.get(key)) is None:
            if not fixed:
                history.note([tuple(a.shape) for a in args if isinstance(a, torch.Tensor)])
            program = programs[key] = _Program(function, needs_key, args, gradients, target, config)
        results = outputs.take(args, program(args))
        args.clear()  # the caller gives its inputs up, so that they need not outlive their use
        return results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


@functools.cache
def decompositions() -> dict:
    """PyTorch's decompositions, less the ops that have a rule."""
    table = {**decomposition_table, **core_aten_decompositions()}
    # Constants are lifted before they are fake: decomposed, those ops would meet real tensors.
    kept = {*RULES, torch.ops.aten.lift.default, torch.ops.aten.lift_fresh.default}
    return {op: f for op, f in table.items() if op not in kept}


def compilers(target: Target, config: Config) -> dict[str, Any]:
    """What AOTAutograd is told: compilers of the two graphs, how to cut them, what to decompose."""
    compiler = functools.partial(compile_graph, target=target, config=config)
    return {
        "fw_compiler": compiler,
        "bw_compiler": functools.partial(compiler, backward=True),
        "inference_compiler": compiler,
        "partition_fn": joint.partition,
        "decompositions": decompositions(),
    }


def differentiable(function: Callable, config: Config | None = None) -> Callable:
    """A function of tensors whose forward and backward passes are compiled by kpx, at its first call's shapes.

    Without Dynamo: the function's Python runs once, and must not depend on the tensors' values.
    """
    compiled = aot_function(function, **compilers(_target(), training(config)))

    def call(*tensors):
        # Constants that the function makes are tensors like others.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with tracing(TracingContext(mode)):
            return compiled(*tensors)

    return call


def _target() -> Target:
    compute_in_callers_thread()
    return Target.resolve("cpu")


def training(config: Config | None) -> Config:
    """Weights are inputs like others, and nothing is prepared: they change at every step."""
    return dataclasses.replace(resolve(config), prepare=False)


def backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: dict | None = None, **rest: Any):
    """The backend that `torch.compile(model, backend="kpx")` finds by entry point.

    Args:
        options: `{"config": kpx.Config(...)}`, as `torch.compile(..., options=...)` passes it.

    Raises:
        InputError: an option is unknown.
        UnsupportedError: an op of the graph has no lowering rule, or a tensor is not on the CPU.
    """
    unknown = sorted({*(options or {}), *rest} - {"config", "mode"})
    if unknown:
        raise InputError(
            f"backend='kpx' was given {', '.join(map(repr, unknown))}. It takes `options={{'config': ...}}`."
        )
    return compile_with(graph, example_inputs, target=_target(), config=training((options or {}).get("config")))


def compile_with(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], *, target: Target, config: Config):
    """A graph of Dynamo's as a callable, differentiable where its inputs are."""
    for tensor in example_inputs:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            raise UnsupportedError(
                f"A tensor on {tensor.device} was given, and kpx compiles for the CPU here. Move the model: "
                "`model.cpu()`."
            )
    return aot_autograd(**compilers(target, config))(graph, example_inputs)
