"""What an optimized program computes, moves and sends: each instruction's work, times how often it runs.

XLA's own analysis counts a loop's body once. Here every instruction counts as often as the loops around it run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kpx.ir.cost import REPLACED_FLOPS
from kpx.ir.hlo import Array, Computation, Instruction, Program

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "async-update",
    "add-dependency", "domain", "iota", "get-dimension-size",
}  # fmt: skip
_MOVES = _FREE | {
    "copy", "transpose", "reshape", "broadcast", "slice", "dynamic-slice", "dynamic-update-slice", "pad",
    "concatenate", "gather", "reverse", "convert", "bitcast-convert", "custom-call", "infeed", "outfeed", "send", "recv",
}  # fmt: skip
_PREFETCHES = {"copy-start", "slice-start", "dynamic-slice-start"}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_BACKWARD = {"__cudnn$convBackwardInput": "input", "__cudnn$convBackwardFilter": "filter"}


@dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`, ...
        bytes: what a device has of the gathered, reduced or exchanged array once, whole: an all-gather's result, a
            reduce-scatter's operand.
        axes: the mesh axes that it goes along; empty where its groups are not those of axes.
        group: the partitions of its first group: as many take part in each exchange.
        count: how often it happens, loops included.
        operation: the path of names that it comes from.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    group: tuple[int, ...]
    count: int
    operation: str


@dataclass(frozen=True)
class Work:
    """What one scheduled instruction does, each time that it runs.

    Attributes:
        instruction: its name in the program.
        opcode: HLO's.
        operation: the path of names that it comes from.
        source: the function that it was written in, and `file:line`.
        flops: all its operations; a multiplication and an addition count as two.
        product_flops: those of matrix products and convolutions.
        element: the element type that its products take, with the precision asked for (`f32:highest`).
        bytes: what it reads and writes of the device's memory; a fusion's inner values are not moved.
        count: how often it runs.
        collective: what it sends, or None.
        is_prefetch: whether it is a copy that runs beside what follows it.
    """

    instruction: str
    opcode: str
    operation: str
    source: tuple[str, str]
    flops: float
    product_flops: float
    element: str
    bytes: float
    count: int
    collective: Collective | None = None
    is_prefetch: bool = False


def work(program: Program, mesh: Mapping[str, int] | None = None) -> list[Work]:
    """The work of a program, on each device.

    Args:
        mesh: the sizes of the axes that the program is partitioned over, in order, to name those of collectives.
    """
    return list(_Walk(program, dict(mesh or {})).computation(program.entry, 1))


class _Walk:
    def __init__(self, program: Program, mesh: dict[str, int]):
        self._program = program
        self._mesh = mesh
        # libtpu repeats a collective that it overlaps in the fusions from its start to its end.
        self._started = {
            i.attribute("channel_id")
            for c in program.computations.values()
            if any('"AsyncCollectiveStart"' in i.attributes for i in c.instructions)
            for i in c.instructions
            if i.opcode in COLLECTIVES
        }

    def computation(self, computation: Computation, count: int) -> Iterator[Work]:
        for instruction in computation.instructions:
            yield from self._instruction(instruction, computation, count)

    def _instruction(self, i: Instruction, within: Computation, count: int) -> Iterator[Work]:
        called = [self._program.computations[name] for name in i.callees if name in self._program.computations]
        if i.opcode == "while":
            body = self._program.computations.get(i.callee("body") or "")
            if body is not None:
                yield from self.computation(body, count * self._program.trip_count(i, within))
        elif i.opcode == "conditional":
            branches = [list(self.computation(c, count)) for c in called]
            yield from max(branches, key=lambda works: sum((w.flops + w.bytes) * w.count for w in works), default=[])
        elif i.opcode in ("call", "call-start", "async-start"):
            for c in called:
                yield from self.computation(c, count)
        elif i.opcode.removesuffix("-start") in COLLECTIVES:
            yield self._sent(i, within, count)
        elif i.opcode == "send" and "_xla_megascale_target" in i.attributes:
            yield self._between_slices(i, within, count)
        elif i.opcode == "fusion" and called:
            yield from self._fusion(i, within, called[0], count)
        elif i.opcode in _PREFETCHES:
            user = _user(i, within)
            yield Work(i.name, i.opcode, user.operation, self._program.source(user), 0.0, 0.0, "", _moved(i, within),
                       count, is_prefetch=True)  # fmt: skip
        elif i.opcode not in _FREE and not i.opcode.endswith("-done"):
            flops, product, element = self._flops(i, within)
            yield Work(
                i.name,
                i.opcode,
                i.operation,
                self._program.source(i),
                flops,
                product,
                element,
                _moved(i, within),
                count,
            )

    def _fusion(self, i: Instruction, within: Computation, inner: Computation, count: int) -> Iterator[Work]:
        flops = product = 0.0
        element = ""
        for j in inner.instructions:
            if j.opcode in COLLECTIVES:
                yield from self._fused_collective(j, i, inner, count)
            f, p, e = self._flops(j, inner)
            flops, product = flops + f, product + p
            element = e or element
        moved = _fusion_moved(i, within, inner)
        named = i if i.operation else inner.root
        yield Work(
            i.name, i.opcode, named.operation, self._program.source(named), flops, product, element, moved, count
        )

    def _fused_collective(self, j: Instruction, fusion: Instruction, inner: Computation, count: int) -> Iterator[Work]:
        starts = any('"AsyncCollectiveStart"' in k.attributes for k in inner.instructions)
        if starts or j.attribute("channel_id") not in self._started:
            scattered = j.opcode == "all-reduce" and any(
                k.opcode == "dynamic-slice" and j.name in k.operands for k in inner.instructions
            )
            yield self._sent(j, inner, count, "reduce-scatter" if scattered else None, fusion.operation)

    def _flops(self, i: Instruction, within: Computation) -> tuple[float, float, str]:
        """All operations, those of products, and what the products are of."""
        if i.opcode == "fusion":  # one inside another
            inner = self._program.computations.get(i.callee("calls") or "")
            parts = [self._flops(j, inner) for j in inner.instructions] if inner else []
            return sum(p[0] for p in parts), sum(p[1] for p in parts), next((p[2] for p in parts if p[2]), "")
        if product := _product_flops(i, within):
            return product, product, _element(i, within)
        if i.opcode in ("reduce", "reduce-window"):
            window = math.prod(i.numbers("size")) if i.opcode == "reduce-window" else 1
            operand = _operand(i, within, 0)
            size = i.results[0].size * window if i.opcode == "reduce-window" else operand.size if operand else 0
            return float(size), 0.0, ""
        if i.opcode in _MOVES or i.opcode in COLLECTIVES or not i.results:
            return 0.0, 0.0, ""
        return float(i.results[0].size), 0.0, ""

    def _sent(
        self, i: Instruction, within: Computation, count: int, kind: str | None = None, operation: str = ""
    ) -> Work:
        kind = kind or i.opcode.removesuffix("-start")
        operands = [a for n in range(len(i.operands)) if (a := _operand(i, within, n))]
        results = (
            i.results[len(operands) :] if i.opcode.endswith("-start") and len(i.results) > len(operands) else i.results
        )
        whole = results if kind == "all-gather" else operands
        group = _first_group(i)
        axes = _axes(group, self._mesh)
        operation = i.operation or operation
        sent = Collective(kind, sum(a.bytes for a in whole), axes, tuple(group), count, operation)
        return Work(i.name, i.opcode, operation, self._program.source(i), 0.0, 0.0, "", 0.0, count, sent)

    def _between_slices(self, i: Instruction, within: Computation, count: int) -> Work:
        """What TPU slices exchange, over the hosts' network: a send to libtpu's runtime, and a receipt of what it makes of all."""
        found = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        kind = found[1].lower().replace("_", "-") if found else "collective-permute"
        target = re.search(r"_xla_megascale_target=\"?\{+([\d,]+)\}", i.attributes)
        slices = len(target[1].split(",")) if target else 2
        group = [number * (math.prod(self._mesh.values()) // slices) for number in range(slices)]
        sent = _operand(i, within, 0)
        size = (sent.bytes if sent else 0) * (slices if kind == "all-gather" else 1)
        exchange = Collective(kind, size, _axes(group, self._mesh), tuple(group), count, i.operation)
        return Work(i.name, i.opcode, i.operation, self._program.source(i), 0.0, 0.0, "", 0.0, count, exchange)


# Products --------------------------------------------------------------------------------------


def _operand(i: Instruction, within: Computation, n: int) -> Array | None:
    found = within.by_name.get(i.operands[n]) if n < len(i.operands) else None
    return found.results[0] if found and found.results else None


def _element(i: Instruction, within: Computation) -> str:
    """The narrower of a product's operand types; `f32:highest` and the like where its precision is asked for."""
    operands = [a for n in range(len(i.operands)) if (a := _operand(i, within, n))]
    counts = ("s32", "u32", "pred")  # which a kernel takes beside what it multiplies
    arrays = [a for a in operands if a.element not in counts][:2] or operands
    element = min(arrays, key=lambda a: a.bytes / max(a.size, 1)).element
    precision = i.attribute("operand_precision").partition(",")[0] or _config_precision(i)
    return f"{element}:{precision.lower()}" if element == "f32" and precision else element


