"""What a layout costs: seconds, bytes of memory, and every exchange, with the operation that makes it.

Operations run at a share of the chip's peak, what is fused moves no bytes, exchanges of weights run beside what computes, those
of activations do not. Every layout is priced by the same model, so that their order counts and not the seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kpx.hardware.target import Target
from kpx.passes import ring_products, scattered_sums
from kpx.sharding.dims import Dims
from kpx.sharding.exchange import Between
from kpx.sharding.fabric import Fabric
from kpx.sharding.graph import TO_DEVICE, TO_HOST, Op
from kpx.sharding.in_memory import materialized, roots
from kpx.sharding.layout import Axes, Layout, Sharding

_UNKNOWN = (1e11, 2e10)  # FLOP/s and bytes/s of a device that the table does not have
_EFFICIENCY = 0.8  # of the peak, for large products
_HOST = 1e10  # bytes/s between a device and its host's memory: a cautious guess
_MANY, _SMALL = 64, 1 << 24  # devices, and bytes
_TILE = 128  # what a matrix unit multiplies at once


@dataclass(frozen=True)
class Exchange:
    """An exchange between devices, as a plan foresees it.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        axes: the mesh axes along which it goes.
        bytes: what a device has of the gathered, reduced or exchanged array once, whole.
        count: how often a step makes it.
        seconds: of all of them.
        overlaps: whether it can run beside computation (weights and their gradients).
        path: the names of the operation that makes it.
    """

    kind: str
    axes: Axes
    bytes: float
    count: int
    seconds: float
    overlaps: bool
    path: str


@dataclass
class Price:
    """What a layout costs.

    Attributes:
        seconds: of a step.
        compute_seconds: of what is computed and moved in memory.
        memory_bytes: the most that a device holds.
        argument_bytes: of that, arguments.
        exchanges: all of them.
    """

    seconds: float
    compute_seconds: float
    memory_bytes: float
    argument_bytes: float
    exchanges: list[Exchange]

    def by_axis(self) -> dict[Axes, dict[str, tuple[float, float]]]:
        """Of each group of axes, by kind: bytes and seconds of a step."""
        found: dict[Axes, dict[str, tuple[float, float]]] = {}
        for e in self.exchanges:
            size, seconds = found.setdefault(e.axes, {}).get(e.kind, (0.0, 0.0))
            found[e.axes][e.kind] = (size + e.bytes * e.count, seconds + e.seconds)
        return found


class Pricing:
    """Prices layouts of one graph on one target; what does not depend on the layout is found once."""

    def __init__(self, dims: Dims, target: Target, between: Between | None = None):
        self.dims, self.graph, self.target, self.between = dims, dims.graph, target, between
        chip = target.spec
        if chip is not None:
            self._bandwidth, self._peak = chip.bandwidth, chip.peak
        else:
            # Not measured: every process of a job must find the same plan.
            self._bandwidth, self._peak = _UNKNOWN[1], lambda element: _UNKNOWN[0]
        self.rings = ring_products.FEATURE in target.features
        self._roots = roots(self.graph)
        self._held = materialized(self.graph)
        self._last = self._last_uses()
        # What a step gives back takes the place of what it was given.
        self._donated = frozenset(self.graph.returned[place] for place in dims.roles.becomes)

    def price(self, layout: Layout) -> Price:
        """The price of a layout."""
        return _Run(self, layout, Fabric(self.target, layout.mesh)).price()

    def memory(self, layout: Layout) -> float:
        """The most that a device holds under a layout, whose mesh may be of more devices than the target has."""
        run = _Run(self, layout, None)
        run.walk()
        return run.memory()

    def ways(self, layout: Layout) -> dict[int, Way]:
        """How each operation is split under a layout, by its number."""
        run = _Run(self, layout, Fabric(self.target, layout.mesh))
        run.walk()
        return run.ways

    def carried_bytes(self, layout: Layout) -> float:
        """Of what goes from layer to layer, on a device: what loops carry that has the batch's rows first."""
        found = 0.0
        for number, op in enumerate(self.graph.ops):
            if op.kind == "while":
                body = self.graph.regions[self.graph.bodies[number][-1]]
                here = sum(
                    layout.bytes(v)
                    for v in body.arguments
                    if v not in self.dims.stored
                    and self.dims.classes[v][:1]
                    and self.dims.classes[v][0] in self.dims.rows
                )
                found = max(found, here)
        return found

    def _last_uses(self) -> dict[int, int]:
        """Of each array in memory, the last operation of its own region that needs it; arrays that are given back never end."""
        graph, last = self.graph, {}
        holders = {}  # the operation, in each region around, that a region belongs to
        for number, inner in graph.bodies.items():
            for region in inner:
                holders[region] = number
        for number, op in enumerate(graph.ops):
            for value in op.operands:
                for root in self._needed(value):
                    home, at = self._region_of(root), number
                    while graph.ops[at].region != home and graph.ops[at].region in holders:
                        at = holders[graph.ops[at].region]
                    last[root] = max(last.get(root, -1), at)
        return last

    @functools.cache  # noqa: B019  (lives as long as the planning)
    def _needed(self, value: int) -> tuple[int, ...]:
        """The arrays in memory that a value is read from: itself, or those that it is computed of on the way."""
        root = self._roots[value]
        producer = self.graph.producers[root]
        if root in self._held or producer < 0:
            return (root,)
        found: dict[int, None] = {}
        for operand in self.graph.ops[producer].operands:
            found |= dict.fromkeys(self._needed(operand))
        return tuple(found)

    @functools.cache  # noqa: B019
    def _region_of(self, value: int) -> int:
        producer = self.graph.producers[value]
        if producer >= 0:
            return self.graph.ops[producer].region
        return next((n for n, r in enumerate(self.graph.regions) if value in r.arguments), 0)


