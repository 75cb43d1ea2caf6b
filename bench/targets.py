"""Every case of the benchmark, and a training step, compiled for machines that are not here.

`python -m bench.targets [--json FILE] [--small] [--pod]`

`--pod` compiles instead a training step of Llama 3.2 1B for 512 TPUs and 256 GPUs. Each row tells the vendor's own
compile time and what kpx adds to it in a warm worker, memory, predicted time, and FLOPs by hand where they are known.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import kpx
from bench import llama
from bench.cases import CASES
from kpx.hardware import plugins

TARGETS = ("tpu-v5e:2x2", "tpu-v6e:2x2", "tpu-v5p:2x2x1", "cuda:h100", "cuda:h200x8", "cuda:b200", "rocm:mi300x8")
POD = {"tpu-v5p:8x8x8": (512, 4096), "cuda:h100:32x8": (256, 4096)}  # batch and length
EXPERIMENTAL = ("xpu:pvc",)  # where its compiler is installed
_SMALL = llama.Sizes(width=256, hidden=512, layers=4, heads=8, kv_heads=2, vocabulary=1024)


def training_case(name: str, sizes: llama.Sizes, batch: int, length: int, model_axis: int) -> dict[str, Any]:
    """A training step, sharded over all of a target's devices."""
    target = kpx.Target(name)
    each = min(model_axis, target.device_count)
    step, specs = llama.training_step(sizes, target.mesh(fsdp=-1, model=each), batch, length)
    row = _row(lambda: kpx.compile(step, *specs, target=target))
    row["flops by hand"] = llama.step_flops(sizes, batch, length) / target.device_count
    return row


def model_case(name: str, case: str, small: bool) -> dict[str, Any]:
    """A model's forward pass, on one device."""
    model, inputs = CASES[case].make(small=small)
    return _row(lambda: kpx.compile(model, target=name, **inputs))


def _row(build) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = build()
    except kpx.KpxError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seconds = compiled.compile_seconds
    return {
        "seconds": time.perf_counter() - start,
        "vendor seconds": seconds["compile"],
        "beside the vendor's": seconds["prepare"] + seconds["describe"],
        "peak bytes": compiled.memory.peak_bytes,
        "fits": compiled.memory.fits,
        "product flops": compiled.cost.product_flops,
        "predicted seconds": compiled.cost.predicted_seconds,
        "collectives": len(compiled.collectives),
    }


def run(small: bool, pod: bool, progress: Console) -> dict[str, dict[str, Any]]:
    """Rows by target and case."""
    found: dict[str, dict[str, Any]] = {}
    if pod:
        for name, (batch, length) in POD.items():
            progress.print(f"a training step of 1.24 billion parameters for {name}")
            found[name] = {"llama 1B training step": training_case(name, llama.Sizes(), batch, length, 4)}
        return found
    for name in (*TARGETS, *EXPERIMENTAL):
        if name in EXPERIMENTAL and plugins.find(kpx.Target(name).platform) is None:
            found[name] = {"all": {"not run": "its compiler is not installed"}}
            continue
        progress.print(f"compiling for {name}")
        found[name] = {case: model_case(name, case, small) for case in CASES}
        found[name]["training step"] = training_case(name, _SMALL, 16, 128, 2)
    return found


def show(console: Console, found: dict[str, dict[str, Any]]) -> None:
    """Prints the rows."""
    table = Table()
    for column in ("target", "case", "in all", "vendor's", "peak MiB", "fits", "GFLOP", "by hand", "predicted ms"):
        table.add_column(column, justify="left" if column in ("target", "case") else "right")
    for name, rows in found.items():
        for case, row in rows.items():
            if "error" in row or "not run" in row:
                table.add_row(name, case, row["error"][:80] if "error" in row else f"not run: {row['not run']}")
                continue
            hand = row.get("flops by hand")
            table.add_row(
                name, case, f"{row['seconds']:.1f} s", f"{row['vendor seconds']:.1f} s", f"{row['peak bytes'] / 2**20:.0f}",
                str(row["fits"]), f"{row['product flops'] / 1e9:.4g}", "-" if hand is None else f"{hand / 1e9:.4g}",
                f"{1e3 * row['predicted seconds']:.3g}",
            )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pod", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = run(given.small, given.pod, Console(stderr=True))
    show(Console(), found)
    if given.json:
        with open(given.json, "w") as file:
            record = {"date": time.strftime("%Y-%m-%d"), "versions": {"jax": jax.__version__}, "targets": found}
            json.dump(record, file, indent=1)
            file.write("\n")
    return int(any("error" in row for rows in found.values() for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
