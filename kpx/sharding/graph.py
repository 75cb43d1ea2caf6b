"""A module read once for planning: its values, its operations with Shardy's rules, its loops.

Shardy itself says, operation by operation, which dimensions go together (`sdy-populate-op-sharding-rules`); what it says is
read into plain Python, so that one layout after another can be priced in milliseconds.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpx.ir import cost
from kpx.ir import module as m
from kpx.ir.module import ir
from kpx.kernels import mixture_split

FUSED = "kpx.fused"
"""An attribute of operations that a kernel computes together: nothing between them is written to memory."""

TO_HOST, TO_DEVICE = "to_host", "to_device"
"""Kinds of operations that put an array into the host's memory, and bring it from there."""

_MOVES = {"dynamic_update_slice", "dynamic_slice", "reshape", "slice", "optimization_barrier", "sharding_constraint"}
_PLACEMENT = "annotate_device_placement"

_RULES = "builtin.module(func.func(sdy-populate-op-sharding-rules))"


@dataclass(frozen=True)
class Rule:
    """Which factors an operation's dimensions are made of (Shardy's op sharding rule).

    Attributes:
        operands, results: of each array, of each dimension, its factors, major to minor.
        sizes: of each factor.
        reduced: factors that are summed over: where they are split, each device has a part of the sum.
        whole: factors along which a device needs everything.
        shifted: factors along which a device needs its neighbours' borders.
    """

    operands: tuple[tuple[tuple[int, ...], ...], ...]
    results: tuple[tuple[tuple[int, ...], ...], ...]
    sizes: tuple[int, ...]
    reduced: frozenset[int]
    whole: frozenset[int]
    shifted: frozenset[int]


@dataclass(frozen=True, slots=True)
class Op:
    """An operation.

    Attributes:
        kind: its name, less the dialect.
        operands, results: numbers of values.
        region: the number of the region it is in.
        flops: of one run, the whole array's.
        element: the element type of its first operand.
        group: what it is fused into; 0 for nothing.
        path: the names it was made under.
    """

    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: Rule | None
    region: int
    flops: float
    element: str
    group: int
    path: str


@dataclass(slots=True)
class Region:
    """A loop's body (or condition, or a branch): how often it runs in all, and how values go in and out.

    Attributes:
        parent: the region around it; -1 of `main`.
        trips: how often it runs each time that the region around it does.
        arguments, returned: numbers of values.
    """

    parent: int
    trips: int
    arguments: list[int] = field(default_factory=list)
    returned: list[int] = field(default_factory=list)


