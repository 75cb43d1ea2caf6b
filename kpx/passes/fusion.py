"""Fusion: what a module computes is recognised by patterns, and held as composites until the target is asked."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kpx.ir import cost
from kpx.ir import module as m
from kpx.ir.module import Value, ir, stablehlo
from kpx.ir.pattern import Graph, Matcher, graph_of, is_closed, outline
from kpx.ir.rewrite import Fuel, Report, apply_rewrites, erase_dead
from kpx.kernels import pattern_check
from kpx.kernels import patterns as registry
from kpx.kernels import registry as kernels
from kpx.kernels.patterns import Pattern
from kpx.kernels.selection import Selection, is_recording
from kpx.passes import canonicalize, known_masks, pairs, precision, repeated, skeletons
from kpx.passes.composites import Device, replacement
from kpx.passes.shardings import Shardings
from kpx.passes.spread import Spread, spread_of

# Ops of a match that others may use too, since computing them again costs next to nothing.
_FREE = {"constant", "iota", "convert", "broadcast_in_dim", "reshape"}


@dataclass(frozen=True, eq=False)
class Match:
    """A pattern in a module: its inputs, what it gives, its ops, operands first, and its constants.

    Attributes:
        gain: the bytes of what would not be written to memory and read again.
    """

    pattern: Pattern
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    ops: tuple[Any, ...]
    numbers: dict[str, Any]
    gain: int

    @property
    def base(self) -> Pattern:
        """The pattern, less its gradient."""
        return self.pattern.gradient_of or self.pattern


def fuse(
    module: ir.Module,
    device: Device,
    fuel: Fuel,
    report: Report,
    disabled: frozenset[str] = frozenset(),
    chosen: dict[str, str] | None = None,
) -> collections.Counter[str]:
    """Holds what patterns recognise as composites, in place; each one's decomposition is the ops that it was.

    Where matches overlap, that which saves the most bytes is taken. Patterns whose kernels have no implementation for
    the platform are not looked for. A pattern of somebody else's is compared with its replacement before it is first
    used; where they differ, it is left out, and the report says so.

    In a module that JAX has differentiated, patterns are looked for with their gradients too, and what is found becomes
    its kernels' forward and backward pass at once.

    In a module that is partitioned over a mesh, what is found becomes kernels of one device's part (see `spread_of`).

    Args:
        chosen: takes what is computed at once, or would have been, with the kernels or the reason why not.

    Returns:
        How often each was found and computed at once; the others are composites, and can be counted as such.
    """
    counts: collections.Counter[str] = collections.Counter()
    m.run_passes(module, "cse")  # as in the patterns, one value is made once
    shardings = Shardings(module) if m.partitions(module) > 1 else None
    with module.context, ir.Location.unknown():
        taken: set[Value] = set()
        replaced: dict[Value, Value] = {}
        for match in _described(module, sorted(matches(module, device, disabled), key=lambda m: -m.gain)):
            touched = {r for op in match.ops for r in op.results if not is_free(op)}
            spread = (
                None
                if shardings is None
                else spread_of(match.base, match.inputs, m.producer(match.outputs[0]), shardings)
            )
            if touched & taken or (shardings is not None and spread is None):
                continue
            if not _may_be_used(match, device, report, spread, {} if chosen is None else chosen):
                continue
            if not fuel.burn(match.pattern.name, match.ops[-1]):
                continue
            inputs = [replaced.get(v, v) for v in match.inputs]
            if match.pattern.gradient_of is None and spread is None:
                results = _composite(module, match, inputs)
            elif (results := _spliced(module, device, match, inputs, spread, report)) is None:
                continue
            else:
                counts[match.pattern.label] += 1
            taken |= touched
            for old, new in zip(match.outputs, results, strict=True):
                old.replace_all_uses_with(new)
                replaced[old] = new
    if counts:
        m.inline_calls(module)
    if taken:
        erase_dead(module)
        m.run_passes(module, "cse")
    return counts


def _described(module: ir.Module, matches: list[Match]) -> list[Match]:
    """Matches, and of their masks what is known already; others as they are before they are repeated for heads."""
    masks = {match: match.inputs[match.base.mask] for match in matches if match.base.mask is not None}
    known = known_masks.describe(module, list(masks.values()))
    found = []
    for match in matches:
        if (mask := masks.get(match)) is not None and mask in known:
            match = dataclasses.replace(match, numbers=match.numbers | {"visible": known[mask]})
        elif mask is not None and m.partitions(module) == 1:
            match = _before_broadcast(match, mask)
        found.append(match if m.partitions(module) > 1 else _before_repeated(match))
    return found


def _before_repeated(match: Match) -> Match:
    """A forward match whose keys and values are what was repeated for the heads that share them."""
    if not match.pattern.shared:
        return match
    places = match.pattern.shared
    if (found := repeated.both_unrepeated(*(match.inputs[place] for place in places))) is None:
        return match
    inputs = list(match.inputs)
    for place, value in zip(places, found[0], strict=True):
        inputs[place] = value
    return dataclasses.replace(match, inputs=tuple(inputs), ops=(*found[1], *match.ops))


def _before_broadcast(match: Match, mask: Value) -> Match:
    """A match whose mask is what was repeated along its first dimensions, and lacks those, or has them of size 1."""
    broadcasts: list[Any] = []
    while (op := m.producer(mask, stablehlo.BroadcastInDimOp)) is not None:
        rank = m.rank(op.operand)
        if rank < 2 or m.integers(op.broadcast_dimensions) != [*range(m.rank(mask) - rank, m.rank(mask))]:
            break
        if m.shape(op.operand)[-1] != m.shape(mask)[-1]:
            break
        broadcasts.insert(0, op)
        mask = op.operand
    inputs = list(match.inputs)
    inputs[match.base.mask or 0] = mask
    return dataclasses.replace(match, inputs=tuple(inputs), ops=(*broadcasts, *match.ops))


def _spliced(
    module: ir.Module, device: Device, match: Match, inputs: Sequence[Value], spread: Spread | None, report: Report
) -> list[Value] | None:
    """The results of a match, by its kernels; None where those raise."""
    flops = cost.product_flops(match.ops)
    try:
        return pairs.splice(module, device, match.base, inputs, match.outputs, match.numbers, flops, spread)
    except Exception as error:  # a kernel may be anyone's, and must not stop the model
        report.revert(match.pattern.name, f"it raised {type(error).__name__}: {error}.")
        return None


def _may_be_used(match: Match, device: Device, report: Report, spread: Spread | None, chosen: dict[str, str]) -> bool:
    pattern = match.base
    if match.pattern.name in report.reverted or pattern.name in report.reverted:
        return False
    if not pattern.checked and (failures := pattern_check.verdict(pattern).failures):
        report.revert(pattern.name, f"it is not what it replaces: {failures[0]}.")
        return False
    if match.pattern.gradient_of is None and spread is None:
        return True  # a composite, which is what it was where no kernel takes it
    count = len(pattern.example)
    arrays = tuple(jax.ShapeDtypeStruct(m.shape(v), m.dtype(v)) for v in match.inputs[:count])
    if spread is not None:
        arrays = tuple(map(spread.part, arrays, spread.letters))
    differentiated = match.pattern.gradient_of is not None
    sequence = None if spread is None else spread.sequence
    choice = replacement(pattern, device, arrays, match.numbers, differentiated=differentiated, sequence=sequence)
    if choice.function is None:
        chosen.setdefault(match.pattern.label, choice.label)
    else:
        chosen[match.pattern.label] = choice.label
    return choice.function is not None


def matches(module: ir.Module, device: Device, disabled: frozenset[str]) -> Iterator[Match]:
    """Where patterns are, and where they are with their gradients, which are looked for where a skeleton was found."""
    platform = device.platform
    # On a CPU a module over several devices is canonicalized as elsewhere: its attention may be split along a sequence.
    spelled = "cuda" if platform == "cpu" and m.partitions(module) > 1 else platform
    matcher, differentiated = Matcher(), _is_differentiated(module)
    there, types = set(), set()
    for op in m.walk(m.main(module)):
        there.add(op.operation.name.removeprefix("stablehlo."))
        if isinstance(op, stablehlo.ConvertOp):
            types.add(m.element_type(op.results[0]))
    wanted = [
        p
        for p in registry.patterns()
        if p.name not in disabled
        and (differentiated or not p.with_gradient_alone)
        and (not p.among or not there.isdisjoint(p.among))
        and p.types <= types
    ]
    recognised: dict[tuple[Pattern, int], None] = {}
    largest = _largest_product(module)
    wanted = [
        p
        for p in wanted
        if (asked := _is_asked_for(p, device.selection))
        or (_least_product(p, platform) <= largest and not (differentiated and p.inference_alone))
        if is_of_use(p, platform, asked)
    ]
    candidates = [(p, group) for p in wanted for group in range(len(p.searches))]
    for match in _search(module, matcher, candidates, spelled, recognised):
        if not match.pattern.with_gradient_alone:
            yield match
    if differentiated:
        pairs = [
            (pair, group)
            for p in dict.fromkeys(p for p, _ in recognised)
            for pair in registry.with_gradient(p)
            for group in range(len(pair.searches))
            if (p, group) in recognised or group >= len(p.searches)
        ]
        yield from _search(module, matcher, pairs, spelled, {})


def _largest_product(module: ir.Module) -> int:
    """Of the results of batched products, the largest, by the second of its sizes: scores alone are long twice."""
    largest = 0
    for op in m.walk(m.main(module)):
        if not isinstance(op, stablehlo.DotGeneralOp):
            continue
        batch = len(list(stablehlo.DotDimensionNumbers(op.dot_dimension_numbers).lhs_batching_dimensions))
        rest = sorted(m.shape(op.results[0])[batch:])
        if batch and len(rest) >= 2:
            largest = max(largest, rest[-2])
    return largest


def _search(
    module: ir.Module,
    matcher: Matcher,
    candidates: Sequence[tuple[Pattern, int]],
    platform: str,
    recognised: dict[tuple[Pattern, int], None],
) -> Iterator[Match]:
    """Where patterns are, by groups of their spellings; groups whose skeleton is there, if not the pattern, join those that
    are recognised."""
    by_anchor: dict[str, dict[Any, dict[str, list[tuple[Pattern, int]]]]] = collections.defaultdict(dict)
    for pattern, group in candidates:
        skeleton = _skeleton(pattern, group, platform == "cpu")
        alike = by_anchor[skeleton.anchor].setdefault(skeleton.below, {})
        alike.setdefault(skeleton.bones(), []).append((pattern, group))
    for op in m.walk(m.main(module)):
        if (anchored := by_anchor.get(op.operation.name)) is None:
            continue
        for needed, skeletons_here in anchored.items():
            if not matcher.may_be_at(needed, op.results[0]):
                continue
            for alike in skeletons_here.values():
                if (found := _match(matcher, alike, op, platform, recognised)) is not None:
                    yield found


def _match(
    matcher: Matcher,
    alike: Sequence[tuple[Pattern, int]],
    op: Any,
    platform: str,
    recognised: dict[tuple[Pattern, int], None],
) -> Match | None:
    """The first of patterns with one skeleton that is there, its first output made by an op."""
    skeleton = _skeleton(*alike[0], platform == "cpu")
    count = len(alike[0][0].example)
    for found in matcher.skeletons(skeleton, skeleton.inputs[count:], op):
        recognised |= dict.fromkeys(alike)
        constants = [found.numbers[number] for number in skeleton.inputs[count:]]
        for chosen in found.bindings(_ranks(skeleton.inputs, [pattern for pattern, _ in alike])):
            inputs = tuple(chosen[a] for a in skeleton.inputs[:count])
            for pattern, group in alike:
                numbers = dict(zip(pattern.numbers, constants, strict=True))
                for graph in _graphs(pattern, group, inputs, numbers, platform):
                    for outputs in found.results([graph.types[o] for o in graph.outputs]):
                        ops = matcher.exactly(graph, inputs, outputs)
                        if ops is None or not _is_in_order(pattern, inputs, outputs):
                            continue
                        free = {op.results[0] for op in ops if is_free(op, matcher.is_closed)}
                        if _is_closed(ops, outputs, free):
                            return Match(pattern, inputs, outputs, tuple(ops), numbers, _gain(ops, outputs, free))
    return None


def _graphs(
    pattern: Pattern, group: int, inputs: Sequence[Value], numbers: dict[str, float], platform: str
) -> Iterator[Graph]:
    """The spellings of a group at the types of a module's values, each graph once."""
    if pattern.fixed_ranks and not all(m.rank(v) in _may_have(pattern, place) for place, v in enumerate(inputs)):
        return
    structs = tuple((m.shape(v), m.dtype(v)) for v in inputs)
    wide = any(m.element_type(v).endswith("64") for v in inputs)
    seen = set()
    for spelling in range(len(pattern.searches[group])):
        graph = _exact(pattern, group, spelling, structs, tuple(numbers.items()), wide, platform)
        if graph is not None and graph.nodes not in seen:
            seen.add(graph.nodes)
            yield graph


