"""An ExportedProgram as a pure JAX function: weights, state, inputs and a random key in; results and new state out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from kpx.bridges.torch.interpret import as_jax_function, is_random
from kpx.bridges.torch.outputs import Layout
from kpx.bridges.torch.registry import bound_sizes
from kpx.errors import UnsupportedError

_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_RESULTS = {OutputKind.USER_OUTPUT}
_CHANGES = {OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION}

TENSOR = object()  # stands for a tensor among outputs, where the others are constants


class Results(NamedTuple):
    """What an exported function gives."""

    outputs: list[Any]
    state: list[Any]
    changed_inputs: list[Any]


@dataclass(frozen=True)
class Signature:
    """What an exported function takes and gives, without the function (see `ExportedFunction`)."""

    weights: list[str]
    state: list[str]
    changed: list[int]
    outputs: list[Any]
    is_random: bool

    @classmethod
    def of(cls, function: ExportedFunction) -> Signature:
        """A function's."""
        return cls(function.weights, function.state, function.changed, function.outputs, function.is_random)

    def __reduce__(self):
        outputs = [("tensor", None) if o is TENSOR else ("constant", o) for o in self.outputs]
        return _signature, (self.weights, self.state, self.changed, outputs, self.is_random)


def _signature(weights, state, changed, outputs, is_random) -> Signature:
    return Signature(weights, state, changed, [TENSOR if k == "tensor" else o for k, o in outputs], is_random)


class ExportedFunction:
    """`fn(weights, state, inputs, key) -> Results`, what an exported program computes.

    Attributes:
        weights: names of the parameters, buffers and constants that are only read, in order.
        state: names of the buffers (or parameters) that the model writes.
        input_count: how many tensors and sizes the flat user inputs hold.
        changed: positions among the inputs of those that the model writes.
        outputs: the user outputs in order: `TENSOR`, or the constant itself.
        layouts: of the output tensors in order, how they lie in memory where that is not row-major. Set by a call.
        is_random: whether a key is needed.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        """Raises `UnsupportedError` where an op has no rule, or the graph writes what cannot be written back."""
        signature = program.graph_signature
        _check_effects(signature)
        changes = {s.target: s.arg.name for s in signature.output_specs if s.kind in _CHANGES}
        self._function = as_jax_function(program.graph)
        self.is_random = is_random(program.graph)
        held = [(i, str(s.target or s.arg.name)) for i, s in enumerate(signature.input_specs) if s.kind in _WEIGHTS]
        self._weights = [(i, name) for i, name in held if name not in changes]
        self._state = [(i, name) for i, name in held if name in changes]
        self.weights = [name for _, name in self._weights]
        self.state = [name for _, name in self._state]
        specs = list(enumerate(signature.input_specs))
        self._inputs = [i for i, s in specs if s.kind == InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)]
        self._constants = {
            i: s.arg.value
            for i, s in specs
            if s.kind == InputKind.USER_INPUT and not isinstance(s.arg, TensorArgument) and hasattr(s.arg, "value")
        }
        self._count = len(specs)
        self.input_count = len(self._inputs)
        names = [s.arg.name for s in signature.input_specs]
        nodes = list(program.graph.output_node().args[0])
        out = list(enumerate(signature.output_specs))
        self._outputs = [i for i, s in out if s.kind in _RESULTS]
        written = {s.target: i for i, s in out if s.kind in _CHANGES}
        self._new_state = [written[name] for name in self.state]
        inputs = {names[i]: p for p, i in enumerate(self._inputs)}
        mutated = [(i, inputs[s.target]) for i, s in out if s.kind == OutputKind.USER_INPUT_MUTATION]
        self._new_inputs = [i for i, _ in mutated]
        self.changed = [p for _, p in mutated]
        self.outputs = [TENSOR if isinstance(nodes[i], torch.fx.Node) else nodes[i] for i in self._outputs]
        self._captured = [n.meta.get("val") for n in program.graph.find_nodes(op="placeholder")]
        values = [nodes[i].meta.get("val") for i in self._outputs if isinstance(nodes[i], torch.fx.Node)]
        self._symbolic_layouts = [Layout.of(v) for v in values]
        self.layouts: list[Layout | None] = []

    def __call__(self, weights: Sequence, state: Sequence, inputs: Sequence, key: Any = None) -> Results:
        values: list[Any] = [None] * self._count
        for slots, given in ((self._weights, weights), (self._state, state)):
            for (i, _), array in zip(slots, given, strict=True):
                values[i] = array
        for i, array in zip(self._inputs, inputs, strict=True):
            values[i] = array
        for i, constant in self._constants.items():
            values[i] = constant
        sizes = bound_sizes(zip(self._captured, values, strict=True))
        self.layouts = [None if layout is None else layout.resolve(sizes) for layout in self._symbolic_layouts]
        results = self._function(values, key)
        return Results(*([results[i] for i in part] for part in (self._outputs, self._new_state, self._new_inputs)))


def _check_effects(signature: Any) -> None:
    known = {*_RESULTS, *_CHANGES, OutputKind.USER_INPUT_MUTATION, OutputKind.TOKEN}
    unknown = [
        f"  {getattr(s, 'target', None) or s.arg} ({s.kind.name})"
        for s in signature.output_specs
        if s.kind not in known
    ]
    kinds = {*_WEIGHTS, InputKind.USER_INPUT, InputKind.TOKEN}
    unknown += [
        f"  {getattr(s, 'target', None) or s.arg} ({s.kind.name})" for s in signature.input_specs if s.kind not in kinds
    ]
    if unknown:
        raise UnsupportedError(
            "The exported program has effects that kpx cannot carry out:\n"
            + "\n".join(unknown)
            + "\nExport the model alone, without its loss's gradient, and without script objects."
        )


def takes(program: torch.export.ExportedProgram, tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether inputs have the sizes that a program with symbolic ones was captured for."""
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    wanted = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    wanted = [v for v in wanted if isinstance(v, torch.Tensor)]
    bound: dict[Any, int] = {}
    for expected, tensor in zip(wanted, tensors, strict=True):
        if expected.dtype != tensor.dtype or expected.ndim != tensor.ndim:
            return False
        for size, given in zip(expected.shape, tensor.shape, strict=True):
            if not isinstance(size, torch.SymInt):
                if size != given:
                    return False
            elif not _fits(program, size.node.expr, given, bound):
                return False
    return True


def _fits(program: torch.export.ExportedProgram, symbol: Any, given: int, bound: dict[Any, int]) -> bool:
    """Return whether a size is the same as before for its symbol, and in its range; of an expression, that it evaluates."""
    if symbol.is_Symbol:
        allowed = program.range_constraints.get(symbol)
        in_range = allowed is None or allowed.lower <= given <= allowed.upper
        return bound.setdefault(symbol, given) == given and bool(in_range)
    free = symbol.free_symbols
    return not free <= bound.keys() or int(symbol.subs(bound)) == given
