"""What kpx costs beside the computation: `python -m bench.overhead [--json FILE]`.

Call overhead: optimized modules of one and of 200 parameters against their bare executables, torch.compile and eager
PyTorch, called in turn. Memory: the
resident size after optimizing a model, less that before it was made, over the weights' bytes, in a process of
its own. Compile time: kpx's own passes against XLA's compilation of the same module.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kpx.observe.demo import versions
from kpx.observe.timing import interleaved

_PARAMETERS = (1, 200)
_MEMORY_CASES = ("bert", "gpt2", "resnet50")


class _Scales(torch.nn.Module):
    """Many parameters, and next to nothing to compute."""

    def __init__(self, count: int):
        super().__init__()
        self.scales = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(4)) for _ in range(count))

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return x


def call_overhead(parameters: int, rounds: int = 51) -> dict[str, float]:
    """Return median microseconds of a call: kpx, its bare executable, torch.compile with inductor, eager PyTorch.

    `over_inductor` is kpx's call over torch.compile's, both of a graph that computes next to nothing.
    """
    import kpx
    from kpx.bridges.torch.tensors import to_array

    x, model = torch.ones(4), _Scales(parameters).eval()
    optimized, inductor = kpx.optimize(model), torch.compile(model)
    with torch.no_grad():
        optimized(x)
        inductor(x)
        (entry,) = optimized._entries.values()
        program, array = entry.program, to_array(x, kpx.Target("cpu").device)
        calls = {
            "kpx": lambda: optimized(x),
            "bare": lambda: program.executable(*program.held, array)[0].block_until_ready(),
            "inductor": lambda: inductor(x),
            "eager": lambda: model(x),
        }
        interleaved(calls, 3)
        medians = interleaved(calls, rounds)
    found = {name: 1e6 * seconds for name, seconds in medians.items()}
    return {**found, "overhead": found["kpx"] - found["bare"], "over_inductor": found["kpx"] / found["inductor"]}


def memory(case: str) -> dict[str, float]:
    """Resident bytes over weights' bytes after optimizing a case, measured in a fresh process."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.overhead", "--memory-of", case], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory_of(case: str) -> dict[str, float]:
    import kpx
    from bench.cases import CASES

    small, inputs = CASES[case].make(small=True)
    with torch.no_grad():
        kpx.optimize(small)(**inputs)  # imports, XLA's threads and caches
        del small
        before = _resident()
        model, inputs = CASES[case].make()
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        optimized = kpx.optimize(model, example_kwargs=inputs)
        after = _resident()
        freed = optimized.free_originals()
        left = _resident()
        optimized(**inputs)
        called = _resident()
        ((entry),) = optimized._entries.values()
    temporary = entry.program.compiled.memory.temp_bytes
    return {
        "weights_bytes": weights,
        "resident_over_weights": (after - before) / weights,
        "originals_freed_bytes": freed,
        "resident_over_weights_originals_freed": (left - before) / weights,
        "resident_over_weights_after_a_call": (called - before) / weights,
        "held_over_weights": sum(a.nbytes for a in entry.program.held) / weights,
        "temporary_bytes": temporary,
    }


def compile_share(case: str) -> dict[str, float]:
    """Seconds of kpx's own passes and of XLA's compilation for a case, and their ratio."""
    import jax

    import kpx
    from bench.cases import CASES
    from kpx.runtime import build

    model, inputs = CASES[case].make()
    taken: list[float] = []
    original = build.compile_lowered

    def timed(*args):
        start = time.perf_counter()
        result = original(*args)
        taken.append(time.perf_counter() - start)
        return result

    build.compile_lowered = timed
    try:
        jax.clear_caches()
        compiled = kpx.compile(model, **inputs)
    finally:
        build.compile_lowered = original
    ours, xla = sum(s for stage, s in compiled.seconds.items() if stage not in ("trace", "compile")), sum(taken)
    return {"passes_seconds": ours, "xla_seconds": xla, "share": ours / xla}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(json.dumps(_memory_of(options.memory_of)))
        return 0
    from bench.cases import CASES

    result: dict[str, Any] = {"versions": versions(), "threads": torch.get_num_threads()}
    console = Console(stderr=True)
    with console.status("call overhead"):
        result["call_microseconds"] = {str(count): call_overhead(count) for count in _PARAMETERS}
    result["memory"] = {}
    for case in _MEMORY_CASES:
        with console.status(f"memory of {case}"):
            result["memory"][case] = memory(case)
    result["compile"] = {}
    for case in CASES:
        with console.status(f"compiling {case}"):
            compile_share(case)  # the first compilation of a process pays for imports
            result["compile"][case] = compile_share(case)
    _show(Console(), result)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
    return 0


def _show(console: Console, result: dict[str, Any]) -> None:
    for count, call in result["call_microseconds"].items():
        console.print(
            f"A call with {count} parameters: {call['kpx']:.1f} us, bare executable {call['bare']:.1f} us, torch.compile "
            f"{call['inductor']:.1f} us, eager {call['eager']:.1f} us; {call['over_inductor']:.2f} of torch.compile's"
        )
    table = Table(title="Resident size over weights")
    for column in ("case", "after optimize", "originals freed", "after a call", "held by kpx"):
        table.add_column(column, justify="right")
    for case, row in result["memory"].items():
        cells = (
            "resident_over_weights",
            "resident_over_weights_originals_freed",
            "resident_over_weights_after_a_call",
            "held_over_weights",
        )
        table.add_row(case, *(f"{row[c]:.2f}x" for c in cells))
    console.print(table)
    table = Table(title="Compile time")
    for column in ("case", "kpx's passes", "XLA", "share"):
        table.add_column(column, justify="right")
    for case, row in result["compile"].items():
        table.add_row(case, f"{row['passes_seconds']:.2f} s", f"{row['xla_seconds']:.2f} s", f"{row['share']:.0%}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
