"""What a compilation gives: something to call, and what is known about it."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from kpx.hardware.target import Target
from kpx.ir import cost as ir_cost
from kpx.ir import module as m
from kpx.jax_internals import serialized
from kpx.pipeline import Context
from kpx.runtime.absent import AbsentExecutable


@dataclass(frozen=True)
class Memory:
    """What an executable needs of one device, in bytes, by its compiler's own account.

    Attributes:
        device_bytes: what a device has; None where the spec table does not know it (the CPU).
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    device_bytes: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None where that is not known."""
        return None if self.device_bytes is None else self.peak_bytes <= self.device_bytes


@dataclass(frozen=True)
class Cost:
    """What a call computes and moves, and how long the target would take at its peak (a model)."""

    flops: float
    bytes: float
    predicted_seconds: float


class Compiled:
    """A compiled model or function: what is known about it, and, where its target is on this machine, the call.

    Calling it takes what the function or model takes, at the shapes and dtypes it was compiled for.

    Attributes:
        stablehlo: the module that runs at each call, as text, after every rewrite.
        prepare_stablehlo: the module that ran once over the weights, or None.
        rewrites: how often each rewrite was applied.
        reverted: rewrites that were taken back, with the reason.
        kernels: what each composite runs as.
        seconds: how long each stage of ours took.
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
        peak = max(getattr(stats, "peak_memory_in_bytes", 0), total)  # the CPU's leaves temporaries out
        spec = self._target.spec
        return Memory(arguments, outputs, temporary, peak, spec and spec.memory)

    @functools.cached_property
    def cost(self) -> Cost:
        """See `Cost`; the first access measures the target's peak."""
        counted = ir_cost.cost(self._module)
        return Cost(counted.flops, counted.bytes, counted.seconds(*self._target.peak()))

    @property
    def rewrites(self) -> dict[str, int]:
        return dict(self._context.report.counts.most_common())

    @property
    def reverted(self) -> dict[str, str]:
        return dict(self._context.report.reverted)

    @property
    def kernels(self) -> dict[str, str]:
        return dict(self._context.kernels)

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._context.seconds)

    def __repr__(self):
        applied = sum(self.rewrites.values())
        return f"<kpx.Compiled for {self._target}: {applied} rewrites, {len(self.kernels)} kernels>"
