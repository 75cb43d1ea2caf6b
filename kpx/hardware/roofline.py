"""How long an instruction takes at best: the longer of computing at peak and moving at full bandwidth."""

from __future__ import annotations

from collections.abc import Iterable

from kpx.hardware.chips import Chip
from kpx.hardware.target import Target
from kpx.ir.hlo_cost import Work

_ELEMENTS = {"s8": "i8", "u8": "i8", "s4": "i4", "u4": "i4", "pred": "i8", "c64": "f32", "c128": "f64"}
# Where an f32 product's precision is left open, TPUs multiply in bf16 and NVIDIA's GPUs in TF32.
_OPEN_F32 = {"tpu": "bf16", "cuda": "tf32"}


def seconds(work: Work, target: Target) -> float:
    """The time of one run of an instruction, exchanges left out."""
    return max(compute_seconds(work, target), memory_seconds(work, target))


def total_seconds(works: Iterable[Work], target: Target) -> float:
    """The time of all, exchanges left out: prefetches show where they outlast what is bound by computing."""
    busy = hidden = prefetched = 0.0
    for w in works:
        if w.is_prefetch:
            prefetched += memory_seconds(w, target) * w.count
        else:
            busy += seconds(w, target) * w.count
            hidden += max(compute_seconds(w, target) - memory_seconds(w, target), 0.0) * w.count
    return busy + max(prefetched - hidden, 0.0)


def bound(work: Work, target: Target) -> str:
    """`compute` or `memory`: what an instruction takes its time for."""
    return "compute" if compute_seconds(work, target) > memory_seconds(work, target) else "memory"


def compute_seconds(work: Work, target: Target) -> float:
    """The time of its products at the peak of their element type."""
    return work.product_flops / _chip(target).peak(element(work, target)) if work.product_flops else 0.0


def memory_seconds(work: Work, target: Target) -> float:
    """The time of its bytes at the memory's bandwidth."""
    return work.bytes / _chip(target).bandwidth


def _chip(target: Target) -> Chip:
    if (chip := target.spec) is None:
        raise ValueError(f"{target} has no figures in the spec table")
    return chip


def element(work: Work, target: Target) -> str:
    """The unit that an instruction's products run on, under the spec table's name for it."""
    given, _, precision = work.element.partition(":")
    if given == "f32":
        return "f32" if precision == "highest" else _OPEN_F32.get(target.platform, "f32")
    if given.startswith(("f8", "f4")):
        return given[:2]
    return _ELEMENTS.get(given, given)
