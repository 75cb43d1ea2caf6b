"""Executables for machines that are not here: compiled by a worker, and known by what it tells of them."""

from __future__ import annotations

import contextvars
import io
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kpx.config import Config
from kpx.errors import CompileError, OutOfMemoryError, TargetError
from kpx.hardware import gpu, tpu, xpu
from kpx.hardware import worker as workers
from kpx.hardware.target import Target
from kpx.ir import module as m
from kpx.ir.cost import type_bytes

PROGRESS: contextvars.ContextVar[workers.Progress | None] = contextvars.ContextVar("kpx_compile_progress", default=None)
"""Called while a worker compiles, where the command line shows how long it has been at it."""


@dataclass(frozen=True)
class MemoryStats:
    """A compiler's account of memory, in bytes and under JAX's names, for one device."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    alias_size_in_bytes: int
    generated_code_size_in_bytes: int
    peak_memory_in_bytes: int
    host_argument_size_in_bytes: int = 0
    host_output_size_in_bytes: int = 0
    host_temp_size_in_bytes: int = 0
    host_alias_size_in_bytes: int = 0


class AbsentExecutable:
    """What a worker compiled: everything but the call.

    Attributes:
        seconds: how long it took: `compile` is the vendor's own time; `prepare` (topology, parsing), `describe` and
            `exchange` (with the worker, waiting for it included) are what kpx adds.
        compiler_peak_bytes: the most memory that the worker held while it compiled.
        device_kind: what the vendor calls the device.
        remarks: what had to be done differently than usual.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, answer: Mapping[str, Any], request: dict[str, Any], target: Target, limit_s: float):
        self._answer, self._request, self._target, self._limit_s = dict(answer), request, target, limit_s
        self._text: str | None = None
        self.seconds: dict[str, float] = dict(answer["seconds"])
        self.compiler_peak_bytes: int = answer["peak_bytes"]
        self.device_kind: str = answer["device_kind"]

    def __call__(self, *args, **kwargs):
        found = ", ".join(sorted({d.device_kind for d in jax.devices()}))
        raise TargetError(
            f"This was compiled for {self._target}, which is not on this machine (JAX finds: {found}): it can be looked "
            "at, and not called. To run here, compile with `target=None`."
        )

    def as_text(self) -> str:
        """The compiler's optimized program (HLO), of one device."""
        if self._text is None:
            self._text = str(self._recall("hlo"))
        return self._text

    def memory_analysis(self) -> MemoryStats:
        """See `MemoryStats`."""
        given = self._answer["memory"]
        return MemoryStats(**{f"{name}_size_in_bytes": n for name, n in given.items() if name != "peak"},
                           peak_memory_in_bytes=given["peak"])  # fmt: skip

    def serialize(self) -> bytes:
        """The vendor's executable, as its runtime loads it.

        Raises:
            CompileError: the vendor's plugin cannot serialize, or compiling anew failed.
        """
        if self._target.platform == "xpu":
            raise CompileError(f"What was compiled for {self._target} cannot be saved: its plugin does not serialize.")
        return self._recall("serialize")

    def _recall(self, what: str) -> Any:
        """What the worker still knows of the executable, compiled anew where it has given it up or has ended."""
        worker = workers.worker(self._target)
        answer = worker.ask({"do": what, "id": self._answer["id"]}, self._limit_s)
        if answer[what] is None:
            self._answer["id"] = worker.ask(dict(self._request), self._limit_s)["id"]
            answer = worker.ask({"do": what, "id": self._answer["id"]}, self._limit_s)
        return answer[what]


def compile_absent(module: Any, target: Target, config: Config) -> AbsentExecutable:
    """Compiles a module for a machine that is not here; of several partitions, one on each of its devices.

    Raises:
        TargetError: the vendor's compiler is not installed; the command that installs it is in the error.
        OutOfMemoryError: the compiler says that the program does not fit the device.
        CompileError: it refused the module, aborted, or took too long; its words are in the error.
    """
    bytecode = io.BytesIO()
    module.operation.write_bytecode(bytecode)
    name, options = _topology(target)
    partitions = m.partitions(module)
    if partitions not in (1, target.device_count):
        raise CompileError(
            f"The module is partitioned over {partitions} devices, and {target} has {target.device_count}. Make the "
            f"shardings from `kpx.Target({target.text!r}).mesh(...)`."
        )
    request = {
        "do": "compile",
        "module": bytecode.getvalue(),
        "topology": name,
        "topology_options": options,
        "mesh": m.mesh_shape(module) if partitions > 1 else (),
        "slices": target.slices,
        "options": target.compiler_options(module),
    }
    try:
        return _ask(request, target, config)
    except CompileError as error:
        if _UNTILED not in str(error):
            raise (_out_of_memory(str(error), module, target) or _refused(str(error), target)) from None
    # A fault of XLA's fusions of products on GPUs, at shapes that its tiles do not divide.
    request["options"] = {**request["options"], "xla_gpu_enable_triton_gemm": False}
    try:
        executable = _ask(request, target, config)
    except CompileError as error:
        raise _refused(str(error), target) from None
    executable.remarks = (
        "XLA could not tile a product that it had fused, so that products were left to the vendor's library "
        "(xla_gpu_enable_triton_gemm=False).",
    )
    return executable