def _ranks(inputs: Sequence[int], alike: Sequence[Pattern]) -> dict[int, set[int]]:
    """The ranks that inputs of patterns with one skeleton may have."""
    if not all(pattern.fixed_ranks for pattern in alike):
        return {}
    return {
        number: set().union(*(_may_have(p, place) for p in alike))
        for place, number in enumerate(inputs[: len(alike[0].example)])
    }


def _may_have(pattern: Pattern, place: int) -> set[int]:
    """The ranks that an input of a pattern of fixed ranks may have: a cotangent may be alike everywhere, and a slice of a
    stack have a dimension more; a mask may be of positions alone."""
    is_cotangent = pattern.gradient_of is not None and place == len(pattern.gradient_of.example)
    rank = len(pattern.example[place].shape)
    if place == (pattern.gradient_of or pattern).mask:
        return {2, rank}  # one for all, and repeated for batches and heads at once
    return {rank, *([0] if is_cotangent else []), *([rank + 1] if place in pattern.stacked else [])}


def _gain(ops: Sequence[Any], outputs: Sequence[Value], free: set[Value]) -> int:
    return sum(_bytes(r) for op in ops if op.results[0] not in free for r in op.results if r not in outputs)


def _is_closed(ops: Sequence[Any], outputs: Sequence[Value], free: set[Value]) -> bool:
    """Whether nothing outside needs what is between a match's inputs and outputs, which are made in one place."""
    if len({m.producer(v).operation.parent for v in outputs}) > 1:
        return False
    inside = {op.results[0] for op in ops}
    cheap: set[Value] = set()  # what costs next to nothing to compute again from the inputs
    for op in ops:
        if op.results[0] in free and all(o in cheap or o not in inside for o in op.operands):
            cheap.update(op.results)
            continue
        for result in op.results:
            if result in outputs:
                continue
            for user in m.users(result):
                if not len(user.results) or user.results[0] not in inside:
                    return False
    return True


