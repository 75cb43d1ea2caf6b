"""`torch.compile(model, backend="kpx")`: graphs that Dynamo captures, forward and backward, compiled by kpx.

AOTAutograd differentiates a graph in PyTorch's own words and hands over two functional ATen graphs; both go through
the same lowering rules and rewrites as an exported model.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from kpx.bridges.torch import internals, joint
from kpx.bridges.torch.capture import kept_whole
from kpx.bridges.torch.decompose import OWN
from kpx.bridges.torch.graphs import CompiledGraph, Settings, boxed, written_inputs
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.outputs import tangent_layouts
from kpx.bridges.torch.registry import RULES
from kpx.bridges.torch.writes import correct_writes, refusal
from kpx.config import Config, resolve
from kpx.errors import GraphBreakWarning, InputError, UnsupportedError
from kpx.hardware.target import Target
from kpx.jax_internals import compute_in_callers_thread


@functools.cache
def decompositions() -> dict:
    """PyTorch's decompositions, less the ops that have a rule."""
    table = {**decomposition_table, **core_aten_decompositions(), **OWN}
    # Constants are lifted before they are fake: decomposed, those ops would meet real tensors.
    kept = {*RULES, aten.lift.default, aten.lift_fresh.default}
    return {op: f for op, f in table.items() if op not in kept}


def compilers(settings: Settings, compiled: list[CompiledGraph] | None = None) -> dict[str, Any]:
    """Return AOTAutograd's options: compilers of the graphs, how to partition them, what to decompose.

    Args:
        compiled: a list to which compiled inference graphs are appended.
    """

    def compiler(kind: str) -> Callable:
        def compile_graph(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
            result = CompiledGraph(graph, settings, kind)
            if compiled is not None and kind == "inference":
                compiled.append(result)
            return boxed(result)

        return compile_graph

    return {
        "fw_compiler": compiler("forward"),
        "bw_compiler": compiler("backward"),
        "inference_compiler": compiler("inference"),
        "partition_fn": joint.partition,
        "decompositions": decompositions(),
    }


def settings(config: Config | None, **options) -> Settings:
    """Return the settings of graphs for this machine's CPU."""
    config = resolve(config)
    return Settings(_target(), config, dataclasses.replace(config, prepare=False), **options)


def differentiable(function: Callable, config: Config | None = None) -> Callable:
    """A function of tensors whose forward and backward passes are compiled by kpx, at its first call's shapes.

    Without Dynamo: the function's Python runs once, and must not depend on the tensors' values.
    """
    compiled = aot_function(function, **compilers(settings(config)))

    def call(*tensors):
        # Constants that the function makes are tensors like others.
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with tracing(TracingContext(mode)), tangent_layouts(None):
            return compiled(*tensors)

    return call


def _target() -> Target:
    compute_in_callers_thread()
    return Target.resolve("cpu")


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
    return compile_with(graph, example_inputs, settings((options or {}).get("config")))


def compile_with(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable:
    """Compile a graph of Dynamo's to a callable, differentiable where its inputs are.

    Where a tensor is not on the CPU, PyTorch itself runs the graph, with a warning.

    Where a write cannot be made functional, too.

    Raises:
        UnsupportedError: one of these, and `settings.fullgraph` is set.
    """
    for tensor in example_inputs:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            message = f"{settings.label} has a tensor on {tensor.device}, and kpx compiles for the CPU here."
            if settings.fullgraph:
                raise UnsupportedError(f"{message} Move the model and its inputs: `.cpu()`.")
            warnings.warn(f"{message} Eager PyTorch runs this part.", GraphBreakWarning, stacklevel=2)
            return graph
    settings.captures += 1
    settings.writes_state = settings.writes_state or internals.writes_python_state()
    direct: Callable | None = None
    try:
        correct_writes(graph)
        inference: list[CompiledGraph] = []
        with tangent_layouts(graph), internals.without_python_kernels(kept_whole()), internals.without_tensorify(graph):
            compiled = aot_autograd(**compilers(settings, inference))(graph, example_inputs)
            direct = _direct(inference, len(example_inputs))
    except (RuntimeError, UnsupportedError) as error:
        refused = error if isinstance(error, UnsupportedError) else refusal(error)
        if refused is None or (settings.fullgraph and refused is error):
            raise
        if settings.fullgraph:
            raise refused from error
        warnings.warn(f"{settings.label}: {refused}\nEager PyTorch runs this part.", GraphBreakWarning, stacklevel=2)
        return graph
    if direct is not None:
        return direct
    return _on_aliases(compiled, graph, written_inputs(), example_inputs)


def _direct(graphs: list[CompiledGraph], inputs: int) -> Callable | None:
    """Return a callable of the inputs' values around AOTAutograd's wrapper, where that has nothing to do; else None."""
    context = TracingContext.try_get()
    if len(graphs) != 1 or context is None:
        return None
    (graph,) = graphs
    if not internals.is_called_as_it_is(context.fw_metadata, inputs, graph.inputs):
        return None

    def call(*args):
        return graph(list(args))

    return call


def _on_aliases(compiled: Callable, graph: Callable, written: Sequence[int], example_inputs: Sequence[Any]) -> Callable:
    """Return a callable that leaves calls to PyTorch itself whose written inputs share memory in another way than captured.

    AOTAutograd makes a graph functional for the aliases among the inputs that it was compiled with, and Dynamo guards
    identity alone (pytorch/pytorch#139789).
    """
    if not written:
        return compiled
    strided = [i for i, a in enumerate(example_inputs) if isinstance(a, torch.Tensor) and a.layout is torch.strided]
    captured = _overlaps([example_inputs[i] for i in strided])

    def call(*args):
        return compiled(*args) if _overlaps([args[i] for i in strided]) == captured else graph(*args)

    return call


def _overlaps(tensors: list[torch.Tensor]) -> list[tuple[int, int, int]]:
    """Return the pairs of tensors that overlap in memory, by position, and the distance between their first elements."""
    starts = list(map(torch.Tensor.data_ptr, tensors))
    ends = list(map(operator.add, starts, map(_nbytes, tensors)))
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        ends = [start + _extent(t) for start, t in zip(starts, tensors, strict=True)]
    order = sorted(range(len(tensors)), key=starts.__getitem__)
    pairs = []
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            if starts[j] >= ends[i]:
                break
            pairs.append((i, j, starts[j] - starts[i]))
    return pairs


_nbytes = operator.attrgetter("nbytes")


def _extent(tensor: torch.Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
