"""Finding a small graph in a module: first its skeleton, whatever the shapes, then op for op.

A pattern is traced twice. At example shapes it is a skeleton: which operation feeds which, with conversions, broadcasts
and reshapes left out, and attributes unread. Where a skeleton lies in a module, its inputs are known, and with them
their types: traced at those, and brought into the module's canonical form, the pattern must be the same graph, and
then its results are those of the ops that were found.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpx.ir import module as m
from kpx.ir.module import Value, func, ir

# What a skeleton leaves out: the ways in which two spellings of one computation differ.
_LEFT_OUT = {"stablehlo.convert", "stablehlo.broadcast_in_dim", "stablehlo.reshape", "stablehlo.transpose"}
_COMMUTATIVE = {f"stablehlo.{name}" for name in ("add", "multiply", "maximum", "minimum", "and", "or", "xor")}
# Attributes that say where something is computed, or how it is named, and not what.
_UNREAD = {"mhlo.sharding", "sdy.sharding", "mhlo.frontend_attributes"}
REACH = 5
"""How many levels below an op are looked at before a skeleton is searched for there."""
_MOST_BINDINGS = 32  # ways of choosing a skeleton's inputs that are tried


@dataclass(frozen=True)
class Node:
    """An op as plain data.

    Attributes:
        key: its name, attributes, regions and result types: equal where the operations are.
        operands: the numbers of the values that it takes.
        results: the numbers of those that it makes.
    """

    name: str
    key: str
    operands: tuple[int, ...]
    results: tuple[int, ...]


@dataclass
class Graph:
    """A function as plain data, which needs no MLIR context to live.

    Attributes:
        inputs: the numbers of its arguments, and `outputs` of its results.
        types: values' types as MLIR writes them, by number.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[Node, ...]
    types: tuple[str, ...]
    producers: dict[int, Node] = field(init=False, repr=False)
    _closed: set[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.producers = {result: node for node in self.nodes for result in node.results}
        self._closed = set()
        for node in self.nodes:  # operands first
            if self._closed.issuperset(node.operands):
                self._closed.update(node.results)

    def bare(self, value: int) -> int:
        """What a value is made of, less what a skeleton leaves out."""
        while (node := self.producers.get(value)) is not None and node.name in _LEFT_OUT:
            value = node.operands[0]
        return value

    def is_closed(self, value: int) -> bool:
        """Whether a value depends on no input."""
        return value in self._closed

    @property
    def anchor(self) -> str:
        """The operation that makes the first output, by name; empty where it is an input."""
        node = self.producers.get(self.bare(self.outputs[0]))
        return "" if node is None else node.name

    @functools.cached_property
    def below(self) -> tuple[frozenset[str], ...]:
        """The operations in no, one, ... `REACH` levels below the anchor and at it, by name, less those that a constant may
        turn into another."""
        found: list[frozenset[str]] = []
        level, names = {self.bare(self.outputs[0])}, set[str]()
        for _ in range(REACH + 1):
            nodes = [node for value in level if (node := self.producers.get(value)) is not None]
            names.update(n.name for n in nodes if not any(map(self.is_closed, (*n.operands, *n.results))))
            found.append(frozenset(names))
            level = {self.bare(o) for node in nodes for o in node.operands}
        return tuple(found)

    def bones(self) -> str:
        """The skeleton as text: equal where two graphs are found in the same places."""
        numbers: dict[int, int] = {}
        lines: list[str] = []

        def visit(value: int) -> int:
            value = self.bare(value)
            if value not in numbers:
                node = self.producers.get(value)
                if node is None:
                    line = f"input {self.inputs.index(value)}"
                elif self.is_closed(value):
                    line = "constant"
                else:
                    line = f"{node.name} {[visit(o) for o in node.operands]}"
                lines.append(line)
                numbers[value] = len(lines)
            return numbers[value]

        return "; ".join([*map(str, [visit(o) for o in self.outputs]), *lines])


def stripped(graph: Graph) -> Graph:
    """A graph less what a skeleton leaves out or does not read: with the same bones, and no types."""
    inputs = tuple(range(len(graph.inputs)))
    numbers = dict(zip(graph.inputs, inputs, strict=True))
    nodes: list[Node] = []

    def visit(value: int) -> int:
        value = graph.bare(value)
        if value not in numbers:
            node = graph.producers[value]
            closed = graph.is_closed(value)
            name, operands = ("stablehlo.constant", ()) if closed else (node.name, tuple(map(visit, node.operands)))
            first = len(inputs) + sum(len(n.results) for n in nodes)
            results = range(first, first + (1 if closed else len(node.results)))
            nodes.append(Node(name, "", operands, tuple(results)))
            numbers.update({value: first} if closed else dict(zip(node.results, results, strict=True)))
        return numbers[value]

    outputs = tuple(map(visit, graph.outputs))
    return Graph(inputs, outputs, tuple(nodes), ())


def graph_of(function: Any) -> Graph:
    """A function of MLIR's as a graph."""
    block = m.entry_block(function)
    numbers: dict[Value, int] = {}
    types: list[str] = []

    def number(value: Value) -> int:
        numbers[value] = len(types)
        types.append(str(value.type))
        return numbers[value]

    inputs = tuple(number(argument) for argument in block.arguments)
    nodes, outputs = [], ()
    for op in block.operations:
        operands = tuple(numbers[o] for o in op.operands)
        if not len(op.results):
            outputs = operands
            continue
        nodes.append(Node(op.operation.name, key(op), operands, tuple(map(number, op.results))))
    return Graph(inputs, outputs, tuple(nodes), tuple(types))


def key(op: Any) -> str:
    """What an op computes, as text: its name, attributes, regions and the types of its results."""
    attributes = sorted(f"{named}={a}" for named, a in m.attributes(op.operation).items() if named not in _UNREAD)
    regions = [_region_key(region) for region in op.operation.regions]
    return "|".join([op.operation.name, *attributes, *regions, *(str(r.type) for r in op.results)])


def _region_key(region: Any) -> str:
    numbers: dict[Value, int] = {}
    parts = []
    for block in region.blocks:
        for argument in block.arguments:
            numbers[argument] = len(numbers)
        for op in block.operations:
            operands = [numbers.get(o, -1) for o in op.operands]  # -1: from outside, which no pattern has
            parts.append(f"{key(op)}{operands}")
            for result in op.results:
                numbers[result] = len(numbers)
    return f"({'; '.join(parts)})"


@dataclass(frozen=True)
class Skeleton:
    """Where a pattern may lie in a module.

    Attributes:
        inputs: by the number of a pattern's input, the values that it may be, the innermost last.
        numbers: by the number of an input that is to be a constant, that constant.
        outputs: by output, the values that it may be, the outermost last.
    """

    inputs: Mapping[int, tuple[Value, ...]]
    numbers: Mapping[int, float]
    outputs: tuple[tuple[Value, ...], ...]

    def bindings(self, ranks: Mapping[int, set[int]]) -> Iterator[dict[int, Value]]:
        """Ways of choosing the inputs: those that take in the most conversions and broadcasts first, and of those the
        ones that leave the most reshapes and transposes out.

        Args:
            ranks: by the number of an input, the ranks that it may have; any where it is not named.
        """
        choices = []
        for number, values in self.inputs.items():
            kept = next((i for i, v in enumerate(values) if _is_movement(v)), len(values) - 1) + 1
            ordered = (*reversed(values[:kept]), *values[kept:])
            choices.append([v for v in ordered if number not in ranks or m.rank(v) in ranks[number]])
        for chosen in itertools.islice(itertools.product(*choices), _MOST_BINDINGS):
            yield dict(zip(self.inputs, chosen, strict=True))

    def results(self, types: Sequence[str]) -> Iterator[tuple[Value, ...]]:
        """Ways of choosing the outputs that have these types, those that take in the most first."""
        choices = [
            [v for v in reversed(values) if str(v.type) == kind]
            for values, kind in zip(self.outputs, types, strict=True)
        ]
        return itertools.islice(itertools.product(*choices), _MOST_BINDINGS)


@dataclass(frozen=True)
class _State:
    """What a skeleton has been matched to so far: values by number, inputs' candidates, constants."""

    values: Mapping[int, Value]
    inputs: Mapping[int, tuple[Value, ...]]
    numbers: Mapping[int, float]


class Matcher:
    """Looks for graphs in one module; what it has read of the module's ops it keeps."""

    def __init__(self) -> None:
        self._keys: dict[Value, str] = {}
        self._below: list[dict[Value, frozenset[str]]] = [{} for _ in range(REACH + 1)]
        self._chains: dict[Value, list[Value]] = {}
        self._closed: dict[Value, bool] = {}

    def chain(self, value: Value) -> list[Value]:
        """A value, and what it is made of by what a skeleton leaves out, in turn."""
        if (found := self._chains.get(value)) is None:
            found = self._chains[value] = _downwards(value)
        return found

    def is_closed(self, value: Value) -> bool:
        """See `is_closed`."""
        if (found := self._closed.get(value)) is None:
            found = self._closed[value] = is_closed(value)
        return found

    def may_be_at(self, needed: Sequence[frozenset[str]], value: Value) -> bool:
        """Whether what a skeleton needs in some levels (`Graph.below`) is there, as far as names tell."""
        return all(names <= self.below(value, levels) for levels, names in enumerate(needed))

    def below(self, value: Value, levels: int) -> frozenset[str]:
        """The operations that make a value, and those in some levels below, by name, less what a skeleton leaves out."""
        known = self._below[levels]
        if (found := known.get(value)) is None:
            op = m.producer(self.chain(value)[-1])
            found = frozenset() if op is None else frozenset([op.operation.name])
            if op is not None and levels:
                found = found.union(*(self.below(operand, levels - 1) for operand in op.operands))
            known[value] = found
        return found

    def skeletons(self, pattern: Graph, numbers: Sequence[int], root: Any) -> Iterator[Skeleton]:
        """Where a pattern's skeleton lies, its first output made by an op.

        Args:
            numbers: the pattern's inputs that are to be constants in the module.
        """
        search = _Search(self, pattern, frozenset(numbers))
        start = _State({}, {}, {})
        for state in search.descend(pattern.outputs[0], root.results[0], start):
            yield from self._others(search, state, 1)

    def _others(self, search: _Search, state: _State, output: int) -> Iterator[Skeleton]:
        """The pattern's further outputs, from what is matched already."""
        pattern = search.pattern
        if output == len(pattern.outputs):
            if all(i in state.inputs or i in state.numbers for i in pattern.inputs):
                outputs = tuple(tuple(_upwards(state.values[pattern.bare(o)])) for o in pattern.outputs)
                yield Skeleton(state.inputs, state.numbers, outputs)
            return
        for candidate in search.reached(pattern.bare(pattern.outputs[output]), state):
            for found in search.descend(pattern.outputs[output], candidate, state):
                yield from self._others(search, found, output + 1)

    def exactly(self, pattern: Graph, inputs: Sequence[Value], outputs: Sequence[Value]) -> list[Any] | None:
        """The ops of a module that are a pattern op for op, operands first, from its inputs to what it gives."""
        for number, value in zip(pattern.inputs, inputs, strict=True):
            if pattern.types[number] != str(value.type):
                return None
        states = [dict(zip(pattern.inputs, inputs, strict=True))]
        for number, value in zip(pattern.outputs, outputs, strict=True):
            states = [found for state in states for found in self._equal(pattern, number, value, state)]
        if not states:
            return None
        found = states[0]
        ops = []
        for node in pattern.nodes:
            value = next((found[r] for r in node.results if r in found), None)
            if value is None:
                return None  # a result that no output needs: not a pattern in canonical form
            ops.append(m.producer(value))
        return ops

    def _equal(self, pattern: Graph, number: int, value: Value, state: dict[int, Value]) -> Iterator[dict[int, Value]]:
        """States in which a pattern's value is a module's."""
        if number in state:
            if state[number] == value or m.same_value(state[number], value):
                yield state
            return
        node, op = pattern.producers.get(number), m.producer(value)
        if node is None or op is None or node.name != op.operation.name or len(node.operands) != len(op.operands):
            return
        if pattern.types[number] != str(value.type):  # before a large constant is made text
            return
        if self._key(op) != node.key or node.results.index(number) != list(op.results).index(value):
            return
        state = state | {number: value}
        for order in _orders(node):
            states = [state]
            for i, operand in zip(order, op.operands, strict=True):
                states = [found for s in states for found in self._equal(pattern, node.operands[i], operand, s)]
                if not states:
                    break
            yield from states

    def _key(self, op: Any) -> str:
        first = op.results[0]
        if first not in self._keys:
            self._keys[first] = key(op)
        return self._keys[first]


class _Search:
    """A skeleton's search: from an output down to the inputs."""

    def __init__(self, matcher: Matcher, pattern: Graph, numbers: frozenset[int]):
        self.matcher, self.pattern, self.numbers = matcher, pattern, numbers

    def descend(self, number: int, value: Value, state: _State) -> Iterator[_State]:
        """States in which a pattern's value is a module's, less what a skeleton leaves out of both."""
        number = self.pattern.bare(number)
        node = self.pattern.producers.get(number)
        chain = self.matcher.chain(value)
        value = chain[-1]
        if node is None:
            if (bound := self._bind(number, chain, state)) is not None:
                yield bound
            return
        if self.pattern.is_closed(number):  # what it is may depend on shapes
            if self.matcher.is_closed(value):
                yield state
            return
        if number in state.values:
            if state.values[number] == value:
                yield state
            return
        op = m.producer(value)
        if op is None:
            return
        if (scaled := self._scaled(node)) is not None:
            if (factor := _scaled(op)) is not None:
                below = _State({**state.values, number: value}, state.inputs, state.numbers)
                yield from self.descend(scaled, factor, below)
            return
        if op.operation.name != node.name or len(op.operands) != len(node.operands):
            return
        state = _State({**state.values, number: value}, state.inputs, state.numbers)
        for order in _orders(node):
            states = [state]
            for i, operand in zip(order, op.operands, strict=True):
                states = [found for s in states for found in self.descend(node.operands[i], operand, s)]
                if not states:
                    break
            yield from states

    def _scaled(self, node: Node) -> int | None:
        """What a node multiplies or divides by a constant, which of the two depends on the constant; None for others."""
        if node.name not in ("stablehlo.multiply", "stablehlo.divide"):
            return None
        constant = [self.pattern.is_closed(o) for o in node.operands]
        if constant == [False, True] or (constant == [True, False] and node.name == "stablehlo.multiply"):
            return node.operands[constant.index(False)]
        return None

    def _bind(self, number: int, chain: list[Value], state: _State) -> _State | None:
        """A state in which an input is one of a chain of values, each made of the next."""
        if number in self.numbers:
            found = m.splat(chain[-1])
            if found is None or isinstance(found, bool) or state.numbers.get(number, found) != found:
                return None
            return _State(state.values, state.inputs, {**state.numbers, number: float(found)})
        before = state.inputs.get(number)
        candidates = tuple(chain) if before is None else tuple(v for v in before if v in chain)
        if not candidates:
            return None
        return _State(state.values, {**state.inputs, number: candidates}, state.numbers)

    def reached(self, output: int, state: _State) -> list[Value]:
        """Values of the module that an output may be: upwards from one that is matched, by the pattern's own steps."""
        steps = self._steps(output, state)
        if steps is None:
            return []
        start, names = steps
        known = state.values.get(start)
        values = [known] if known is not None else list(state.inputs.get(start, ()))
        for name in names:
            above = {r: None for v in values for u in _users_above(v) if u.operation.name == name for r in u.results}
            values = list(above)
        return values

    def _steps(self, output: int, state: _State) -> tuple[int, list[str]] | None:
        """From a value that is matched, one that is computed if there is one, the names of the ops up to an output."""
        known: dict[int, tuple[int, list[str]] | None] = {}

        def visit(value: int) -> tuple[int, list[str]] | None:
            if value not in known:
                node = self.pattern.producers.get(value)
                if value in state.values or value in state.inputs:
                    known[value] = (value, [])
                else:
                    below = [visit(self.pattern.bare(o)) for o in node.operands] if node is not None else []
                    found = [(start, [*names, node.name]) for start, names in filter(None, below)] if node else []
                    known[value] = min(found, key=lambda s: (s[0] in state.inputs, len(s[1])), default=None)
            return known[value]

        return visit(output)


def _is_movement(value: Value) -> bool:
    op = m.producer(value)
    return op is not None and op.operation.name in ("stablehlo.reshape", "stablehlo.transpose")


def _downwards(value: Value) -> list[Value]:
    """A value, and what it is made of by what a skeleton leaves out, in turn."""
    chain = [value]
    while (op := m.producer(chain[-1])) is not None and op.operation.name in _LEFT_OUT:
        chain.append(op.operands[0])
    return chain


def _upwards(value: Value) -> list[Value]:
    """A value, and what is made of it alone by what a skeleton leaves out, in turn."""
    chain = [value]
    while m.has_one_use(chain[-1]) and (user := m.users(chain[-1])[0]).operation.name in _LEFT_OUT:
        chain.append(user.results[0])
    return chain


def _users_above(value: Value) -> Iterator[Any]:
    """The ops that use a value, or what a skeleton leaves out makes of it."""
    for user in m.users(value):
        if user.operation.name in _LEFT_OUT:
            yield from _users_above(user.results[0])
        else:
            yield user


def _orders(node: Node) -> list[tuple[int, ...]]:
    if node.name in _COMMUTATIVE and node.operands[0] != node.operands[1]:
        return [(0, 1), (1, 0)]
    return [tuple(range(len(node.operands)))]


def is_closed(value: Value, depth: int = 8) -> bool:
    """Whether a module's value is a constant, or is made of constants and counts in few steps."""
    op = m.producer(value)
    if op is None or depth == 0 or not op.operation.name.startswith("stablehlo."):
        return False
    return all(is_closed(operand, depth - 1) for operand in op.operands)


def _scaled(op: Any) -> Value | None:
    """What an op of a module multiplies or divides by a constant."""
    name = op.operation.name
    if name == "stablehlo.multiply" and m.splat(_downwards(op.operands[0])[-1]) is not None:
        return op.operands[1]
    if name in ("stablehlo.multiply", "stablehlo.divide") and m.splat(_downwards(op.operands[1])[-1]) is not None:
        return op.operands[0]
    return None


def outline(module: ir.Module, name: str, inputs: Sequence[Value], outputs: Sequence[Value], ops: Sequence[Any]) -> str:
    """Adds a private function that computes outputs from inputs as ops do, operands first; gives its symbol."""
    table = m.functions(module)
    symbol = next(s for i in itertools.count() if (s := f"{name}.{i}") not in table)
    with module.context, ir.Location.unknown():
        kind = ir.FunctionType.get([v.type for v in inputs], [v.type for v in outputs])
        with ir.InsertionPoint(module.body):
            function = func.FuncOp(symbol, kind, visibility="private")
        block = function.add_entry_block()
        new: dict[Value, Value] = dict(zip(inputs, block.arguments, strict=True))
        with ir.InsertionPoint(block):
            for op in ops:
                copied = m.clone(op, new)
                new.update(zip(op.results, copied.results, strict=True))
            func.ReturnOp([new[v] for v in outputs])
    return symbol
