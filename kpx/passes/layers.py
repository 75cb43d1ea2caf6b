"""Layers that follow each other and are alike: found, and held as calls of one layer, which is a module of its own.

A model of N layers comes as N copies of one layer's ops. Where they are alike but for the weights they read, a call takes
the place of each, and the layer is rewritten once. `kpx.passes.rolled` has a loop run it, or puts its ops back.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kpx.ir import module as m
from kpx.ir.module import Value, func, ir, stablehlo
from kpx.ir.pattern import is_closed
from kpx.ir.rewrite import is_pure
from kpx.ir.split import depends_on_weights_alone, mark_weights
from kpx.passes import loops

CALL = "kpx.layer"
"""What the name of a call that stands for a layer begins with."""

LEAST = 4
"""Fewer layers are left as they are, whatever is asked for."""

WORTHWHILE = 16
"""Fewer layers compile as fast one by one."""

_LEAST_OPS = 8  # of a layer: less is compiled in no time
_PERIODS = 24  # distances between equal ops that are tried
_PHASES = 4  # places where a layer may begin that are tried


@dataclass
class Stack:
    """Layers that are alike.

    Attributes:
        name: of the calls that stand for them.
        count: how many there are.
        ops: how many a layer has.
        layer: a module whose `main` takes what the layer before gives, what is the same for all layers, and what is
            each layer's own, in this order. It gives what the next one takes, then what else is read of the last.
        carried: how many arguments a layer takes from the one before.
        shared: how many are the same for all.
        paths: of names, one for each layer: `encoder/layer/3`. The module's names are those of the second.
    """

    name: str
    count: int
    ops: int
    layer: ir.Module
    carried: int
    shared: int
    paths: list[str]


def take_out(module: ir.Module, least: int = LEAST) -> list[Stack]:
    """Puts a call in place of each layer of those that are alike, in place; gives the layers, if there are so many.

    Taken are layers whose own arrays are weights, and of which nothing is read but what the last one gives. Those with
    convolutions are not: how what these read lies in memory is decided for all of them together.
    """
    ops = list(m.entry_block(m.main(module)).operations)
    place, found = _Place(ops), []
    with module.context, ir.Location.unknown():
        for wide in runs([_label(op) for op in ops], least):
            parts = (_Parts.of(place, run) for run in place.phases(wide) if run.count >= least)
            if (first := next((p for p in parts if p is not None), None)) is not None:
                found.append(_taken(module, first, f"{CALL}.{len(found)}"))
    return found


# Finding ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where layers are: `count` of `period` ops each, from a position in `main`'s block, or from up to `slack` ops later."""

    start: int
    period: int
    count: int
    slack: int = 0

    @property
    def end(self) -> int:
        return self.start + self.period * self.count


def runs(labels: Sequence[Hashable], least: int = LEAST, first: int = 0) -> Iterator[Run]:
    """Where equal stretches of labels follow each other: the longest, and those around it.

    Args:
        least: how often.
        first: the position of the first label.
    """
    numbers: dict[Hashable, int] = {}
    best = _longest(np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64), least)
    if best is not None:
        yield from runs(labels[: best.start], least, first)
        yield replace(best, start=first + best.start)
        yield from runs(labels[best.end + best.slack :], least, first + best.end + best.slack)


def _longest(sequence: np.ndarray, least: int) -> Run | None:
    """The run that spares most ops."""
    best, spared = None, 0
    for period in _periods(sequence):
        equal = np.concatenate([[False], sequence[:-period] == sequence[period:], [False]])
        edges = np.flatnonzero(np.diff(equal.astype(np.int8)))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            count = (end - begin) // period + 1
            if count >= least and (count - 1) * period > spared:
                best, spared = Run(begin, period, count, (end - begin) % period), (count - 1) * period
    return best


def _periods(sequence: np.ndarray) -> list[int]:
    """The distances at which equal labels lie most often."""
    places = collections.defaultdict(list)
    for i, label in enumerate(sequence.tolist()):
        places[label].append(i)
    distances: collections.Counter[int] = collections.Counter()
    for found in places.values():
        for step in range(1, 9):  # how often an op may be in a layer, for one to tell the layer's length
            distances.update(b - a for a, b in zip(found, found[step:], strict=False))
    return [distance for distance, _ in distances.most_common(_PERIODS) if distance >= _LEAST_OPS]