def _is_in_order(pattern: Pattern, inputs: Sequence[Value], outputs: Sequence[Value]) -> bool:
    """Whether what is added to a gradient is there before the first of the gradients, where all will be computed."""
    further = m.producer(inputs[-1]) if pattern.carried else None
    if further is None:
        return True
    gradients = [m.producer(v) for v in outputs[1:]]
    return all(further.operation.is_before_in_block(op.operation) for op in gradients)


def is_free(op: Any, closed: Callable[[Value], bool] = is_closed) -> bool:
    """Whether others may use an op of a match too: it costs next to nothing, or no input decides it (a mask)."""
    return op.operation.name.removeprefix("stablehlo.") in _FREE or all(map(closed, op.operands))


def _bytes(value: Value) -> int:
    dtype = m.dtype(value)
    return m.size(value) * (dtype.itemsize if dtype is not None else 1)


def _composite(module: ir.Module, match: Match, inputs: Sequence[Value]) -> list[Value]:
    """Holds a match as a composite, before the op that made its result."""
    name = registry.PREFIX + match.pattern.name
    symbol = outline(module, name, inputs, match.outputs, match.ops)
    before = m.producer(match.outputs[0])
    attributes = {
        key: ir.StringAttr.get(number) if isinstance(number, str) else ir.FloatAttr.get(ir.F64Type.get(), number)
        for key, number in match.numbers.items()
    }
    with ir.InsertionPoint(before.operation), before.operation.location:
        made = stablehlo.CompositeOp(
            [v.type for v in match.outputs],
            list(inputs),
            name=name,
            composite_attributes=ir.DictAttr.get(attributes),
            decomposition=ir.FlatSymbolRefAttr.get(symbol),
        )
    return list(made.results)


