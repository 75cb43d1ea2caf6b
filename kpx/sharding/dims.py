"""Dimensions that go together: of all arrays of a step, those that are one thing (its batch, its heads, its width).

The analysis of named dimensions in TOAST (arXiv 2508.15010) and automap (arXiv 2112.02958), by Shardy's own rules.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kpx.sharding.graph import Graph, Op

# What computes each number from those at its own place, or moves numbers: what lies split as weights do stays so.
_BY_PLACE = {
    "add", "subtract", "multiply", "divide", "negate", "sqrt", "rsqrt", "power", "maximum", "minimum", "abs", "sign",
    "exponential", "log", "tanh", "logistic", "convert", "select", "compare", "and", "or", "not", "xor", "clamp",
    "is_finite", "broadcast_in_dim", "reshape", "transpose", "slice", "dynamic_slice", "dynamic_update_slice", "floor",
    "round_nearest_even", "round_nearest_afz", "ceil", "exponential_minus_one", "log_plus_one", "cbrt", "bitcast_convert",
    "sharding_constraint", "optimization_barrier", "copy", "to_host", "to_device", "remainder", "shift_left", "shift_right_logical",
}  # fmt: skip


@dataclass(frozen=True)
class Roles:
    """What arguments and results are to a step.

    Attributes:
        state: places of arguments that the step gives back anew: weights, the optimizer's state.
        becomes: for each of them, the place of the result.
        batch: places of the other arguments that are split by rows: the data.
        groups: places of state whose first dimension is the groups of devices along `data`, each of which has its own.
    """

    state: tuple[int, ...]
    becomes: tuple[int, ...]
    batch: tuple[int, ...]
    groups: tuple[int, ...] = ()


class Dims:
    """The classes of a graph's dimensions, and what each is.

    Attributes:
        stacked: classes that loops go through one by one (stacked layers).
        rows: the classes of the first dimensions of data.
        groups: those of the first dimensions of what each group along `data` has its own of.
        columns: those of its other dimensions, which rows' activations have too: a sequence's length.
        weights: classes of weights' dimensions that activations have too, the larger of what they multiply first.
        stored: values that are split as weights and the optimizer's state lie.
    """

    def __init__(self, graph: Graph, roles: Roles):
        self.graph, self.roles = graph, roles
        self._first = [0]
        for shape in graph.shapes:
            self._first.append(self._first[-1] + len(shape))
        self._parent = list(range(self._first[-1]))
        self._loose: set[int] = set()
        for a, b in graph.ties:
            if graph.shapes[a] == graph.shapes[b] and not {a, b} & graph.closed:
                for d in range(len(graph.shapes[a])):
                    self._join(self._first[a] + d, self._first[b] + d)
        for a, b in graph.parts:
            for d in range(len(graph.shapes[a]) if not {a, b} & graph.closed else 0):
                self._join(self._first[a] + d, self._first[b] + d)
        for op in graph.ops:
            if op.rule is not None:
                self._join_factors(op)
        self.classes: list[list[int]] = [
            [self._find(self._first[v] + d) for d in range(len(shape))] for v, shape in enumerate(graph.shapes)
        ]
        self.stored = self._stored()
        self.stacked = self._stacked()
        state = [graph.arguments[i] for i in roles.state]
        data = [graph.arguments[i] for i in roles.batch]
        self.rows = tuple(dict.fromkeys(classes[0] for v in data if (classes := self.classes[v])))
        of_state = {c for v in state for c in self.classes[v]}
        self.groups = tuple(dict.fromkeys(self.classes[graph.arguments[i]][0] for i in roles.groups))
        columns = dict.fromkeys(
            c for v in data for c, n in zip(self.classes[v][1:], graph.shapes[v][1:], strict=True) if n > 1
        )
        self.columns = tuple(c for c in columns if c not in self.rows and c not in of_state)
        self.weights = self._of_weights(state)

    def place(self, dim_class: int) -> tuple[int, int] | None:
        """An argument and a dimension of it that a class is found at, the first; None where no argument has it."""
        return self._places.get(dim_class)

    def at(self, place: tuple[int, int]) -> int:
        """The class of an argument's dimension."""
        return self.classes[self.graph.arguments[place[0]]][place[1]]

    @functools.cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        for number, value in enumerate(self.graph.arguments):
            for d, c in enumerate(self.classes[value]):
                found.setdefault(c, (number, d))
        return found

    def _find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def _join(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def _join_factors(self, op: Op) -> None:
        rule, first = op.rule, {}
        assert rule is not None
        if op.kind == "broadcast_in_dim":  # what is repeated along a dimension is many arrays' at once
            given = {f for dims in rule.operands for factors in dims for f in factors}
            (result,) = op.results
            self._loose.update(self._first[result] + d for d, f in enumerate(rule.results[0]) if not given & {*f})
        for values, arrays in ((op.operands, rule.operands), (op.results, rule.results)):
            for value, dims in zip(values, arrays, strict=True):
                for d, factors in enumerate(dims):
                    if value in self.graph.closed or len(factors) == 0:
                        continue
                    size = rule.sizes[factors[0]]
                    if size == 1 or self.graph.shapes[value][d] == 1:
                        continue
                    whole = len(factors) > 1 or self.graph.shapes[value][d] == size
                    if whole or factors[0] in rule.shifted:
                        here = self._first[value] + d
                        if here in self._loose:
                            continue
                        self._join(first.setdefault(factors[0], here), here)

    def _stored(self) -> frozenset[int]:
        """Values made of weights and state alone, and those that become the next, up to what first computes them."""
        graph = self.graph
        found = {graph.arguments[i] for i in self.roles.state if graph.shapes[graph.arguments[i]]}
        ties: dict[int, list[int]] = {}
        for a, b in (*graph.ties, *graph.parts):
            ties.setdefault(a, []).append(b)
            ties.setdefault(b, []).append(a)
        for value in list(found):
            self._tied(value, found, ties)
        self._follow(found, ties)
        waiting = [graph.returned[i] for i in self.roles.becomes]
        while waiting:
            value = waiting.pop()
            if not graph.shapes[value]:
                continue
            for tied in [value, *ties.get(value, ())]:
                is_new = tied not in found or tied == value
                self._tied(tied, found, ties)
                producer = graph.producers[tied]
                if is_new and producer >= 0 and self._keeps(graph.ops[producer]):
                    op = graph.ops[producer]
                    waiting += [v for v in op.operands if v not in found and v not in graph.closed and graph.shapes[v]]
                    found.update(op.results)
            for tied in ties.get(value, ()):
                for other in [tied, *ties.get(tied, ())]:
                    producer = graph.producers[other]
                    if producer >= 0 and self._keeps(graph.ops[producer]):
                        waiting += [
                            v
                            for v in graph.ops[producer].operands
                            if v not in found and v not in graph.closed and graph.shapes[v]
                        ]
        self._follow(found, ties)  # what is made of gradients too, as their norm
        return frozenset(found)

    def _follow(self, found: set[int], ties: dict[int, list[int]]) -> None:
        """Adds what is made of stored values alone."""
        graph = self.graph
        for op in graph.ops:  # operands come before their operation
            arrays = [v for v in op.operands if graph.shapes[v] and v not in graph.closed]
            if self._keeps(op) and arrays and all(v in found for v in arrays):
                for result in op.results:
                    self._tied(result, found, ties)

    def _keeps(self, op: Op) -> bool:
        """Whether what an operation gives lies as what it takes: by place, and not repeated."""
        repeats = op.kind == "broadcast_in_dim" and self.graph.bytes(op.results[0]) > self.graph.bytes(op.operands[0])
        return op.kind in _BY_PLACE and not (repeats and self.graph.shapes[op.operands[0]])

    def _tied(self, value: int, found: set[int], ties: dict[int, list[int]]) -> None:
        waiting = [value]
        while waiting:
            here = waiting.pop()
            found.add(here)
            waiting += [v for v in ties.get(here, ()) if v not in found and v not in self.graph.closed]

    def _stacked(self) -> frozenset[int]:
        found = set()
        for op in self.graph.ops:
            if op.kind == "dynamic_slice" and op.operands[0] in self.stored:
                shapes = self.graph.shapes[op.operands[0]], self.graph.shapes[op.results[0]]
                classes = self.classes[op.operands[0]]
                found.update(c for c, n, k in zip(classes, *shapes, strict=True) if k < n)
        return frozenset(found)

    def _of_weights(self, state: Sequence[int]) -> tuple[int, ...]:
        of_state = {c for v in state if len(self.classes[v]) > 1 for c in self.classes[v]}
        not_weights = {*self.stacked, *self.rows, *self.columns}
        weight: dict[int, float] = {}
        for op in self.graph.ops:
            for v in op.operands if op.flops else ():
                for c in set(self.classes[v]) & of_state - not_weights:
                    weight[c] = weight.get(c, 0.0) + op.flops * self.graph.counts[op.region]
        return tuple(sorted(weight, key=lambda c: -weight[c]))


def roles_of(
    state: Collection[int], becomes: Sequence[int], batch: Collection[int], groups: Collection[int] = ()
) -> Roles:
    """Roles in order of arguments."""
    pairs = sorted(zip(state, becomes, strict=True))
    return Roles(tuple(p for p, _ in pairs), tuple(b for _, b in pairs), tuple(sorted(batch)), tuple(sorted(groups)))
