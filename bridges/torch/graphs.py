"""Functional ATen graphs, forward, backward or inference, as functions of tensors and sizes.

AOTAutograd hands over graphs. Each is compiled once for each set of sizes that it is called with. Weights of inference
graphs are prepared once and held. An operator without a lowering rule runs in eager PyTorch between compiled segments.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from torch._guards import TracingContext

from kpx.bridges.torch.exported import TENSOR
from kpx.bridges.torch.fingerprint import graph_fingerprint
from kpx.bridges.torch.interpret import as_jax_function, is_known, is_random, module_path, unsupported_nodes
from kpx.bridges.torch.invoke import TensorProgram
from kpx.bridges.torch.outputs import Outputs
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.bridges.torch.tensors import to_tensor
from kpx.bridges.torch.weights import WeightSets
from kpx.config import Config
from kpx.errors import GraphBreakWarning, UnsupportedError
from kpx.hardware.target import Target
from kpx.runtime import programs
from kpx.runtime.build import ModelProgram, environment
from kpx.runtime.compiled import Compiled
from kpx.runtime.memory import give_back_freed, keep_freed

_MOST_SIZES = 128  # programs that one graph keeps, one for each set of sizes; the least recently used one is dropped


@dataclass
class Settings:
    """How the graphs of one model are compiled.

    Attributes:
        config: for inference; graphs with a backward pass do not prepare weights, which change at every step.
        fullgraph: raise where an operator has no lowering rule, instead of running it in eager PyTorch.
        label: the model, in messages.
        graphs: the compiled graphs that are alive.
        is_frozen: weights are taken as they were when they were read.
        writes_state: a graph writes parameters, buffers or Python state of the model.
        history: notes the shapes of a model's calls; None where each graph notes its own.
        captures: how often Dynamo captured a graph.
        compilations: how often a graph was compiled for sizes.
        runs: how often a graph was called.
    """

    target: Target
    config: Config
    training: Config
    fullgraph: bool = False
    label: str = "the graph of torch.compile"
    graphs: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    history: ShapeHistory | None = None
    captures: int = 0
    compilations: int = 0
    is_frozen: bool = False
    writes_state: bool = False
    runs: int = 0

    def programs(self) -> list[Compiled]:
        """Return what is known of each program that the graphs hold."""
        return [program.compiled for graph in list(self.graphs) for program in graph.programs()]

    def freeze(self) -> set[int]:
        """Take all weights as they are from now on; return the addresses of those that programs read in place."""
        self.is_frozen = True
        held = [program for graph in list(self.graphs) for program in graph.programs()]
        return set().union(*(program.sets.freeze() for program in held))

    def clear(self) -> None:
        """Drop all programs."""
        for graph in list(self.graphs):
            graph.clear()
        give_back_freed()


class _Program:
    """A segment of a graph, compiled for the sizes of its inputs."""

    def __init__(self, segment: Segment, args: Sequence[Any], loose: frozenset[int], settings: Settings):
        """Compile it.

        Args:
            loose: indices of the numbers that stay inputs; other numbers are constants of the program.
        """
        # Tensors made in inference mode count no writes: they are inputs, which are read at each call.
        self._weights = [i for i in segment.weights if isinstance(args[i], torch.Tensor) and not args[i].is_inference()]
        read = set(self._weights)
        self._inputs = [i for i, a in enumerate(args) if (isinstance(a, torch.Tensor) and i not in read) or i in loose]
        self._loose = loose
        self._outputs: list[Any] = []
        constants = [None if isinstance(a, torch.Tensor) or i in loose else a for i, a in enumerate(args)]

        def arrays_only(weights, arrays, key):
            values = list(constants)
            for indices, group in ((self._weights, weights), (self._inputs, arrays)):
                for i, array in zip(indices, group, strict=True):
                    values[i] = _weak(array) if i in loose else array
            results = segment.function(values, key)
            is_array = [isinstance(r, (jax.Array, np.ndarray)) for r in results]
            self._outputs = [TENSOR if a else r for a, r in zip(is_array, results, strict=True)]
            return [r for a, r in zip(is_array, results, strict=True) if a]

        config = settings.config if segment.kind == "inference" else settings.training
        inputs = [_tensor(args[i]) for i in self._inputs]
        cotangents = {p for p, i in enumerate(self._inputs) if i in segment.cotangents}
        weights = [args[i].detach() for i in self._weights]
        key = _cache_key(segment, args, loose, settings.target, config)
        saved = None if key is None else programs.load(str(config.cache_dir), key)
        if saved is not None:
            self._outputs = [TENSOR if kind == "tensor" else value for kind, value in saved["outputs"]]
        self._call = TensorProgram(
            arrays_only, weights, inputs, segment.is_random, settings.target, config,
            saved=None if saved is None else saved["program"], gradients=cotangents,
        )  # fmt: skip
        self._gives_tensors = all(o is TENSOR for o in self._outputs)
        self._unsaved = None if key is None or saved is not None else (str(config.cache_dir), key)
        names = [segment.names[i] for i in self._weights]
        self.sets = WeightSets(self._call.model, names, settings.target.device)

    def _marked(self) -> list[tuple[str, Any]]:
        """Return the outputs as plain data: tensors by a mark, others by value."""
        return [("tensor", None) if o is TENSOR else ("constant", o) for o in self._outputs]

    @property
    def compiled(self) -> Compiled:
        return self._call.model.compiled

    @property
    def program(self) -> ModelProgram:
        """The program as the runtime has it."""
        return self._call.model

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        held = self.sets.held([args[i] for i in self._weights])
        if self._unsaved is not None:  # what was measured as the fastest is saved
            place, self._unsaved = self._unsaved, None
            programs.save(*place, {"outputs": self._marked(), "program": self._call.saved()})
        inputs = [_tensor(args[i]) for i in self._inputs]
        # The program may still be running: `inputs` must live until `to_tensor` has waited for the results.
        results = [to_tensor(r) for r in self._call(inputs, held)]
        del inputs
        if self._gives_tensors:
            return results
        left = iter(results)
        return [next(left) if p is TENSOR else p for p in self._outputs]


def _cache_key(
    segment: Segment, args: Sequence[Any], loose: frozenset[int], target: Target, config: Config
) -> str | None:
    """Return the key that a program is saved under for other processes; None where none is saved."""
    if config.cache_dir is None or os.environ.get("KPX_FUEL"):  # a part of the rewrites makes another program
        return None
    made = environment(target) | {"target": target.text, "features": repr(sorted(target.features))}
    for file in (config.kernel_cache, config.choices):  # what they say, too
        made[f"file {file}"] = str(os.path.exists(file) and os.stat(file).st_mtime_ns) if file else ""
    made |= {"kind": segment.kind, "weights": repr(segment.weights), "loose": repr(sorted(loose))}
    plain = dataclasses.replace(config, cache_dir=None, compile_seconds=1.0)
    values = [torch.empty(0, dtype=torch.int64) if i in loose else a for i, a in enumerate(args)]
    return graph_fingerprint(segment.graph, values, made, plain)


def _tensor(value: Any) -> torch.Tensor:
    """Return a tensor that carries no gradient; a number as a 0-d tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _weak(array: Any) -> Any:
    """Return a 0-d array that promotes as a Python number does."""
    return jax.lax.convert_element_type(array, float if jax.numpy.issubdtype(array.dtype, jax.numpy.floating) else int)