def _label(op: Any) -> Hashable:
    """What is equal in ops that differ in nothing but what they read. MLIR holds equal attributes and types once."""
    operation = op.operation
    attributes = tuple(m.attributes(operation).items())
    types = tuple(o.type for o in op.operands), tuple(r.type for r in op.results)
    return operation.name, attributes, types, tuple(map(_region, operation.regions))


def _region(region: Any) -> Hashable:
    """A region's ops, with what they read by number. One that reads what lies outside is like no other."""
    numbers: dict[Value, int] = {}
    found = []
    for block in region.blocks:
        numbers.update((value, len(numbers) + i) for i, value in enumerate(block.arguments))
        for op in block.operations:
            if len(op.operation.regions) or not all(o in numbers for o in op.operands):
                return object()
            found.append((_label(op), tuple(numbers[o] for o in op.operands)))
            numbers.update((value, len(numbers) + i) for i, value in enumerate(op.results))
    return tuple(found)


class _Place:
    """Where the values of a block are made, and where they are read last."""

    def __init__(self, ops: Sequence[Any]):
        self.ops = ops
        self.made = {result: (i, j) for i, op in enumerate(ops) for j, result in enumerate(op.results)}
        self.last: dict[Value, int] = {}
        for i, op in enumerate(ops):
            for inner in (op, *m.walk(op)):
                self.last.update((value, i) for value in inner.operands)

    def of(self, value: Value, run: Run, layer: int) -> tuple[str, int, int]:
        """Whether what a layer reads is made `here`, in the layer `before`, `far` before it, or `outside`; and by which of
        the layer's ops, as which of its results."""
        i, j = self.made.get(value, (-1, 0))
        begin = run.start + layer * run.period
        if i >= begin:
            return "here", i - begin, j
        if layer and i >= begin - run.period:
            return "before", i - begin + run.period, j
        return ("far" if i >= run.start else "outside"), 0, 0

    def phases(self, run: Run) -> Iterator[Run]:
        """The same layers, begun at other ops: those first where the least is given from one layer to the next."""
        alive = np.zeros(run.period, np.int64)
        middle = run.start + run.count // 2 * run.period
        for i in range(run.start, middle + run.period):
            for result in self.ops[i].results:
                first, last = max(i + 1, middle), min(self.last.get(result, -1), middle + run.period - 1)
                alive[max(first - middle, 0) : max(last - middle + 1, 0)] += 1 + m.size(result)
        for phase in np.argsort(alive, kind="stable")[:_PHASES].tolist():
            yield Run(run.start + phase, run.period, run.count - (phase > run.slack))


# Taking out -------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """What layers at a place read and give.

    Attributes:
        carried: by (op of a layer, its result) that the next layer reads, what the first layer reads in its place.
        shared: what all layers read.
        own: what each layer reads that is its own, by layer.
        read: what is read of the last layer from outside, as (op of the layer, its result).
        operands: what each operand, as (op of a layer, number), is of those: the list's name, and the place in it.
    """

    place: _Place
    run: Run
    carried: dict[tuple[int, int], Value] = field(default_factory=dict)
    shared: list[Value] = field(default_factory=list)
    own: list[tuple[Value, ...]] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    operands: dict[tuple[int, int], tuple[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, place: _Place, run: Run) -> _Parts | None:
        """The parts of layers at a place; None where they are not alike, or more is read of them than may be."""
        parts = cls(place, run)
        for i in range(run.period):
            layers = [parts.op(k, i) for k in range(run.count)]
            if not is_pure(layers[0].operation) or isinstance(layers[0], stablehlo.ConvolutionOp):
                return None
            for j, values in enumerate(zip(*(op.operands for op in layers), strict=True)):
                if (found := parts._take(values)) is None:
                    return None
                parts.operands[i, j] = found
            for j in range(len(layers[0].results)):
                read = [place.last.get(op.results[j], -1) >= run.end for op in layers]
                if any(read[:-1]):
                    return None
                if read[-1]:
                    parts.read.append((i, j))
        weights = all(depends_on_weights_alone(v) for values in parts.own for v in values)
        return parts if parts.own and parts.carried and weights else None

    def op(self, layer: int, i: int) -> Any:
        """An op of a layer."""
        return self.place.ops[self.run.start + layer * self.run.period + i]

    def _take(self, values: Sequence[Value]) -> tuple[str, Any] | None:
        """What the layers read at one place, by layer, is noted and found; None where they are not alike there."""
        first, *others = (self.place.of(value, self.run, k) for k, value in enumerate(values))
        kind, i, j = others[0]
        if any(other != others[0] for other in others) or kind == "far":
            return None
        if kind == "here":
            return ("here", (i, j)) if first == others[0] else None
        if first[0] != "outside":
            return None
        if kind == "before":
            return ("carried", (i, j)) if self.carried.setdefault((i, j), values[0]) == values[0] else None
        if all(value == values[0] for value in values):
            return "shared", _place_of(self.shared, values[0])
        return "own", _place_of(self.own, tuple(values))

    def results(self) -> list[tuple[int, int]]:
        """What a layer gives: what the next one takes, then what else is read."""
        return [*self.carried, *(at for at in self.read if at not in self.carried)]


def _place_of(values: list, value: Any) -> int:
    """A value's place in a list, which it is put into where it is not in it."""
    if value not in values:
        values.append(value)
    return values.index(value)


