"""The search for a layout: meshes of a number of devices, and which weights' dimensions their tensor axis splits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpx.hardware.target import Target
from kpx.sharding.dims import Dims
from kpx.sharding.fabric import Fabric
from kpx.sharding.layout import Axes, Layout
from kpx.sharding.price import Exchange, Price, Pricing

AXES = ("pipeline", "data", "fsdp", "context", "expert", "tensor")
"""The axes that a plan may have, the outermost first: what is sent the most is the innermost, where links are shortest."""

_ROWS = ("data", "fsdp", "expert")  # what splits the batch
_REFINED = 6  # meshes whose tensor axis is tried on other dimensions
_PER_AXIS = 0.02  # of a step's time, by which a further axis must be faster
HEADROOM = 0.92  # of a device's memory: compilers keep some, and the estimate may be short


@dataclass(frozen=True)
class Candidate:
    """A layout that was priced.

    Attributes:
        variant: what of the step was chosen beside the layout (remat, microbatches), by name.
        fits: whether its memory is within the device's.
    """

    layout: Layout
    price: Price
    variant: Mapping[str, Any]
    fits: bool

    @property
    def mesh(self) -> dict[str, int]:
        return dict(self.layout.mesh)


def layouts(
    dims: Dims, mesh: Mapping[str, int], tensor: Sequence[int] | None = None, given: Mapping | None = None
) -> Layout:
    """The layout that a mesh's axes mean, by their names.

    Args:
        tensor: classes that the axis `tensor` splits; by default those of `tensor_classes`.
    """
    experts = expert_classes(dims)
    chosen = tensor_classes(dims) if tensor is None else tensor
    split: dict[int, Axes] = {}
    if mesh.get("pipeline", 1) > 1:
        split |= dict.fromkeys(dims.stacked, ("pipeline",))
    if mesh.get("expert", 1) > 1:
        split |= dict.fromkeys(experts, ("expert",))
    if mesh.get("tensor", 1) > 1:
        split |= dict.fromkeys((c for c in chosen if c not in split), ("tensor",))
    rows = tuple(a for a in mesh if a in _ROWS)
    split |= dict.fromkeys(dims.groups, ("data",) if mesh.get("data", 1) > 1 else ())
    split |= dict.fromkeys(dims.rows, rows)
    if mesh.get("context", 1) > 1:
        split |= dict.fromkeys(dims.columns, ("context",))
    storage = tuple(a for a in ("fsdp", "context") if mesh.get(a, 1) > 1)
    return Layout(dims, dict(mesh), split, storage, dict(given or {}))


def tensor_classes(dims: Dims) -> tuple[int, ...]:
    """The dimensions of weights that a tensor axis splits by default: all but the one that most weights have, the model's
    width (Megatron-LM, arXiv 1909.08053)."""
    if not dims.weights:
        return ()
    ranks = Layout(dims, {}, {})
    width = max(dims.weights, key=ranks.rank)
    experts = expert_classes(dims)
    return tuple(c for c in dims.weights if c != width and c not in experts)


def expert_classes(dims: Dims) -> tuple[int, ...]:
    """The dimensions of weights that products go along one by one: experts."""
    found: dict[int, None] = {}
    for op in dims.graph.ops:
        if op.kind in ("mixture", "mixture_gradient"):
            found[dims.classes[op.operands[2]][0]] = None
        if op.kind not in ("dot_general", "ragged_dot") or op.rule is None or op.operands[1] not in dims.stored:
            continue
        classes, factors = dims.classes[op.operands[1]], op.rule.operands[1]
        along = {f for d in op.rule.results[0] for f in d} & {f for d in op.rule.operands[0] for f in d}
        for c, f in zip(classes, factors, strict=True):
            if f and (f[0] in along or (op.kind == "ragged_dot" and f == factors[0])) and c not in dims.stacked:
                found[c] = None
    return tuple(found)


def meshes(
    dims: Dims, devices: int, fixed: Mapping[str, int], slices: int = 1, *, pipelines: bool = False
) -> Iterator[dict[str, int]]:
    """Meshes of a number of devices, whose axes divide what they split.

    Args:
        pipelines: whether layers may be in stages.
    """
    layers = [_size(dims, c) for c in dims.stacked]
    rows = [n for n in (_size(dims, c) for c in dims.rows) if n]
    columns = [n for n in (_size(dims, c) for c in dims.columns) if n > 1]
    experts = [_size(dims, c) for c in expert_classes(dims)]
    weights = [_size(dims, c) for c in tensor_classes(dims)]
    most = {
        "pipeline": min(layers, default=1) if pipelines else 1,
        "context": max(columns, default=1),
        "expert": min(experts, default=1),
        "tensor": max(weights, default=1),
        "data": min(rows, default=1),
        "fsdp": min(rows, default=1) if dims.roles.state else 1,
    }
    options = [[fixed[a]] if a in fixed else [k for k in divisors(devices) if k <= most[a]] for a in AXES]
    for sizes in itertools.product(*options):
        if math.prod(sizes) != devices:
            continue
        mesh: dict[str, int] = dict(zip(AXES, sizes, strict=True))
        if mesh["pipeline"] > 1 and (
            mesh["pipeline"] * mesh["data"] != devices or any(n % mesh["pipeline"] for n in layers)
        ):
            continue
        over = math.prod(mesh[a] for a in _ROWS)
        if any(n % over for n in rows) or not _spans(mesh, slices, fixed):
            continue
        if any(n % mesh["context"] for n in columns[:1]):
            continue
        yield {a: n for a, n in mesh.items() if n > 1 or a in fixed} or {"data": 1}


def _spans(mesh: Mapping[str, int], slices: int, fixed: Mapping[str, int]) -> bool:
    """Whether slices are along the outermost axis: one that exchanges little, unless it is asked for."""
    outermost = next((a for a, n in mesh.items() if n > 1), "data")
    return slices == 1 or (mesh[outermost] % slices == 0 and (outermost in ("pipeline", "data") or outermost in fixed))


def best(
    pricing: Pricing,
    target: Target,
    devices: int,
    fixed: Mapping[str, int],
    given: Mapping,
    variant: Mapping[str, Any],
    goal: str,
    pipelines: bool = False,
) -> list[Candidate]:
    """Candidates of one graph, the best first."""
    found = [
        _priced(pricing, target, layouts(pricing.dims, mesh, given=given), variant)
        for mesh in meshes(pricing.dims, devices, fixed, target.slices, pipelines=pipelines)
    ]
    found.sort(key=lambda c: order(c, goal))
    refined = []
    for candidate in [c for c in found if c.layout.mesh.get("tensor", 1) > 1][:_REFINED]:
        refined.append(_refined(pricing, target, candidate, goal))
    return sorted([*found, *refined], key=lambda c: order(c, goal))


def order(candidate: Candidate, goal: str) -> tuple:
    """What comes first: what fits; then by time, or by memory."""
    price = candidate.price
    if goal == "memory":
        return (not candidate.fits, price.memory_bytes, price.seconds)
    # Of what a model cannot tell apart, the simpler.
    simplicity = 1 + _PER_AXIS * sum(n > 1 for n in candidate.layout.mesh.values())
    return (
        not candidate.fits,
        price.seconds * simplicity if candidate.fits else price.memory_bytes,
        price.memory_bytes,
    )


def _refined(pricing: Pricing, target: Target, candidate: Candidate, goal: str) -> Candidate:
    """With each class of weights' dimensions put to the tensor axis or taken off it, as long as that helps."""
    current = tuple(c for c, axes in candidate.layout.split.items() if axes == ("tensor",))
    for c in pricing.dims.weights:
        changed = tuple(x for x in current if x != c) if c in current else (*current, c)
        if not changed:
            continue
        layout = layouts(pricing.dims, candidate.layout.mesh, changed, candidate.layout.given)
        other = _priced(pricing, target, layout, candidate.variant)
        if order(other, goal) < order(candidate, goal):
            candidate, current = other, changed
    return candidate