@dataclass
class Graph:
    """A module's values, operations and regions.

    Attributes:
        shapes, itemsizes, elements: of each value; an itemsize may be a fraction.
        producers: of each value, the number of its operation, or -1.
        arguments, returned: of `main`.
        ties: pairs of values that are one array (what a loop carries, what a barrier passes).
        bodies: regions of an operation, by its number.
        parts: pairs of an array and what one group of devices has of it, under manual computation along some axes.
        manual: of values under manual computation, those axes: along them they are parts already.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    itemsizes: list[float] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)
    producers: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)
    bodies: dict[int, list[int]] = field(default_factory=dict)
    parts: list[tuple[int, int]] = field(default_factory=list)
    manual: dict[int, frozenset[str]] = field(default_factory=dict)

    @property
    def arguments(self) -> list[int]:
        return self.regions[0].arguments

    @property
    def returned(self) -> list[int]:
        return self.regions[0].returned

    def bytes(self, value: int) -> float:
        """Of the whole array."""
        total = self.itemsizes[value]
        for n in self.shapes[value]:
            total *= n
        return total

    @functools.cached_property
    def counts(self) -> list[int]:
        """How often each region runs in all."""
        found: list[int] = []
        for region in self.regions:
            found.append(region.trips * (found[region.parent] if region.parent >= 0 else 1))
        return found

    @functools.cached_property
    def closed(self) -> frozenset[int]:
        """Values that no input decides (zeros, masks, counts): they lie in whatever way is asked for, computed where they are
        needed."""
        found: set[int] = set()
        for number, op in enumerate(self.ops):
            if op.kind == "while":  # what it carries along unchanged
                condition, body = (self.regions[r] for r in self.bodies[number])
                for place, value in enumerate(op.operands):
                    if value in found and (
                        body.returned[place] == body.arguments[place] or body.returned[place] in found
                    ):
                        found |= {op.results[place], condition.arguments[place], body.arguments[place]}
            is_plain = number not in self.bodies and op.kind not in ("rng", "rng_bit_generator", "custom_call")
            if is_plain and all(value in found for value in op.operands):
                found.update(op.results)
        return frozenset(found)

    @functools.cached_property
    def on_host(self) -> frozenset[int]:
        """Values in the host's memory: what is put there, what is made of that by moving it alone, and arguments that are brought
        from there before anything else."""
        found = {op.results[0] for op in self.ops if op.kind == TO_HOST}
        found |= {a for a in self.arguments if self._is_brought(a)}
        if not found:
            return frozenset()
        ties: dict[int, set[int]] = {}
        for a, b in self.ties:
            ties.setdefault(a, set()).add(b)
            ties.setdefault(b, set()).add(a)
        waiting = [*found]
        while waiting:
            value = waiting.pop()
            near = {*ties.get(value, ())} if value not in self.closed else set()
            for number in self.users[value]:
                op = self.ops[number]
                if op.kind in _MOVES and value in op.operands[:2]:
                    near.add(op.results[0])
            if (producer := self.producers[value]) >= 0 and self.ops[producer].kind == "dynamic_update_slice":
                near.add(self.ops[producer].operands[0])
            waiting += near - found
            found |= near
        return frozenset(found)

    def _is_brought(self, value: int) -> bool:
        """Whether a value is brought from the host's memory before anything else is done with it."""
        for number in self.users[value]:
            op = self.ops[number]
            waits = op.kind == "optimization_barrier" and self._is_brought(op.results[op.operands.index(value)])
            if op.kind != TO_DEVICE and not waits:
                return False
        return bool(self.users[value])

    @functools.cached_property
    def users(self) -> list[list[int]]:
        """Of each value, the numbers of the operations that take it."""
        found: list[list[int]] = [[] for _ in self.shapes]
        for number, op in enumerate(self.ops):
            for value in op.operands:
                found[value].append(number)
        return found


def read(module: ir.Module) -> Graph:
    """The graph of a module, which is left as it is; calls and composites are read through."""
    copied = m.copy(module)
    m.run_passes(copied, _RULES.removeprefix("builtin.module(").removesuffix(")"))
    return _Reader(copied).graph


def constrained(module: ir.Module) -> tuple[Graph, list[Any], dict[int, Any]]:
    """A module's graph with its operations, and its values by number, for one that has no calls left to read through.

    Rules are put onto its operations and taken off again.
    """
    m.run_passes(module, _RULES.removeprefix("builtin.module(").removesuffix(")"))
    reader = _Reader(module)
    for op in m.walk(m.main(module)):
        if "sdy.sharding_rule" in op.operation.attributes and op.operation.name != "stablehlo.custom_call":
            del op.operation.attributes["sdy.sharding_rule"]
    return reader.graph, reader.operations, {number: value for value, number in reader.numbers.items()}


