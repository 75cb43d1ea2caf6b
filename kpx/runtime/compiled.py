"""What a compilation gives: something to call, and what is known about it."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from kpx.hardware import links, roofline
from kpx.hardware.target import Target
from kpx.ir import cost as ir_cost
from kpx.ir import hlo_cost
from kpx.ir import module as m
from kpx.ir.hlo import Program
from kpx.jax_internals import serialized
from kpx.pipeline import Context
from kpx.runtime.absent import AbsentExecutable


@dataclass(frozen=True)
class Memory:
    """What an executable needs of one device, in bytes, by its compiler's own account.

    Attributes:
        device_bytes: what a device has; None where the spec table does not know it (the CPU).
        host_bytes: what lies in the host's memory for it, arguments and what is put there meanwhile.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    device_bytes: int | None = None
    host_bytes: int = 0

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None where that is not known."""
        return None if self.device_bytes is None else self.peak_bytes <= self.device_bytes


@dataclass(frozen=True)
class Cost:
    """What a call computes and moves on each device, and how long the target would take at its peak (a model).

    For a target that is not here: each instruction of its compiler's program takes as long as the longer of computing
    at the peak of its element type and moving its bytes at full bandwidth; exchanges between devices come on top,
    as if nothing ran beside them (`kpx.hardware.links`). Prefetches hide behind what is bound by computing. Loops count as often as they run.

    Attributes:
        product_flops: those of matrix products and convolutions; None for a target that is here.
        exchange_seconds: what exchanges are of the predicted time.
    """

    flops: float
    bytes: float
    predicted_seconds: float
    product_flops: float | None = None
    exchange_seconds: float = 0.0


class Compiled:
    """A compiled model or function: what is known about it, and, where its target is on this machine, the call.

    Calling it takes what the function or model takes, at the shapes and dtypes it was compiled for.

    Attributes:
        stablehlo: the module that runs at each call, as text, after every rewrite.
        prepare_stablehlo: the module that ran once over the weights, or None.
        rewrites: how often each rewrite was applied.
        reverted: rewrites, and groups of them, that were taken back, with the reason.
        kernels: what each composite runs as.
        precisions: how many products, convolutions and attentions are computed in which precision, where
            `Config(precision=...)` asked for one.
        emulated: of those precisions, the ones that the target has no units for, and what is done instead.
        layers: what became of layers that are alike: `{"12 layers of 42 operations": "a loop"}`.
        seconds: how long each stage of the rewriting took; of a model, also tracing it, and the compiler.
    """

    def __init__(
        self,
        call: Callable,
        executable: jax.stages.Compiled | AbsentExecutable,
        module: Any,
        context: Context,
        target: Target,
        prepare_module: Any = None,
    ):
        self._call = call
        self._executable = executable
        self._module = module
        self._prepare_module = prepare_module
        self._context = context
        self._target = target

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    @property
    def stablehlo(self) -> str:
        return m.text(self._module)

    @property
    def prepare_stablehlo(self) -> str | None:
        return None if self._prepare_module is None else m.text(self._prepare_module)

    @property
    def hlo(self) -> str:
        """The compiler's own optimized program, as text."""
        return self._executable.as_text() or ""

    @property
    def target(self) -> Target:
        """What it was compiled for."""
        return self._target

    @property
    def compile_seconds(self) -> dict[str, float]:
        """(A target that is not here) how long its compiler took, and what was around it."""
        return dict(self._executable.seconds) if isinstance(self._executable, AbsentExecutable) else {}

    @property
    def remarks(self) -> tuple[str, ...]:
        """What had to be done differently than usual, so that its compiler would take the program."""
        return self._executable.remarks if isinstance(self._executable, AbsentExecutable) else ()

    def save(self, path: str | os.PathLike) -> int:
        """Writes the vendor's executable to a file; gives its bytes.

        It is what the plugin's runtime loads: for the same kind and number of devices, and the same plugin's version.

        Raises:
            CompileError: the plugin cannot serialize.
        """
        if isinstance(self._executable, AbsentExecutable):
            contents = self._executable.serialize()
        else:
            contents = serialized(self._executable)
        pathlib.Path(path).write_bytes(contents)
        return len(contents)

    @functools.cached_property
    def memory(self) -> Memory:
        """See `Memory`."""
        stats = self._executable.memory_analysis()
        arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
        temporary = stats.temp_size_in_bytes
        total = arguments + outputs + temporary - stats.alias_size_in_bytes
        host = stats.host_argument_size_in_bytes + stats.host_output_size_in_bytes + stats.host_temp_size_in_bytes
        host -= stats.host_alias_size_in_bytes
        # The CPU's peak leaves temporaries out; others' counts the host's memory too.
        peak = total if host else max(getattr(stats, "peak_memory_in_bytes", 0), total)
        spec = self._target.spec
        return Memory(arguments, outputs, temporary, peak, spec and spec.memory, host)

    @functools.cached_property
    def cost(self) -> Cost:
        """See `Cost`; the first access measures the peak of a target that is here."""
        if isinstance(self._executable, AbsentExecutable) and self._target.spec is not None:
            return self._modelled()
        counted = ir_cost.cost(self._module)
        return Cost(counted.flops, counted.bytes, counted.seconds(*self._target.peak()))

    @functools.cached_property
    def work(self) -> list[hlo_cost.Work]:
        """What each instruction of the compiler's program does on a device, and how often."""
        return hlo_cost.work(Program(self.hlo), m.mesh_axes(self._module))

    @property
    def collectives(self) -> list[hlo_cost.Collective]:
        """Exchanges between devices: kind, bytes, mesh axes, and how often, loops included."""
        return [w.collective for w in self.work if w.collective is not None]

    def _modelled(self) -> Cost:
        flops = products = moved = sent = 0.0
        for w in self.work:
            flops, products, moved = (
                flops + w.flops * w.count,
                products + w.product_flops * w.count,
                moved + w.bytes * w.count,
            )
            sent += links.seconds(w.collective, self._target) * w.count if w.collective else 0.0
        return Cost(flops, moved, roofline.total_seconds(self.work, self._target) + sent, products, sent)

    @property
    def rewrites(self) -> dict[str, int]:
        return dict(self._context.report.counts.most_common())

    @property
    def reverted(self) -> dict[str, str]:
        return dict(self._context.report.reverted)

    @property
    def measured(self) -> dict[str, str]:
        """What the first call measured of groups of rewrites and of kernels, in words; empty where nothing was."""
        return dict(self._context.measured)

    @property
    def fusions(self) -> dict[str, int]:
        """How many of each fused op the module holds for the target's kernels: `{"kpx.rms_norm": 65}`."""
        return dict(self._context.fusions)

    @property
    def kernels(self) -> dict[str, str]:
        return dict(self._context.kernels)

    @property
    def precisions(self) -> dict[str, int]:
        return dict(self._context.precisions)

    @property
    def emulated(self) -> dict[str, str]:
        return dict(self._context.emulated)

    @property
    def layers(self) -> dict[str, str]:
        return dict(self._context.layers)

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._context.seconds)

    def __repr__(self):
        applied = sum(self.rewrites.values())
        return f"<kpx.Compiled for {self._target}: {applied} rewrites, {len(self.kernels)} kernels>"
