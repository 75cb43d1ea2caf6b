"""Where a program's time would go on a target: a roofline of its compiler's own program, by module of the model.

It is a model, not a measurement: every instruction at the peak of its element type or at full memory bandwidth,
whichever takes longer, and exchanges between devices on top, with nothing beside them. Real programs are slower.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kpx.api import compile as compile_for
from kpx.config import Config
from kpx.errors import InputError, KpxError
from kpx.hardware import links, roofline
from kpx.hardware.chips import Chip
from kpx.hardware.target import Target
from kpx.ir.hlo_cost import Work
from kpx.runtime.compiled import Compiled, Memory

ASSUMPTIONS = (
    "Each instruction takes the longer of its products at the peak of their element type and its bytes at full memory "
    "bandwidth; neither is reached in practice.",
    "f32 products whose precision is left open count as TF32 on NVIDIA and as bf16 on TPUs, which is how they run there.",
    "Exchanges between devices run at the links' full bandwidth, and nothing runs beside them.",
    "Copies that a compiler starts early hide behind what is bound by computing.",
    "Loops count as often as they run; a loop whose count depends on values counts once.",
)

# Parts of an operation's path that JAX adds, and that are not the model's.
_ADDED = {
    "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat", "remat2", "scan", "core_call",
    "custom_jvp_call", "custom_vjp_call", "composite", "kpx_call_module", "pjit", "branch",
}  # fmt: skip
_WRAPPED = re.compile(r"(?:jit|pjit|jvp|transpose|vmap|remat|checkpoint|shard_map|custom_vjp|custom_jvp)\((.*)\)$")


@dataclass
class Group:
    """What the instructions of one module of the model do on a device, in one call.

    Attributes:
        path: the module's path in the model, or the function that its operations were written in.
        seconds: predicted, exchanges included.
        exchange_seconds: of these, exchanges.
        bound: `compute`, `memory` or `exchange`: what takes most of its time.
        operations: its time by operation.
    """

    path: str
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    exchange_seconds: float = 0.0
    compute_seconds: float = 0.0
    operations: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        busy = self.seconds - self.exchange_seconds
        if self.exchange_seconds > busy:
            return "exchange"
        return "compute" if 2 * self.compute_seconds >= busy else "memory"


@dataclass(frozen=True)
class Advice:
    """A change, and the seconds that the model says it would save."""

    change: str
    saves_seconds: float


@dataclass(frozen=True)
class Report:
    """What is predicted for one target.

    Attributes:
        seconds: of one call.
        groups: by module, the longest first.
        advice: the changes that would save most, at most three.
        compute_seconds, memory_seconds, exchange_seconds: by what bounds each instruction.
        error: where the target's compiler refused the program, its words; all else is then empty.
    """

    target: Target
    seconds: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    exchange_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    memory: Memory | None = None
    groups: tuple[Group, ...] = ()
    advice: tuple[Advice, ...] = ()
    rewrites: dict[str, int] = field(default_factory=dict)
    reverted: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    collectives: tuple[dict[str, Any], ...] = ()
    remarks: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `kpx.explain` gives: one report a target.

    Printed, it is a table; `to_dict()` is for machines.
    """

    name: str
    reports: tuple[Report, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it. Seconds are seconds, memory is bytes."""
        return {"name": self.name, "assumptions": list(ASSUMPTIONS), "targets": [_report_dict(r) for r in self.reports]}

    def to_html(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes a page for a browser, usable with no network: time by module, roofline, memory, targets compared."""
        from kpx.observe import page

        return page.write(self.to_dict(), path)

    def __rich__(self):
        from kpx.observe.explain_table import render

        return render(self)

    def __str__(self) -> str:
        from kpx.observe.explain_table import as_text

        return as_text(self)

    __repr__ = __str__


def explain(
    fun_or_model: Any,
    *specs,
    targets: Sequence[str | Target],
    config: Config | None = None,
    progress: Callable[[Target], None] | None = None,
    **named_specs,
) -> Explanation:
    """Where the time of a function or model would go on targets, and what would help.

    Args:
        fun_or_model: what `kpx.compile` takes.
        *specs: positional inputs: arrays, tensors, or `jax.ShapeDtypeStruct`s with shardings.
        targets: names of machines in the spec table, here or not (`tpu-v5e`, `cuda:h100x8`).
        config: what may be done; `Config()` by default.
        progress: called with each target before it is compiled for.
        **named_specs: named inputs.

    Raises:
        InputError: there are no targets, or this is not a model.
        TargetError: a name is not a target, or the spec table does not have it.
        CaptureError, UnsupportedError: the model could not be brought over.
    """
    chosen = [
        Target.resolve(t, may_be_absent=True) for t in ([targets] if isinstance(targets, (str, Target)) else targets)
    ]
    if not chosen:
        raise InputError("`targets` is empty. Name machines, as `targets=['cuda:h100', 'tpu-v5e']`.")
    for target in chosen:
        if target.spec is None:
            raise InputError(
                f"`{target}` has no figures in the spec table, so that nothing can be predicted for it. Name a device, as "
                "`cuda:h100` or `tpu-v5e`; `python -m kpx targets` lists them."
            )
    reports = []
    for target in chosen:
        if progress is not None:
            progress(target)
        try:
            reports.append(report(compile_for(fun_or_model, *specs, target=target, config=config, **named_specs)))
        except KpxError as error:
            if len(chosen) == 1:
                raise
            reports.append(Report(target, error=f"{type(error).__name__}: {error}"))
    name = getattr(fun_or_model, "__name__", type(fun_or_model).__name__)
    return Explanation(name, tuple(reports))


def report(compiled: Compiled) -> Report:
    """The report of something compiled for a target of the spec table."""
    target, groups = compiled.target, {}
    shown = _shown_prefetches(compiled.work, target)
    bounds = {"compute": 0.0, "memory": 0.0}
    for w in compiled.work:
        path, operation = place(w)
        group = groups.setdefault(path, Group(path))
        busy, sent = roofline.seconds(w, target) * w.count, _sent_seconds(w, target)
        if w.is_prefetch:
            busy *= shown
        limit = roofline.bound(w, target)
        bounds[limit] += busy
        group.flops += w.flops * w.count
        group.bytes += w.bytes * w.count
        group.seconds += busy + sent
        group.exchange_seconds += sent
        group.compute_seconds += busy if limit == "compute" else 0.0
        group.operations[operation] = group.operations.get(operation, 0.0) + busy + sent
    cost = compiled.cost
    ordered = tuple(sorted(groups.values(), key=lambda g: -g.seconds))
    return Report(
        target, cost.predicted_seconds, bounds["compute"], bounds["memory"], cost.exchange_seconds, cost.flops,
        cost.bytes, compiled.memory, ordered, tuple(advice(compiled)), compiled.rewrites, compiled.reverted,
        compiled.kernels, tuple(dataclasses.asdict(c) for c in compiled.collectives),
        (*compiled.remarks, *(f"{what}: {how}." for what, how in compiled.layers.items())),
    )  # fmt: skip


def _shown_prefetches(works: Sequence[Work], target: Target) -> float:
    """The share of the prefetches' time that nothing hides."""
    prefetched = sum(roofline.memory_seconds(w, target) * w.count for w in works if w.is_prefetch)
    others = [w for w in works if not w.is_prefetch]
    shown = roofline.total_seconds(works, target) - roofline.total_seconds(others, target)
    return shown / prefetched if prefetched else 0.0


def _sent_seconds(w: Work, target: Target) -> float:
    return links.seconds(w.collective, target) * w.count if w.collective else 0.0


def place(w: Work) -> tuple[str, str]:
    """The module of the model that an instruction belongs to, and its operation."""
    return _place(w.operation, w.source, w.opcode)


@functools.lru_cache(maxsize=1 << 14)
def _place(operation: str, source: tuple[str, str], opcode: str) -> tuple[str, str]:
    parts = [bare for part in _split(operation) if (bare := _bare(part))]
    is_backward = "transpose(" in operation
    name = parts.pop() if parts else opcode
    # What JAX's own functions are called, and kpx's wrappers, is in front: `jit(f)/...`.
    path = "/".join(p for p in parts if p not in _ADDED)
    if not path:
        function, _ = source
        path = function.replace(".<locals>", "") or "(the compiler's own)"
    return path + (" (backward)" if is_backward else ""), name


def _split(operation: str) -> list[str]:
    """A path's parts; a slash inside parentheses does not part."""
    parts, depth, current = [], 0, ""
    for c in operation:
        depth += (c == "(") - (c == ")")
        if c == "/" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += c
    return [*parts, current]


def _bare(part: str) -> str:
    """A part without JAX's transformations around it; empty where nothing is left, or it is a jitted function."""
    if part.startswith(("jit(", "pjit(")):
        return ""
    while found := _WRAPPED.match(part):
        part = found[1]
    return part


# What would help ---------------------------------------------------------------------------------


def advice(compiled: Compiled) -> list[Advice]:
    """The three changes that the model says would save most."""
    target, works = compiled.target, compiled.work
    found = [
        *_narrower(works, target),
        *_fused(works, target),
        *_fewer_exchanges(works, target),
        *_larger_batch(works, target),
    ]
    worth = 0.01 * compiled.cost.predicted_seconds
    best = sorted((a for a in found if a.saves_seconds > worth), key=lambda a: -a.saves_seconds)[:3]
    memory = compiled.memory
    if memory.fits is False and memory.device_bytes:
        times = -(-memory.peak_bytes // memory.device_bytes)
        needs = f"It does not fit: shard it over {times} times as many devices at least, or take a smaller batch."
        best = [Advice(needs, 0.0), *best[:2]]
    return best


def _narrower(works: Sequence[Work], target: Target) -> list[Advice]:
    """f32 and f64 in bf16: half the bytes, and the faster units."""
    wide = [w for w in works if w.element.partition(":")[0] in ("f32", "f64")]
    saved = 0.0
    for w in wide:
        narrow = dataclasses.replace(w, element="bf16", bytes=w.bytes / (4 if w.element == "f64" else 2))
        saved += (roofline.seconds(w, target) - roofline.seconds(narrow, target)) * w.count
    if saved <= 0:
        return []
    products = "product" if len(wide) == 1 else f"{len(wide)} products"
    return [Advice(f"Compute the {products} of f32 in bf16, weights and activations included.", saved)]


def _fused(works: Sequence[Work], target: Target) -> list[Advice]:
    """Instructions without products, by the module that has most of them: at best they vanish into their neighbours."""
    by_path: dict[str, float] = {}
    for w in works:
        if not w.product_flops and w.collective is None and not w.is_prefetch:
            path = place(w)[0]
            by_path[path] = by_path.get(path, 0.0) + roofline.seconds(w, target) * w.count
    total = sum(by_path.values())
    if not total:
        return []
    most = max(by_path, key=lambda path: by_path[path])
    share = by_path[most] / total
    return [Advice(f"Fuse what is not a product into its neighbours: `{most}` has {share:.0%} of that time.", total)]


def _fewer_exchanges(works: Sequence[Work], target: Target) -> list[Advice]:
    by_kind: dict[tuple[str, tuple[str, ...]], float] = {}
    for w in works:
        if w.collective is not None:
            key = w.collective.kind, w.collective.axes
            by_kind[key] = by_kind.get(key, 0.0) + _sent_seconds(w, target)
    if not by_kind:
        return []
    (kind, axes), seconds = max(by_kind.items(), key=lambda item: item[1])
    along = f" along `{'`, `'.join(axes)}`" if axes else ""
    return [
        Advice(f"Overlap the {kind} exchanges{along} with products, or shard so that they are not needed.", seconds)
    ]


def _larger_batch(works: Sequence[Work], target: Target) -> list[Advice]:
    """Products that wait for their weights: with twice the rows, each waits half as long."""
    waiting = [w for w in works if w.product_flops and roofline.bound(w, target) == "memory"]
    saved = sum((roofline.seconds(w, target) - roofline.compute_seconds(w, target)) * w.count / 2 for w in waiting)
    if not saved:
        return []
    return [
        Advice(
            f"Double the batch: {len(waiting)} products wait for memory (seconds saved are of each sample's).", saved
        )
    ]


def _spec_dict(chip: Chip) -> dict[str, Any]:
    return {"name": chip.name, "peaks": dict(chip.peaks), "bandwidth": chip.bandwidth, "memory": chip.memory}


def _report_dict(report: Report) -> dict[str, Any]:
    if report.error:
        return {"target": str(report.target), "error": report.error}
    found = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name not in ("error", "groups")}
    memory = report.memory
    groups = [dataclasses.asdict(g) | {"bound": g.bound} for g in report.groups]
    chip = report.target.spec
    return found | {
        "target": str(report.target),
        "spec": _spec_dict(chip) if chip else None,
        "dollars_per_hour": report.target.dollars_per_hour,
        "devices": report.target.device_count,
        "memory": None if memory is None else dataclasses.asdict(memory) | {"fits": memory.fits},
        "groups": groups,
        "advice": [dataclasses.asdict(a) for a in report.advice],
        "collectives": [dict(c, axes=list(c["axes"]), group=list(c["group"])) for c in report.collectives],
    }