def _config_precision(i: Instruction) -> str:
    found = re.search(r'"operand_precision":\["(\w+)"', i.attributes)
    return found[1] if found and found[1] != "DEFAULT" else ""


def _product_flops(i: Instruction, within: Computation) -> float:
    """The operations of a matrix product or convolution, or those that a kernel replaced; 0 for anything else."""
    if i.opcode == "custom-call" and (told := re.search(rf'{REPLACED_FLOPS}="(\d+)"', i.attributes)):
        return float(told[1])
    lhs, rhs = _operand(i, within, 0), _operand(i, within, 1)
    if lhs is None or rhs is None or not i.results:
        return 0.0
    target = i.attribute("custom_call_target").strip('"') if i.opcode == "custom-call" else ""
    if i.opcode == "dot":
        return 2.0 * i.results[0].size * math.prod(lhs.shape[d] for d in i.numbers("lhs_contracting_dims"))
    if target == "__cublas$lt$groupedMatmul":  # each row with one group's matrix, or the sums of each group's rows
        return 2.0 * lhs.size * (rhs if len(i.results[0].shape) == 3 else i.results[0]).shape[-1]
    if target == "tpu_custom_call" and i.name.startswith("ragged-dot-none"):  # XLA's own kernel; its operands come last
        rows = _operand(i, within, len(i.operands) - 2)
        return 2.0 * rows.size * i.results[0].shape[-1] if rows else 0.0
    if target.startswith(("__cublas$", "__triton_gemm")):
        dims = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.attributes)
        return 2.0 * i.results[0].size * math.prod(lhs.shape[int(d)] for d in json.loads(dims[1])) if dims else 0.0
    if i.opcode == "convolution" or target.startswith("__cudnn$conv"):
        result = i.results[0]
        if _BACKWARD.get(target) == "input":
            lhs, result = result, lhs
        elif _BACKWARD.get(target) == "filter":
            rhs, result = result, rhs
        return _convolution_flops(i, lhs.shape, rhs.shape, result.shape)
    return 0.0