def _taken(module: ir.Module, parts: _Parts, name: str) -> Stack:
    """Puts calls in place of layers, in place; gives them."""
    run, results = parts.run, parts.results()
    shared = list(dict.fromkeys(leaf for value in parts.shared for leaf in _leaves(value)))
    layer = _module(module, parts, shared)
    given = list(parts.carried.values())
    for k in range(run.count):
        first = parts.op(k, 0)
        with ir.InsertionPoint(first), first.location:
            types = [parts.op(k, i).results[j].type for i, j in results]
            call = stablehlo.CustomCallOp(types, [*given, *shared, *(values[k] for values in parts.own)], name)
        given = list(call.results)[: len(parts.carried)]
    paths = _paths([m.source_path(parts.op(k, 0)) for k in range(run.count)])
    for (i, j), result in zip(results, call.results, strict=True):
        parts.op(run.count - 1, i).results[j].replace_all_uses_with(result)
    for op in reversed(parts.place.ops[run.start : run.end]):
        op.operation.erase()
    return Stack(name, run.count, run.period, layer, len(parts.carried), len(shared), paths)


def _paths(names: Sequence[str]) -> list[str]:
    """The layers' own paths, by those of their first ops: up to the name that tells the first from the second."""
    parts = [name.split("/") for name in names]
    differing = [n for n, (a, b) in enumerate(zip(parts[0], parts[1], strict=False)) if a != b]
    return ["/".join(p[: differing[0] + 1]) for p in parts] if differing else list(names)


def _leaves(value: Value) -> list[Value]:
    """What a layer takes for what all layers read: constants, and what is only repeated, it makes itself, as patterns
    look for it there."""
    if is_closed(value):
        return []
    op = m.producer(value, stablehlo.BroadcastInDimOp) or m.producer(value, stablehlo.ReshapeOp)
    return [value] if op is None else _leaves(op.operand)


def _module(module: ir.Module, parts: _Parts, shared: Sequence[Value]) -> ir.Module:
    """A layer as a module of its own."""
    run, carried = parts.run, list(parts.carried)
    given = [*parts.carried.values(), *shared, *(values[1] for values in parts.own)]
    made = m.copy(module)
    main = m.main(made)
    main.operation.erase()
    with ir.InsertionPoint.at_block_begin(made.body):
        types = [parts.op(1, i).results[j].type for i, j in parts.results()]
        main = func.FuncOp("main", ir.FunctionType.get([v.type for v in given], types))
    block = main.add_entry_block()
    arguments = list(block.arguments)
    inside: dict[Value, Value] = dict(zip(shared, arguments[len(carried) :], strict=False))
    made_here: list[list[Value]] = []
    with ir.InsertionPoint(block):
        sources: dict[str, Any] = {
            "carried": lambda at: arguments[carried.index(at)],
            "shared": lambda n: loops.copied(parts.shared[n], inside),
            "own": lambda n: arguments[len(carried) + len(shared) + n],
            "here": lambda at: made_here[at[0]][at[1]],
        }
        for i in range(run.period):
            op = parts.op(1, i)
            read = [sources[kind](at) for kind, at in (parts.operands[i, j] for j in range(len(op.operands)))]
            copied = op.operation.clone()
            for j, value in enumerate(read):
                copied.operands[j] = value
            made_here.append(list(copied.results))
        func.ReturnOp([made_here[i][j] for i, j in parts.results()])
    weights = {len(carried) + n for n, value in enumerate(shared) if depends_on_weights_alone(value)}
    mark_weights(made, weights | set(range(len(carried) + len(shared), len(given))))
    m.run_passes(made, "symbol-dce")
    return made