class _Reader:
    def __init__(self, module: ir.Module):
        self.graph = Graph()
        self.numbers: dict[m.Value, int] = {}
        self.operations: list[Any] = []
        self._functions = m.functions(module)
        self._groups = 0
        self._manual: frozenset[str] = frozenset()
        self._mesh = {a for a, n in m.mesh_axes(module).items() if n > 1}
        main = m.main(module)
        self.graph.regions.append(Region(-1, 1))
        block = m.entry_block(main)
        self.graph.regions[0].arguments = [self._value(a, -1) for a in block.arguments]
        self.graph.regions[0].returned = self._block(block, self.numbers, 0, 0)

    def _value(self, value: m.Value, producer: int, numbers: dict[m.Value, int] | None = None) -> int:
        graph, kind = self.graph, value.type
        number = len(graph.shapes)
        ranked = isinstance(kind, ir.RankedTensorType)
        graph.shapes.append(tuple(kind.shape) if ranked else ())
        graph.itemsizes.append(_itemsize(str(kind.element_type)) if ranked else 0)
        graph.elements.append(str(kind.element_type) if ranked else "")
        graph.producers.append(producer)
        if self._manual:
            graph.manual[number] = self._manual
        (self.numbers if numbers is None else numbers)[value] = number
        return number

    def _block(self, block: ir.Block, numbers: dict[m.Value, int], region: int, group: int) -> list[int]:
        """Reads a block's operations; gives what it returns."""
        for op in block.operations:
            name = op.operation.name
            if name in ("stablehlo.return", "func.return", "sdy.return"):
                return [numbers[v] for v in op.operands]
            self._op(op, name, numbers, region, group)
        return []

    def _op(self, op: Any, name: str, numbers: dict[m.Value, int], region: int, group: int) -> None:
        attributes = op.operation.attributes
        if name in ("func.call", "stablehlo.composite"):
            self._callee(op, name, numbers, region, group)
            return
        graph, number = self.graph, len(self.graph.ops)
        kind = name.rpartition(".")[2]
        rule = _rule(str(attributes["sdy.sharding_rule"])) if "sdy.sharding_rule" in attributes else None
        operands = tuple(numbers[v] for v in op.operands)
        results = tuple(self._value(r, number, numbers) for r in op.results)
        if FUSED in attributes:
            group = attributes[FUSED].value + 1_000_000
        flops = cost.product_flops([op]) if kind in ("dot_general", "convolution", "ragged_dot") else 0.0
        if kind == "custom_call" and op.call_target_name.value in MIXTURES:
            kind, top_k = (
                MIXTURES[op.call_target_name.value],
                m.dictionary(attributes["mhlo.backend_config"])["top_k"].value,
            )
            shapes = [graph.shapes[v] for v in operands]
            rule, flops = _mixture_rule(shapes, kind), _mixture_flops(shapes, top_k, kind)
        if kind == "custom_call" and op.call_target_name.value == _PLACEMENT:
            kind = TO_HOST if "host" in str(attributes["mhlo.frontend_attributes"]) else TO_DEVICE
            rule = _identity(graph.shapes[operands[0]])
        element = graph.elements[operands[0]] if operands else ""
        graph.ops.append(Op(kind, operands, results, rule, region, flops, element, group, m.source_path(op)))
        self.operations.append(op)
        if kind in ("while", "case", "if"):
            self._regions(op, kind, number, operands, results, numbers, group)
        elif kind == "optimization_barrier":
            graph.ties += zip(operands, results, strict=True)
        elif kind == "manual_computation":
            self._groups_of_devices(op, number, numbers, group)

    def _groups_of_devices(self, op: Any, number: int, numbers: dict[m.Value, int], group: int) -> None:
        """Reads what each group of devices computes; what each device computes by itself is not read: nothing there is split."""
        axes = frozenset(re.findall(r'"([^"]+)"', str(op.operation.attributes["manual_axes"])))
        if axes >= self._mesh or self._manual:
            return
        graph, here = self.graph, len(self.graph.regions)
        graph.regions.append(Region(graph.ops[number].region, 1))
        graph.bodies[number] = [here]
        block = op.regions[0].blocks[0]
        self._manual = axes
        inner = graph.regions[here].arguments = [self._value(a, -1, numbers) for a in block.arguments]
        returned = graph.regions[here].returned = self._block(block, numbers, here, group)
        self._manual = frozenset()
        made = graph.ops[number]
        graph.parts += [*zip(made.operands, inner, strict=True), *zip(made.results, returned, strict=True)]

    def _callee(self, op: Any, name: str, numbers: dict[m.Value, int], region: int, group: int) -> None:
        symbol = op.operation.attributes["decomposition" if name == "stablehlo.composite" else "callee"].value
        block = m.entry_block(self._functions[symbol])
        if name == "stablehlo.composite" and not group:
            self._groups += 1
            group = self._groups
        inner = {a: numbers[v] for a, v in zip(block.arguments, op.operands, strict=True)}
        for result, number in zip(op.results, self._block(block, inner, region, group), strict=True):
            numbers[result] = number

    def _regions(self, op: Any, kind: str, number: int, operands, results, numbers: dict[m.Value, int], group) -> None:
        graph, parent = self.graph, self.graph.ops[number].region
        trips = cost.trip_count(op) if kind == "while" else 1
        for place, region in enumerate(op.regions):
            block, here = region.blocks[0], len(graph.regions)
            graph.regions.append(Region(parent, trips))
            graph.bodies.setdefault(number, []).append(here)
            arguments = [self._value(a, -1, numbers) for a in block.arguments]
            graph.regions[here].arguments = arguments
            if kind == "while":
                graph.ties += zip(operands, arguments, strict=True)
                graph.ties += zip(results, arguments, strict=True)
            returned = self._block(block, numbers, here, group)
            graph.regions[here].returned = returned
            if kind != "while" or place == 1:
                graph.ties += zip(results, returned, strict=True)


