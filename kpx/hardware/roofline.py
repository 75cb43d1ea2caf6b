"""How long an instruction takes at best: the longer of computing at peak and moving at full bandwidth."""

from __future__ import annotations

from kpx.hardware.target import Target
from kpx.ir.hlo_cost import Work

_ELEMENTS = {"s8": "i8", "u8": "i8", "s4": "i4", "u4": "i4", "pred": "i8", "c64": "f32", "c128": "f64"}
# Where an f32 product's precision is left open, TPUs multiply in bf16 and NVIDIA's GPUs in TF32.
_OPEN_F32 = {"tpu": "bf16", "cuda": "tf32"}


def seconds(work: Work, target: Target) -> float:
    """The time of one run of an instruction, exchanges left out."""
    chip = target.spec
    if chip is None:
        raise ValueError(f"{target} has no figures in the spec table")
    busy = work.product_flops / chip.peak(element(work, target)) if work.product_flops else 0.0
    return max(busy, work.bytes / chip.bandwidth)


def element(work: Work, target: Target) -> str:
    """The unit that an instruction's products run on, under the spec table's name for it."""
    given, _, precision = work.element.partition(":")
    if given == "f32":
        return "f32" if precision == "highest" else _OPEN_F32.get(target.platform, "f32")
    if given.startswith(("f8", "f4")):
        return given[:2]
    return _ELEMENTS.get(given, given)