class Segment:
    """A part of a graph whose operators all have lowering rules: one program for each set of sizes.

    Attributes:
        graph: the part itself.
        names: what the inputs are called, in messages.
        weights: indices of the inputs that are parameters or buffers which nothing writes.
        cotangents: indices of the inputs that are gradients of a result.
    """

    def __init__(self, graph: torch.fx.Graph, kind: str, settings: Settings, roles: Roles):
        self._settings, self.kind, self.graph = settings, kind, graph
        placeholders = graph.find_nodes(op="placeholder")
        self.names = [node.name for node in placeholders]
        values = [node.meta.get("val") for node in placeholders]
        self.weights = roles.weights if kind == "inference" and settings.config.prepare else []
        self.cotangents = roles.cotangents
        self.function = as_jax_function(graph)
        self.is_random = is_random(graph)
        self._programs: OrderedDict[Any, _Program] = OrderedDict()
        self._fixed = not any(map(_is_symbolic, values))
        self._loose = _numbers_beside_sizes(values)
        self._lock = threading.Lock()
        self._history = ShapeHistory(settings.label) if settings.history is None else None

    def programs(self) -> list[_Program]:
        """Return the programs that were compiled and not dropped."""
        return list(self._programs.values())

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._programs.clear()

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        key = None if self._fixed else self._key(args)
        program = self._programs.get(key)
        if program is None:
            with self._lock:
                program = self._programs.get(key) or self._compiled(args)
        return program(args)

    def _key(self, args: Sequence[Any]) -> Any:
        loose = self._loose
        return tuple(a.shape if isinstance(a, torch.Tensor) else None if i in loose else a for i, a in enumerate(args))

    def _compiled(self, args: Sequence[Any]) -> _Program:
        self._settings.compilations += 1
        if not self._fixed and self._history is not None:
            self._history.note([tuple(a.shape) for a in args if isinstance(a, torch.Tensor)])
        program = None
        if self._loose:
            try:
                program = _Program(self, args, self._loose, self._settings)
            except (UnsupportedError, TypeError, jax.errors.JAXTypeError):
                # A number that decides a shape or a branch is a constant of the program.
                self._loose = frozenset()
        if program is None:
            program = _Program(self, args, frozenset(), self._settings)
        if self._settings.is_frozen:
            program.sets.freeze()
        self._programs[None if self._fixed else self._key(args)] = program
        while len(self._programs) > _MOST_SIZES:
            self._programs.popitem(last=False)
            give_back_freed()
        return program