def _priced(pricing: Pricing, target: Target, layout: Layout, variant: Mapping[str, Any]) -> Candidate:
    if layout.mesh.get("pipeline", 1) > 1:
        price = pipelined(pricing, layout, variant)
    else:
        price = pricing.price(layout)
    return Candidate(layout, price, variant, price.memory_bytes <= HEADROOM * memory(target))


def pipelined(pricing: Pricing, layout: Layout, variant: Mapping[str, Any]) -> Price:
    """The price of layers in stages: a stage's share of computing, once more forward, and of what is idle while the pipeline
    fills and empties; activations from stage to stage; the gradient's sum over `data`."""
    stages, count = layout.mesh["pipeline"], variant.get("microbatches") or 1
    parts = variant.get("interleave", 1)
    rest = {c: axes for c, axes in layout.split.items() if axes != ("pipeline",)}
    whole = pricing.price(Layout(layout.dims, layout.mesh, rest, (), layout.given))
    ticks = (count + stages) * parts + stages - 1
    computing = whole.compute_seconds * 4 / 3 / stages * ticks / (count * parts)
    passed = pricing.carried_bytes(layout) / count
    fabric = Fabric(pricing.target, layout.mesh)
    hop = fabric.seconds("collective-permute", passed, ["pipeline"])
    sent = Exchange("collective-permute", ("pipeline",), passed, 2 * ticks, 2 * ticks * hop, False, "pipeline")
    kept = [e for e in whole.exchanges if "data" in e.axes]
    # Stacked layers' gradients are summed a stage's at a time.
    kept = [
        dataclasses.replace(e, bytes=e.bytes / stages, seconds=e.seconds / stages) if e.count > 1 else e for e in kept
    ]
    arguments = sum(layout.bytes(v) for v in layout.dims.graph.arguments)
    slots = min(count, (2 if parts == 1 else 3) * stages) * parts
    working = (whole.memory_bytes - whole.argument_bytes) / (stages * count)
    memory = arguments * 4 / 3 + (slots + 2) * passed + working
    seconds = computing + sent.seconds + sum(e.seconds for e in kept)
    return Price(seconds, computing, memory, arguments, [sent, *kept])


def memory(target: Target) -> float:
    """Bytes of a device; of a CPU's, what the machine has for each."""
    if target.spec is not None:
        return target.spec.memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / max(target.device_count, 1)


def _size(dims: Dims, dim_class: int) -> int:
    """The size of a class's dimension in an argument."""
    place = dims.place(dim_class)
    return dims.graph.shapes[dims.graph.arguments[place[0]]][place[1]] if place else 0


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