def _convolution_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Counts only what is multiplied: neither padding nor the holes of a dilation.

    A TPU's compiler writes products as convolutions whose padding makes up most of a window.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    if labels is None:
        return 0.0
    spatial = sorted(c for c in labels[2] if c.isdigit())
    window = i.attribute("window")
    strides, dilations, holes = (
        _window(window, name, len(spatial), 1) for name in ("stride", "rhs_dilate", "lhs_dilate")
    )
    padding = re.search(r"pad=([\d_x\-]+)", window)
    low = [int(p.split("_")[0]) for p in padding[1].split("x")] if padding else [0] * len(spatial)
    pairs = 1.0
    for n, dim in enumerate(spatial):
        length, taps, places = lhs[labels[1].index(dim)], rhs[labels[2].index(dim)], out[labels[3].index(dim)]
        pairs *= _met(length, taps, places, strides[n], low[n], holes[n], dilations[n])
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    groups = int(i.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * rhs[labels[2].index("i")] * pairs / groups


def _met(length: int, taps: int, places: int, stride: int, low: int, hole: int, dilation: int) -> int:
    """How many pairs of a tap and an output place meet an element, along one dimension."""
    if length == taps * places and taps * places > 1 << 24:
        return length
    first = np.arange(places, dtype=np.int64) * stride - low
    total = 0
    for k in range(taps):
        at = first + k * dilation
        total += int(np.count_nonzero((at >= 0) & (at <= (length - 1) * hole) & (at % hole == 0)))
    return total


def _window(window: str, name: str, dims: int, otherwise: int) -> list[int]:
    found = re.search(rf"\b{name}=([\dx]+)", window)
    return [int(n) for n in found[1].split("x")] if found else [otherwise] * dims


# Memory ----------------------------------------------------------------------------------------


def _device_bytes(array: Array | None) -> int:
    """An array's bytes where it lies in the device's own memory: on-chip and host memory do not count."""
    return array.bytes if array is not None and array.space == 0 else 0


def _moved(i: Instruction, within: Computation) -> float:
    written = sum(map(_device_bytes, i.results))
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * written
    if i.opcode in ("dynamic-update-slice", "scatter"):
        update = _operand(i, within, 1 if i.opcode == "dynamic-update-slice" else len(i.operands) - 1)
        return 2.0 * _device_bytes(update)
    if i.opcode == "copy-start":
        return float(sum(map(_device_bytes, i.results[:2])))
    if i.opcode in _PREFETCHES:  # its results are what it slices, and then the slice
        return float(i.results[len(i.operands)].bytes if len(i.results) > len(i.operands) else 0)
    read = sum(_device_bytes(_operand(i, within, n)) for n in range(len(i.operands)))
    return float(read + written)


def _user(i: Instruction, within: Computation) -> Instruction:
    """Who uses what an instruction without a name of its own prepares: the first with a name, behind copies."""
    current = i
    while not current.operation:
        user = next((j for j in within.instructions if current.name in j.operands), None)
        if user is None or user.opcode in ("tuple", "while"):
            return i
        current = user
    return current


def _fusion_moved(i: Instruction, within: Computation, inner: Computation) -> float:
    users: dict[str, list[Instruction]] = {}
    for j in inner.instructions:
        for name in j.operands:
            users.setdefault(name, []).append(j)
    moved = 0.0
    for j in inner.instructions:
        if j.opcode != "parameter" or not j.arguments.strip().isdigit():
            continue
        whole = _device_bytes(_operand(i, within, int(j.arguments)))
        readers = users.get(j.name, [])
        if readers and all(
            r.opcode in ("dynamic-slice", "slice", "gather") and r.operands[0] == j.name for r in readers
        ):
            whole = min(whole, sum(r.bytes for r in readers))
        elif readers and all(r.opcode == "dynamic-update-slice" and r.operands[0] == j.name for r in readers):
            whole = 0  # updated in place
        moved += whole
    return moved + _written(i, inner)


def _written(i: Instruction, inner: Computation) -> float:
    roots = (
        [inner.by_name[o] for o in inner.root.operands if o in inner.by_name]
        if inner.root.opcode == "tuple"
        else [inner.root]
    )
    if len(roots) != len(i.results):
        return float(sum(map(_device_bytes, i.results)))
    total = 0.0
    for root, result in zip(roots, i.results, strict=True):
        while root.opcode == "bitcast" and root.operands[0] in inner.by_name:
            root = inner.by_name[root.operands[0]]
        update = _operand(root, inner, 1) if root.opcode == "dynamic-update-slice" else None
        total += min(_device_bytes(result), update.bytes) if update else _device_bytes(result)
    return total


# Groups of devices -----------------------------------------------------------------------------


def _first_group(i: Instruction) -> list[int]:
    """The partitions of a collective's first group, in any of HLO's notations."""
    text = i.attributes
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text):
        sent = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return list(next((pair for pair in sent if pair[0] != pair[1]), sent[0]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # `'x':(2)4` is a part of an axis: 4 of what is left behind a first factor of 2.
        chosen = {name: (before, part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])}
        dims, picked = [], []
        for name, size in sizes.items():
            before, part = (int(n or 0) for n in chosen.get(name, ("1", "1")))
            before, part = before or 1, part or size
            dims += [before, part, size // (before * part)]
            picked += [0, slice(None), 0]
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(dims))
        return ids.reshape(dims)[tuple(picked)].reshape(-1).tolist()
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in listed[1].split(",")]
    return []


def _iota(text: str) -> np.ndarray:
    """Numbers from their notation: `[4,4]T(1,0)` counts in that shape, transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    dims = [int(n) for n in found[1].split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose([int(n) for n in found[2].split(",")]) if found[2] else ids).reshape(-1)


def _axes(group: list[int], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group's partitions lie."""
    if len(group) < 2 or not mesh or max(group) >= math.prod(mesh.values()):
        return ()
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)