def _is_symbolic(value: Any) -> bool:
    """Return whether an input is a number that changes, or a tensor whose sizes do."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def _numbers_beside_sizes(values: Sequence[Any]) -> frozenset[int]:
    """Return the indices of symbolic numbers that are the size, stride or offset of no input."""
    sizes: set[Any] = set()
    for value in values:
        if isinstance(value, torch.Tensor):
            for number in (*value.shape, *value.stride(), value.storage_offset()):
                if isinstance(number, torch.SymInt):
                    sizes |= number.node.expr.free_symbols
    return frozenset(
        i
        for i, value in enumerate(values)
        if isinstance(value, (torch.SymInt, torch.SymFloat)) and not value.node.expr.free_symbols & sizes
    )


@dataclass(frozen=True)
class Roles:
    """What the inputs of a graph are: indices of weights, and of gradients of a result."""

    weights: list[int]
    cotangents: frozenset[int]


class CompiledGraph:
    """A functional ATen graph, called with a list of its inputs, which it empties.

    Attributes:
        inputs: how many inputs it takes.
    """

    def __init__(self, graph: torch.fx.GraphModule, settings: Settings, kind: str):
        """Plan the graph; programs are compiled at the first call of each set of sizes.

        Args:
            kind: "inference", "forward" or "backward".

        Raises:
            UnsupportedError: an operator has no rule, and `settings.fullgraph` is set.
        """
        if kind == "backward":
            keep_freed()
        self._outputs = Outputs(graph, kind == "backward")
        self._graph = self._outputs.graph
        self._kind, self._settings = kind, settings
        names = [n.name for n in self._graph.find_nodes(op="placeholder")]
        self.inputs = len(names)
        # AOTAutograd's own name for what the backward pass is called with beside saved values.
        cotangents = frozenset(i for i, n in enumerate(names) if kind == "backward" and n.startswith("tangents_"))
        self._roles = Roles(_weights(len(names)) if kind == "inference" else [], cotangents)
        self._eager: set[torch.fx.Node] = set()
        self._replan(unsupported_nodes(self._graph))
        settings.graphs.add(self)
        settings.writes_state = settings.writes_state or (kind != "backward" and bool(written_inputs()))

    def programs(self) -> list[_Program]:
        """Return the programs that were compiled and not dropped."""
        return [program for segment in self._segments() for program in segment.programs()]

    def clear(self) -> None:
        """Drop all programs; each is compiled again when it is needed."""
        for segment in self._segments():
            segment.clear()

    def _segments(self) -> list[Segment]:
        return self._schedule.segments if isinstance(self._schedule, _Schedule) else [self._schedule]

    def _replan(self, eager: set[torch.fx.Node], refusals: Mapping[torch.fx.Node, str] | None = None) -> None:
        """Run some operators in eager PyTorch, and compile what is between them.

        Args:
            refusals: what the rules of some of them say of this case.

        Raises:
            UnsupportedError: there are some, and the graph must be compiled whole.
        """
        self._eager |= eager
        if self._eager and not self._settings.fullgraph:
            warnings.warn(_broken(self._settings.label, self._eager, refusals), GraphBreakWarning, stacklevel=2)
            self._schedule: Segment | _Schedule = _Schedule(
                self._graph, self._eager, self._kind, self._settings, self._roles
            )
        else:
            self._schedule = Segment(self._graph, self._kind, self._settings, self._roles)

    def __call__(self, args: list[Any]) -> list[Any]:
        self._settings.runs += 1
        while True:
            try:
                computed = self._schedule(args)
                break
            except UnsupportedError as error:
                nodes = {n for n in getattr(error, "nodes", ()) if n not in self._eager}
                own = {self._original(n) for n in nodes} - {None}
                if self._settings.fullgraph or not own:
                    raise
                self._replan(own, dict.fromkeys(own, str(error)))
        results = self._outputs.take(args, computed)
        args.clear()  # the caller gives its inputs up, so that they need not outlive their use
        return results

    def _original(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """Return this graph's node for one of it or of a segment's copy; None for one inside a branch or loop body."""
        if node.graph is self._graph:
            return node
        return node.meta.get("kpx_original") if node.meta.get("kpx_graph") is self._graph else None


class _Schedule:
    """A graph as compiled segments, and operators between them that eager PyTorch runs."""

    def __init__(self, graph: torch.fx.Graph, eager: set[torch.fx.Node], kind: str, settings: Settings, roles: Roles):
        placeholders = graph.find_nodes(op="placeholder")
        self._placeholders = placeholders
        self._results = list(graph.output_node().args[0])  # type: ignore[arg-type]
        weights = {placeholders[i] for i in roles.weights}
        cotangents = {placeholders[i] for i in roles.cotangents}
        self._steps: list[tuple[Segment | torch.fx.Node, list[torch.fx.Node], list[torch.fx.Node]]] = []
        self.segments: list[Segment] = []
        self._owner = graph.owning_module
        needed_later = _consumers(graph)
        for level, group in itertools.groupby(_by_level(graph, eager), key=operator.itemgetter(0)):
            nodes = [node for _, node in group]
            if level % 2:
                self._steps += [(node, [], [node]) for node in nodes]
                continue
            inside = set(nodes)
            inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
            inputs = [n for n in inputs if n.op != "get_attr"]
            outputs = [n for n in nodes if n.op != "get_attr" and needed_later(n, inside)]
            if all(n.op == "get_attr" for n in nodes):
                continue
            own = Roles(
                [i for i, n in enumerate(inputs) if n in weights],
                frozenset(i for i, n in enumerate(inputs) if n in cotangents),
            )
            segment = Segment(_part(graph, inputs, nodes, outputs), kind, settings, own)
            self.segments.append(segment)
            self._steps.append((segment, inputs, outputs))

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        values: dict[torch.fx.Node, Any] = dict(zip(self._placeholders, args, strict=True))
        for step, inputs, outputs in self._steps:
            if isinstance(step, Segment):
                values.update(zip(outputs, step([values[n] for n in inputs]), strict=True))
            else:
                values[step] = self._run(step, values)
        return list(torch.fx.node.map_arg(self._results, values.__getitem__))

    def _run(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Any:
        def value(n: torch.fx.Node) -> Any:
            return operator.attrgetter(str(n.target))(self._owner) if n.op == "get_attr" else values[n]

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        with torch.no_grad(), torch._C._DisableAutocast():  # casts are operators of the graph
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _by_level(graph: torch.fx.Graph, eager: set[torch.fx.Node]) -> list[tuple[int, torch.fx.Node]]:
    """Return the operators of a graph by level: even levels are compiled, odd ones run in eager PyTorch.

    A compiled operator is at the level of the last value it reads, or above that of an eager one; so segments are few.
    An item of a tuple that an eager operator returns is taken eagerly, too.
    """
    levels: dict[torch.fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        below = max((levels.get(n, 0) for n in node.all_input_nodes), default=0)
        if node in eager or (node.target is operator.getitem and below % 2 and levels.get(node.args[0]) == below):
            levels[node] = below if below % 2 else below + 1
        else:
            levels[node] = below + below % 2
    order = {node: i for i, node in enumerate(levels)}
    return sorted(((level, node) for node, level in levels.items()), key=lambda pair: (pair[0], order[pair[1]]))


def _consumers(graph: torch.fx.Graph) -> Callable[[torch.fx.Node, set[torch.fx.Node]], bool]:
    def needed(node: torch.fx.Node, inside: set[torch.fx.Node]) -> bool:
        return any(user not in inside for user in node.users)

    return needed


def _part(
    graph: torch.fx.Graph, inputs: Sequence[torch.fx.Node], nodes: Sequence[torch.fx.Node], outputs: Sequence
) -> torch.fx.Graph:
    """Return a graph of some nodes of another one."""
    part = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        for attribute in (n for n in node.all_input_nodes if n.op == "get_attr" and n not in copies):
            copies[attribute] = part.node_copy(attribute, copies.__getitem__)
        if node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            copies[node].meta = {**node.meta, "kpx_original": node, "kpx_graph": graph}
    part.output(tuple(copies[n] for n in outputs))
    return torch.fx.GraphModule(graph.owning_module, part).graph


def _weights(count: int) -> list[int]:
    """Return the indices of an inference graph's inputs that are parameters or buffers which it does not write."""
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is None or metadata.static_input_indices is None:
        return []
    written = {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_metadata}
    return [i for i in metadata.static_input_indices if i not in written and i < count]