def _is_differentiated(module: ir.Module) -> bool:
    """Whether a product or a sum of a module is one that JAX made when it differentiated."""
    kinds = (stablehlo.DotGeneralOp, stablehlo.ReduceOp)
    return any("transpose(" in m.source_path(op) for op in m.walk(m.main(module)) if isinstance(op, kinds))


def _is_asked_for(pattern: Pattern, selection: Selection) -> bool:
    """Whether more is known, or wanted, of a pattern's kernels than their rules."""
    if is_recording():
        return True
    return bool(selection.kernels) and any(kernel.name in selection.kernels for kernel in _kernels(pattern))


@functools.lru_cache(maxsize=1024)
def is_of_use(pattern: Pattern, platform: str, asked: bool = False) -> bool:
    """Whether every kernel that a pattern's replacement calls has an implementation for a platform.

    Args:
        asked: one that rules never choose will do.
    """
    if pattern.platforms and platform not in pattern.platforms:
        return False
    anything = any(i.target == platform for kernel in kernels.kernels() for i in kernel.implementations)
    if pattern.checked and not anything:
        return False  # kpx's own call kernels: told without tracing them
    return all(
        any(asked or i.prefers is not kernels.where_measured for i in kernel.on_target(platform))
        for kernel in _kernels(pattern)
    )