MIXTURES = {mixture_split.PLANNED: "mixture", mixture_split.PLANNED_GRADIENT: "mixture_gradient"}
"""Mixtures of experts that stand for themselves (see `kpx.kernels.mixture_split`), and what they are called here."""


def _identity(shape: tuple[int, ...]) -> Rule:
    dims = tuple((d,) for d in range(len(shape)))
    return Rule((dims,), (dims,), shape, frozenset(), frozenset(), frozenset())


def _mixture_rule(shapes: Sequence[tuple[int, ...]], kind: str) -> Rule:
    """Rows are split alike everywhere; of experts each device has some; nothing else of a mixture is split."""
    lead, (experts, size, width) = shapes[0][:-1], shapes[2]
    count = len(lead)
    of_size, of_experts, of_width, of_logits = range(count, count + 4)
    rows = tuple((f,) for f in range(count))
    x, logits = (*rows, (of_size,)), (*rows, (of_logits,))
    gate, down = ((of_experts,), (of_size,), (of_width,)), ((of_experts,), (of_width,), (of_size,))
    given = (x, logits, gate, gate, down)
    sizes = (*lead, size, experts, width, experts)
    whole = frozenset((of_size, of_width, of_logits))
    if kind == "mixture":
        return Rule(given, (x,), sizes, frozenset(), whole, frozenset())
    return Rule((*given, x), given, sizes, frozenset(range(count)), whole, frozenset())


def _mixture_flops(shapes: Sequence[tuple[int, ...]], top_k: int, kind: str) -> float:
    rows, (_, size, width) = math.prod(shapes[0][:-1]) * top_k, shapes[2]
    return 6.0 * rows * size * width * (1 if kind == "mixture" else 3)  # backward, the inner products once more


def _itemsize(element: str) -> float:
    bits = re.search(r"(\d+)", element)
    if element.startswith("complex"):
        return 2 * _itemsize(element[8:-1])
    return max(int(bits[1]), 8) / 8 if bits and not element.startswith("f4") else 0.5


@functools.lru_cache(maxsize=1 << 14)
def _rule(text: str) -> Rule:
    """A rule from its text: `#sdy.op_sharding_rule<([i, jk], [k])->([i]) {i=2, j=4, k=8} reduction={j, k}>`."""
    arrays, _, rest = text.partition(" {")
    given, _, results = arrays.partition(")->(")
    sizes_text, _, rest = rest.partition("}")
    names = {name: place for place, (name, _) in enumerate(_sizes(sizes_text))}
    sizes = tuple(size for _, size in _sizes(sizes_text))

    def factors(kind: str) -> frozenset[int]:
        found = re.search(rf"{kind}=\{{([^}}]*)\}}", rest)
        return frozenset(names[n] for n in re.findall(_FACTOR, found[1])) if found else frozenset()

    return Rule(
        tuple(_dimensions(given, names)), tuple(_dimensions(results, names)), sizes,
        factors("reduction"), factors("need_replication"), factors("permutation"),
    )  # fmt: skip


_FACTOR = r"z_\d+|[a-z]"


def _sizes(text: str) -> Iterator[tuple[str, int]]:
    for name, size in re.findall(rf"({_FACTOR})=(\d+)", text):
        yield name, int(size)


def _dimensions(text: str, names: dict[str, int]) -> Sequence[tuple[tuple[int, ...], ...]]:
    """Each array's dimensions, each dimension's factors."""
    found = []
    for array in re.findall(r"\[([^\]]*)\]", text):
        dims = [d.strip() for d in array.split(",")] if array.strip() else []
        found.append(tuple(tuple(names[n] for n in re.findall(_FACTOR, d)) for d in dims))
    return found