@dataclass
class _Time:
    """What a region takes, each time that it runs."""

    compute: float = 0.0
    beside: float = 0.0
    exposed: float = 0.0


@dataclass(frozen=True)
class Sent:
    """What one operation sends, as `Exchange` has it; `is_sum`: it makes a sum of parts, which may wait for others."""

    kind: str
    axes: Axes
    bytes: float
    overlaps: bool
    is_sum: bool = False


@dataclass
class Way:
    """A way to split an operation.

    Attributes:
        axes: of its factors.
        operands, results: how each array lies for it.
        sent: what is sent for that.
        gathered: bytes of operands that are brought, by value, how it lies then, and region.
        sizes: bytes of its arrays.
    """

    axes: dict[int, Axes]
    operands: list[Sharding] = field(default_factory=list)
    results: list[Sharding] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    gathered: dict[tuple[int, Sharding, int], float] = field(default_factory=dict)
    sizes: list[float] = field(default_factory=list)


class _Run:
    def __init__(self, pricing: Pricing, layout: Layout, fabric: Fabric | None):
        self.p, self.layout, self.graph, self.fabric = pricing, layout, pricing.graph, fabric
        self.ways: dict[int, Way] = {}
        # Sums whose parts are still to be exchanged, the operation that made the first, and the FLOPs of all that are added.
        self.pending: dict[int, tuple[tuple[Sent, ...], Op, float]] = {}
        self.exchanges: list[Exchange] = []
        self.gathered: dict[tuple[int, Sharding, int], float] = {}
        self.buffers: dict[int, float] = {}  # what an operation holds beside its operands and results
        self.times = [_Time() for _ in self.graph.regions]

    def walk(self) -> None:
        for number, op in enumerate(self.graph.ops):
            if op.rule is not None:
                self._op(number, op)
            for value in () if op.rule is not None else op.operands:
                self._flush(value)
        for value in list(self.pending):
            self._flush(value)
        if self.p.between is not None and self.layout.mesh.get(Between.axis, 1) > 1:
            self._between(self.p.between)

    def _between(self, between: Between) -> None:
        """What groups exchange of their gradients, after the backward pass."""
        graph, parts = self.graph, []
        for value in (graph.arguments[place] for place in between.weights):
            split = zip(graph.shapes[value], self.layout.of(value), strict=True)
            parts.append(tuple(math.ceil(n / self.layout.parts(axes)) for n, axes in split))
        for kind, size in between.sent(parts):
            seconds = self._seconds(Sent(kind, (Between.axis,), size, False))
            self.exchanges.append(Exchange(kind, (Between.axis,), size, 1, seconds, False, "gradients between groups"))
            self.times[0].exposed += seconds

    def price(self) -> Price:
        self.walk()
        for region in range(len(self.graph.regions) - 1, 0, -1):
            parent, time = self.times[self.graph.regions[region].parent], self.times[region]
            parent.exposed += (max(time.compute, time.beside) + time.exposed) * self.graph.regions[region].trips
        whole = self.times[0]
        compute = sum(t.compute * n for t, n in zip(self.times, self.graph.counts, strict=True))
        arguments = sum(map(self._held_bytes, self.graph.arguments))
        memory = self.memory()
        return Price(max(whole.compute, whole.beside) + whole.exposed, compute, memory, arguments, self.exchanges)

    # What an operation costs ----------------------------------------------------------------------

    def _op(self, number: int, op: Op) -> None:
        rule, layout, graph = op.rule, self.layout, self.graph
        assert rule is not None
        if op.kind in (TO_HOST, TO_DEVICE):
            self.times[op.region].beside += layout.bytes(op.operands[0]) / _HOST
        is_stored = all(v in self.p.dims.stored for v in op.results) and not op.flops and not rule.reduced
        if is_stored:
            self._settle(op, Way({}))
            if any(r in self.p._held for r in op.results):
                self._moves(op, [layout.bytes(v) for v in (*op.operands, *op.results) if graph.shapes[v]])
            return
        if op.kind in ("mixture", "mixture_gradient"):
            self._mixture(number, op)
            return
        results = [*zip(op.results, rule.results, strict=True)]
        operands = [*zip(op.operands, rule.operands, strict=True)]
        ways = [self._way(op, [*results, *operands])]
        if rule.reduced and (other := self._way(op, [*operands, *results])).axes != ways[0].axes:
            ways.append(other)
        # A table may stay where it lies, and rows be brought to it; along several axes partitioners gather the rows whole.
        if op.kind in ("gather", "scatter") and layout.storage and sum(n > 1 for n in layout.mesh.values()) == 1:
            ways.append(self._way(op, [*results, *operands], stays=True))
        if op.kind == "reduce" and not op.group and op.operands[0] in self.p.dims.stored:  # a norm of gradients, say
            ways.append(self._way(op, [*operands, *results], stays=True))
        way = min(ways, key=lambda way: sum(self._seconds(s) for s in way.sent))
        self.ways[number] = way
        self._settle(op, way)
        self.gathered |= way.gathered
        self.buffers[number] = self.buffers.get(number, 0.0) + sum(way.gathered.values())
        if op.flops:
            self._computes(op, layout.parts([a for found in way.axes.values() for a in found]), way.axes)
        if not op.group and (op.flops or any(r in self.p._held for r in op.results)):
            self._moves(op, way.sizes)

    def _mixture(self, number: int, op: Op) -> None:
        """A mixture of experts: rows lie as they do, and go to their experts and back along the experts' axis."""
        rule, layout, graph = op.rule, self.layout, self.graph
        assert rule is not None
        x, gate = op.operands[0], op.operands[2]
        of_rows, of_experts = layout.used(x)[:-1], layout.used(gate)[0]
        axes = {f[0]: a for f, a in zip(rule.operands[0][:-1], of_rows, strict=True)}
        axes[rule.operands[2][0][0]] = of_experts
        way = Way(axes)
        for value, dims in zip(op.operands, rule.operands, strict=True):
            wanted = _joined(dims, axes)
            way.operands.append(wanted)
            self._brought(way, op, value, layout.of(value), wanted)
        split = tuple(a for found in of_rows for a in found)
        copies = op.flops / (
            6.0 * math.prod(graph.shapes[gate][1:]) * math.prod(graph.shapes[x][:-1])
        )  # top_k, or thrice that
        if of_experts:
            sent = layout.bytes(x, _joined(rule.operands[0], axes)) * (copies if op.kind == "mixture" else copies / 3)
            way.sent += [Sent("all-to-all", of_experts, sent, False)] * 2
        partial = tuple(a for a in split if a not in of_experts) if rule.reduced else ()
        for place, (value, dims) in enumerate(zip(op.results, rule.results, strict=True)):
            made = _joined(dims, axes)
            way.results.append(made)
            self._summed(way, value, made, partial if place >= 2 else (), False)
        self.ways[number] = way
        self._settle(op, way)
        self.gathered |= way.gathered
        self.buffers[number] = sum(way.gathered.values()) + 3 * copies * layout.bytes(x)
        peak = self.p._peak(_element(op.element)) * _EFFICIENCY
        self.times[op.region].compute += op.flops / layout.parts(split) / peak

    def _way(self, op: Op, order: list, stays: bool = False) -> Way:
        """One way to split an operation: axes go to the factors of the first arrays first.

        Args:
            stays: first of all to those of weights, as they lie.
        """
        rule, layout, graph = op.rule, self.layout, self.graph
        assert rule is not None
        way = Way(self._factor_axes(op, order, stays))
        for value, dims in zip(op.operands, rule.operands, strict=True):
            wanted = _joined(dims, way.axes)
            way.operands.append(wanted)
            if graph.shapes[value]:
                self._brought(way, op, value, layout.of(value), wanted)
                way.sizes.append(layout.bytes(value, wanted))
        partial = tuple(a for f in sorted(rule.reduced) for a in way.axes.get(f, ()))
        for value, dims in zip(op.results, rule.results, strict=True):
            made = _joined(dims, way.axes)
            way.results.append(made)
            way.sizes.append(layout.bytes(value, made))
            # Parts of what is scattered are summed along all axes together where more than rows are split.
            several = sum(bool(way.axes.get(f)) for f in rule.reduced) > 1 or bool(_all(made))
            at_once = op.kind == "scatter" and several and scattered_sums.FEATURE not in self.p.target.features
            self._summed(way, value, made, partial, at_once)
        return way

    def _factor_axes(self, op: Op, order: list, stays: bool) -> dict[int, Axes]:
        """Over which axes each factor of an operation is split."""
        rule, layout = op.rule, self.layout
        assert rule is not None
        found: dict[int, Axes] = {}
        taken: set[str] = set()
        for value, dims in order if stays else ():
            for factors, axes in zip(dims, layout.of(value), strict=True):
                if value in self.p.dims.stored and axes and factors and factors[0] not in rule.whole | found.keys():
                    found[factors[0]] = axes
                    taken.update(axes)
        for value, dims in order:
            for d, factors in enumerate(dims):
                if not factors or factors[0] in found or factors[0] in rule.whole:
                    continue
                split = layout.split_of(value, d)
                size = rule.sizes[factors[0]]
                axes = layout.fitting(size, [a for a in split if a not in taken]) if split else ()
                found[factors[0]] = axes
                taken.update(axes)
        return found

    def _brought(self, way: Way, op: Op, value: int, has: Sharding, wanted: Sharding) -> None:
        """Exchanges that bring an operand to where an operation needs it."""
        key = (value, wanted, self._round(op))
        if has == wanted or key in self.gathered or key in way.gathered:
            return
        is_weight = value in self.p.dims.stored
        lost = [(d, a) for d, axes in enumerate(has) for a in axes if a not in wanted[d]]
        if not lost:
            return
        moved = [(d, a) for d, a in lost if any(a in axes for axes in wanted)]
        gathered = tuple(a for d, a in lost if (d, a) not in moved)
        # What an operation splits further is split once it is here.
        size = self.layout.bytes(value, wanted) * self.layout.parts([a for a in _all(wanted) if a not in _all(has)])
        if moved:
            way.sent.append(Sent("all-to-all", tuple(a for _, a in moved), size, is_weight))
        if gathered:
            way.sent.append(Sent("all-gather", gathered, size, is_weight))
        in_turn = op.group and set(gathered) <= {"context"}
        way.gathered[key] = size / self.layout.parts(gathered) if in_turn else size

    def _round(self, op: Op) -> int:
        """Within what an array is brought once: a region; but a lookup's table apart from that of a product with it, and a kernel
        whose sequence is split sends in each of its passes."""
        if op.group and self.layout.mesh.get("context", 1) > 1:
            return -1 - len(self.graph.regions) - op.results[0]
        apart = op.kind == "gather" and self.p.target.platform != "tpu"  # whose compiler gathers it once for both
        return -1 - op.region if apart else op.region

    def _summed(self, way: Way, value: int, made: Sharding, partial: Axes, at_once: bool) -> None:
        """Exchanges that make a result whole of the parts of a sum, and bring it to where it lies.

        Args:
            at_once: parts are summed along all axes together, and not along those of storage first.
        """
        has = self.layout.of(value)
        size = self.layout.bytes(value, made)
        is_weight = value in self.p.dims.stored
        if partial:
            scattered = tuple(a for a in partial if a in _all(has) and a not in _all(made))
            rest = tuple(a for a in partial if a not in scattered)
            if at_once and scattered and self.layout.parts(rest) > 1:
                scattered, rest = (), partial
            if scattered:
                way.sent.append(Sent("reduce-scatter", scattered, size, is_weight, is_sum=True))
                size /= self.layout.parts(scattered)
            if rest:
                way.sent.append(Sent("all-reduce", rest, size, is_weight, is_sum=True))
            made = has if scattered or at_once else made
        lost = [(d, a) for d, axes in enumerate(made) for a in axes if a not in has[d]]
        moved = tuple(a for _, a in lost if a in _all(has))
        if moved:
            way.sent.append(Sent("all-to-all", moved, self.layout.bytes(value, made), is_weight))
        if gathered := tuple(a for _, a in lost if a not in moved):
            way.sent.append(Sent("all-gather", gathered, self.layout.bytes(value, has), is_weight))

    def _seconds(self, sent: Sent) -> float:
        axes = [a for a in self.layout.mesh if a in sent.axes and self.layout.mesh[a] > 1]
        if not axes or not sent.bytes:
            return 0.0
        return sent.bytes if self.fabric is None else self.fabric.seconds(self._kind(sent), sent.bytes, axes)

    def _kind(self, sent: Sent) -> str:
        """What an exchange becomes. Among many devices libtpu (0.0.42) makes a sum of all of much: of what is scattered, unless it is
        given so (see `kpx.passes.scattered_sums`), of what is small and of what lies along three dimensions of a torus."""
        if self.p.target.platform != "tpu" or self.layout.parts(sent.axes) < _MANY:
            return sent.kind
        gathers = sent.kind == "all-gather" and (sent.bytes <= _SMALL or self._dimensions(sent.axes) > 2)
        scatters = sent.kind == "reduce-scatter" and scattered_sums.FEATURE not in self.p.target.features
        return "all-reduce" if gathers or scatters else sent.kind

    def _dimensions(self, axes: Axes) -> int:
        """Along how many dimensions of a torus axes lie."""
        pieces = [] if self.fabric is None else [p for a in axes for p in self.fabric.pieces.get(a, ())]
        return len({p.dimension for p in pieces if p.dimension >= 0 and p.extent > 1})

    def _settle(self, op: Op, way: Way) -> None:
        """Sends what an operation sends. Sums of parts are sent once: compilers add parts before they exchange them."""
        waiting = [self.pending[v] for v in op.operands if v in self.pending]
        sums = tuple(s for s in way.sent if s.is_sum)
        joins = len(waiting) == len(op.operands) == 2 and waiting[0][0][-1:] == waiting[1][0][-1:]
        moves = len(waiting) == 1 and op.kind in ("reshape", "transpose", "negate")
        if (joins and op.kind == "add") or moves:
            for value in op.operands:
                self.pending.pop(value, None)
            common = waiting[0][0] if len({sums for sums, *_ in waiting}) == 1 else waiting[0][0][-1:]
            for apart, maker, flops in waiting:
                for sent in apart[: len(apart) - len(common)]:
                    self._send(sent, maker, flops)
            self.pending[op.results[0]] = (common, waiting[0][1], sum(flops for *_, flops in waiting))
        else:
            for value in op.operands:
                self._flush(value)
        for sent in way.sent:
            if not sent.is_sum:
                self._send(sent, op)
        # What scatter makes is not added to others' parts, but by libtpu where it is as whole as they are.
        on_tpu, is_split = self.p.target.platform == "tpu", any(map(_all, way.results))
        if op.kind == "scatter" and (is_split or (len(sums) > 1 and not on_tpu)):
            for sent in (alone := [s for s in sums if on_tpu or s.kind == "reduce-scatter"]):
                self._send(sent, op)
            sums = tuple(s for s in sums if s not in alone)
        if sums and len(op.results) == 1 and len(self.graph.users[op.results[0]]) == 1:
            self.pending[op.results[0]] = (sums, op, op.flops)
        else:
            for sent in sums:
                self._send(sent, op, op.flops)

    def _flush(self, value: int) -> None:
        if value in self.pending:
            sums, op, flops = self.pending.pop(value)
            for sent in sums:
                self._send(sent, op, flops)

    def _send(self, sent: Sent, op: Op, flops: float = 0.0) -> None:
        axes = tuple(a for a in self.layout.mesh if a in sent.axes and self.layout.mesh[a] > 1)
        if self.p.between is not None and sent.overlaps and Between.axis in axes:  # gradients, apart
            axes = tuple(a for a in axes if a != Between.axis)
            sent = dataclasses.replace(sent, axes=axes)
        if not axes or not sent.bytes:
            return
        count, time = self.graph.counts[op.region], self.times[op.region]
        for kind, size, times, overlaps in self._legs(sent, axes, op, flops):
            seconds = times * (0.0 if self.fabric is None else self.fabric.seconds(kind, size, axes))
            self.exchanges.append(Exchange(kind, axes, size, count * times, seconds * count, overlaps, op.path))
            if overlaps:
                time.beside += seconds
            else:
                time.exposed += seconds

    def _legs(self, sent: Sent, axes: Axes, op: Op, flops: float) -> list[tuple[str, float, int, bool]]:
        """Of what goes one after another for an exchange: kind, bytes, how often, and whether beside computation."""
        kind, size, parts = self._kind(sent), sent.bytes, self.layout.parts(axes)
        if op.group and set(axes) <= {"context"} and kind != "all-reduce":  # a kernel's ring: each part in turn
            wider = 4 / self.graph.itemsizes[op.results[0]] if sent.is_sum else 1.0  # sums go round in f32
            return [("collective-permute", size / parts * wider, parts, True)]
        devices = math.prod(self.layout.mesh.values())
        goes_round = sent.is_sum and not sent.overlaps and axes == (ring_products.AXIS,) and kind == "all-reduce"
        if goes_round and self.p.rings and flops / devices / parts >= ring_products.LEAST:
            return [("collective-permute", size / parts, parts - 1, True), ("all-gather", size, 1, False)]
        return [(kind, size, 1, sent.overlaps)]

    def _computes(self, op: Op, parts: int, axes: Mapping[int, Axes]) -> None:
        rule = op.rule
        assert rule is not None
        waste = 1.0
        if op.kind == "dot_general" and len(op.results) == 1:
            sides = [{f for dims in arrays for f in dims} for arrays in rule.operands[:2]]
            groups = [sides[0] - sides[1], sides[1] - sides[0], set(rule.reduced)]
            for group in groups:
                n = 1
                for f in group:
                    n *= math.ceil(rule.sizes[f] / self.layout.parts(axes.get(f, ())))
                waste *= math.ceil(n / _TILE) * _TILE / n if n > 8 else 1.0
        peak = self.p._peak(_element(op.element)) * _EFFICIENCY
        self.times[op.region].compute += op.flops / parts * waste / peak

    def _moves(self, op: Op, sizes: list[float]) -> None:
        if op.kind in ("dynamic_update_slice", "reshape", "optimization_barrier"):
            sizes = [2 * min(sizes)] if op.kind == "dynamic_update_slice" else []
        self.times[op.region].compute += sum(sizes) / self.p._bandwidth

    # Memory ---------------------------------------------------------------------------------------

    def _held_bytes(self, value: int) -> float:
        """Of a value, in a device's own memory."""
        return 0.0 if value in self.graph.on_host else self.layout.bytes(value)

    def memory(self) -> float:
        """The most that a device holds: arguments, and what is live beside them, loops' bodies included."""
        arguments = sum(map(self._held_bytes, self.graph.arguments))
        graph, pricing = self.graph, self.p
        by_region: list[list[int]] = [[] for _ in graph.regions]
        for number, op in enumerate(graph.ops):
            by_region[op.region].append(number)
        given = {v for region in graph.regions for v in region.arguments if pricing._roots[v] == v}
        ending: dict[int, list[int]] = {}
        for root, at in pricing._last.items():
            ending.setdefault(at, []).append(root)
        returned = {pricing._roots[v] for region in graph.regions for v in region.returned}

        def peak(region: int) -> float:
            live, most, here = 0.0, 0.0, set()
            for number in by_region[region]:
                op = graph.ops[number]
                for value in op.results:
                    root = pricing._roots[value]
                    is_new = root == value and value in pricing._held and value not in given
                    if is_new and value not in pricing._donated:
                        live += self._held_bytes(value)
                        here.add(value)
                inner = max((peak(body) for body in graph.bodies.get(number, ())), default=0.0)
                most = max(most, live + inner + self.buffers.get(number, 0.0))
                for root in ending.get(number, ()):
                    if root in here and root not in returned:
                        live -= self._held_bytes(root)
                        here.discard(root)
            return most

        return arguments + peak(0)


def _joined(dims: tuple[tuple[int, ...], ...], axes: Mapping[int, Axes]) -> Sharding:
    return tuple(axes.get(factors[0], ()) if factors else () for factors in dims)


def _all(sharding: Sharding) -> set[str]:
    return {a for axes in sharding for a in axes}


def _element(element: str) -> str:
    return "f8" if element.startswith("f8") else element