_UNTILED = "Couldn't find output tile sizes"


def _ask(request: dict[str, Any], target: Target, config: Config) -> AbsentExecutable:
    worker = workers.worker(target)
    started = time.perf_counter()
    answer = worker.ask(dict(request), config.compile_seconds, PROGRESS.get())
    seconds = answer["seconds"]
    seconds["exchange"] = time.perf_counter() - started - sum(seconds.values())
    executable = AbsentExecutable(answer, dict(request), target, config.compile_seconds)
    executable.remarks = (xpu.REMARK,) if target.platform == "xpu" else ()
    return executable


def _topology(target: Target) -> tuple[str, dict[str, Any]]:
    chip = target.spec
    if chip is None:
        return "", {}
    if target.platform == "tpu":
        return tpu.topology(chip, target.shape, target.slices)
    return gpu.topology(chip, *target.shape)


def _refused(words: str, target: Target) -> CompileError:
    return CompileError(
        f"The compiler for {target} did not compile the module. {words}\n"
        "Try `Config(level='none')`; if that compiles, please report the module (KPX_FUEL=n finds the rewrite)."
    )


# What does not fit ------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SAYINGS = (  # libtpu's, of what is used and what there is
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) (?:hbm|HBM)",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)
_LISTED = 5  # buffers in an error


@dataclass(frozen=True)
class Buffer:
    """A large value of a program: its bytes, its type, and the operation and source line that it comes from."""

    bytes: int
    type: str
    operation: str
    source: str


def _out_of_memory(words: str, module: Any, target: Target) -> OutOfMemoryError | None:
    """What libtpu says when a program does not fit, in our words; None where it says something else."""
    found = next((f for f in (re.search(saying, words) for saying in _SAYINGS) if f), None)
    if "RESOURCE_EXHAUSTED" not in words or found is None:
        return None
    used, available = (round(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    buffers = tuple(_largest(module))
    gib = 2**30
    devices = m.partitions(module)
    whole = f" (whole: {devices} devices share them)" if devices > 1 else ""
    lines = [
        f"The program does not fit {target}: its compiler counts {used / gib:.2f} GiB for a device, which has "
        f"{available / gib:.2f} GiB. Its largest values{whole}:",
        *("  " + ", ".join(filter(None, (f"{b.bytes / gib:.2f} GiB", b.type, b.operation, b.source))) for b in buffers),
        f"What would make it fit: shardings over {'' if devices == 1 else 'more '}devices, {math.ceil(used / available)} "
        f"times as many at least (`kpx.Target(...).mesh(...)`); a smaller batch; `jax.checkpoint` around repeated layers "
        "where their activations are the largest; bf16 for f32; or a device with more memory.",
        f"The compiler's words: {words}",
    ]
    return OutOfMemoryError("\n".join(lines), used, available, buffers)


def _largest(module: Any) -> list[Buffer]:
    """A module's largest values, one a source line."""
    found: dict[tuple[str, str], Buffer] = {}
    main = m.main(module)
    for argument in m.entry_block(main).arguments:
        _keep(found, argument, f"argument {argument.arg_number}, `{m.source(argument)[0]}`", "")
    for op in m.walk(main):
        operation, place = m.source(op)
        for result in op.results:
            _keep(found, result, operation, place)
    return sorted(found.values(), key=lambda b: -b.bytes)[:_LISTED]


def _keep(found: dict[tuple[str, str], Buffer], value: Any, operation: str, place: str) -> None:
    size = int(type_bytes(value.type))
    if size > (found[operation, place].bytes if (operation, place) in found else 0):
        found[operation, place] = Buffer(size, str(value.type).removeprefix("tensor"), operation, place)