def _least_product(pattern: Pattern, platform: str) -> int:
    """The size, in two dimensions, that some batched product's result must have for a pattern to gain anything."""
    least = [
        [i.least for i in kernel.on_target(platform) if i.prefers is not kernels.where_measured]
        for kernel in _kernels(pattern)
    ]
    return max((min(each) for each in least if each), default=0)


def _kernels(pattern: Pattern) -> list[kernels.Kernel]:
    names = skeletons.kernels(pattern)
    called = [kernels.find(name) for name in (kernels_of(pattern) if names is None else names)]
    return [kernel for kernel in called if kernel is not None]


def kernels_of(pattern: Pattern) -> list[str]:
    """The names of the kernels that a pattern's replacement calls."""
    jaxpr = jax.make_jaxpr(functools.partial(pattern.replace, **pattern.numbers))(*pattern.example)
    return list(dict.fromkeys(kernel.name for kernel, _, _ in kernels.calls(jaxpr.jaxpr)))


# Patterns as graphs -------------------------------------------------------------------------------


def _skeleton(pattern: Pattern, group: int, on_cpu: bool) -> Graph:
    """What the spellings of a group have in common, at the example; constants are inputs, after the arrays."""
    key = (pattern.alike or pattern, group, on_cpu)
    if key not in _SKELETONS:
        _SKELETONS[key] = skeletons.known(pattern, group, on_cpu) or traced_skeleton(pattern, group, on_cpu)
    return _SKELETONS[key]


_SKELETONS: dict[tuple, Graph] = {}  # of few patterns, which live as long as the process


def traced_skeleton(pattern: Pattern, group: int, on_cpu: bool) -> Graph:
    """A group's skeleton, traced now."""
    search, names = pattern.searches[group][0], list(pattern.numbers)
    count = len(pattern.example)

    def function(*arguments):
        return search(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

    scalars = [jax.ShapeDtypeStruct((), jnp.float32) for _ in names]
    return _graph(
        function, [*pattern.example, *scalars], "cpu" if on_cpu else "cuda"
    )  # those of TPUs differ in conversions


@functools.lru_cache(maxsize=4096)
def _exact(
    pattern: Pattern, group: int, spelling: int, structs: tuple, numbers: tuple, wide: bool, platform: str
) -> Graph | None:
    """A spelling at the types of a module's values; None where it cannot be traced there."""
    search = pattern.searches[group][spelling]
    if any(dtype is None for _, dtype in structs):
        return None
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in structs]
    if pattern.supports is not None and pattern.supports(*arguments, **dict(numbers)) is not None:
        return None
    try:
        with jax.enable_x64(wide):
            return _graph(lambda *arrays: search(*arrays, **dict(numbers)), arguments, platform)
    except (TypeError, ValueError, IndexError, AssertionError):
        return None  # no such shapes


def _graph(function: Any, structs: Sequence[jax.ShapeDtypeStruct], platform: str) -> Graph:
    traced = jax.jit(lambda *arrays: function(*arrays), keep_unused=True).trace(*structs)
    lowered = traced.lower(lowering_platforms=(platform,))  # some lower products of two dtypes as such, some do not
    module = lowered.compiler_ir("stablehlo")
    m.inline_calls(module)
    off_cpu = [*canonicalize.FOR_FUSION, *precision.OFF_CPU]
    rules = canonicalize.RULES if platform == "cpu" else off_cpu
    apply_rewrites(module, rules, Fuel(None), Report())
    m.run_passes(module, "cse,symbol-dce")
    return graph_of(m.main(module))