def written_inputs() -> list[int]:
    """Return the indices of the inputs that the graph which AOTAutograd compiled last in this context writes."""
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return [] if metadata is None else [i for i, info in enumerate(metadata.input_info) if info.mutates_data]


def boxed(graph: CompiledGraph) -> Callable[[list[Any]], list[Any]]:
    """Return a graph as AOTAutograd wants what a compiler returns: a function, marked as taking one list."""

    def run(args: list[Any]) -> list[Any]:
        return graph(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _broken(label: str, eager: set[torch.fx.Node], refusals: Mapping[torch.fx.Node, str] | None = None) -> str:
    refusals = refusals or {}
    lines = []
    for node in sorted(eager, key=lambda n: n.name):
        where = (node.meta.get("stack_trace") or "").strip().splitlines()[-2:]
        path = module_path(node)
        lines.append(f"  {node.target}" + (f", in `{path}`" if path else ""))
        lines += [f"    {line.strip()}" for line in where]
        if node in refusals:
            lines += [f"    {line.strip()}" for line in refusals[node].splitlines()]
    without_rule = any(not is_known(node.target) for node in eager)
    remedy = "Add a rule with `@kpx.bridges.torch.lowers(op)`, or pass" if without_rule else "Pass"
    return (
        f"{label} runs in parts: eager PyTorch computes {len(eager)} operator(s) that kpx does not lower:\n"
        + "\n".join(dict.fromkeys(lines))
        + f"\nEverything is computed. {remedy} `fullgraph=True` to refuse."
    )
