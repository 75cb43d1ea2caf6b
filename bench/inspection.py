"""What kpx adds to a vendor's compile in a warm worker, and how long an explanation's page takes to make.

`python -m bench.inspection [--json FILE] [--rounds 5]`

The bars: a second compile adds at most 100 ms over the vendor's own time; the page of a 32-layer Llama is made in under
10 s once it is compiled. Each program is compiled once to warm the worker, and then in turn with the others.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import torch
from rich.console import Console
from rich.table import Table

import kpx
from bench import llama
from bench.conversion import llama as torch_llama
from kpx.hardware import cpu
from kpx.observe.explain import Explanation, report
from kpx.runtime.compiled import Compiled

_STEP = llama.Sizes(width=256, hidden=512, layers=4, heads=8, kv_heads=2, vocabulary=1024)
_EXPLAINED = ("cuda:h100", "tpu-v5e", "rocm:mi300x")


def programs() -> dict[str, Callable[[], Compiled]]:
    """What to compile, by name."""
    found = {}
    for name, sizes, batch, length in (
        ("tpu-v5e:4x4", _STEP, 16, 128),
        ("cuda:h100x8", _STEP, 16, 128),
        ("cuda:h100:32x8", llama.Sizes(), 256, 4096),
    ):
        target = kpx.Target(name)
        step, specs = llama.training_step(sizes, target.mesh(fsdp=-1, model=4), batch, length)
        found[f"training step, {name}"] = lambda t=target, s=step, a=specs: kpx.compile(s, *a, target=t)
    for name in ("tpu-v5e", "cuda:h100", "rocm:mi300x"):
        product = jax.ShapeDtypeStruct((1024, 1024), "float32")
        found[f"one product, {name}"] = lambda t=name, x=product: kpx.compile(lambda a, b: a @ b, x, x, target=t)
    return found


def compiles(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the vendor's own compile, beside it, and until its program is there as text: medians over rounds in
    which each program is compiled in turn."""
    made = programs()
    for build in made.values():
        build()
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    text: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, build in made.items():
            compiled = build()
            start = time.perf_counter()
            _ = compiled.hlo  # which the worker prints once it has answered
            seconds[name].append(compiled.compile_seconds)
            text[name].append(time.perf_counter() - start)
    return {
        name: {
            "vendor": statistics.median(s["compile"] for s in taken),
            "beside": statistics.median(sum(s.values()) - s["compile"] for s in taken),
            "text": statistics.median(text[name]),
        }
        for name, taken in seconds.items()
    }


def pages(layers: int) -> dict[str, dict[str, float]]:
    """Seconds from a compiled Llama to its page, and the page's bytes, by target."""
    model, inputs = torch_llama(layers)
    found = {}
    for name in _EXPLAINED:
        compiled = kpx.compile(model, target=name, **inputs)
        start = time.perf_counter()
        explanation = Explanation(type(model).__name__, (report(compiled),))
        with tempfile.TemporaryDirectory() as folder:
            page = explanation.to_html(pathlib.Path(folder, "page.html"))
            found[name] = {"seconds": time.perf_counter() - start, "bytes": page.stat().st_size}
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints both."""
    table = Table(
        "program",
        "vendor's compile",
        "kpx adds",
        "its text, if asked for at once",
        title="a second compile in a warm worker",
    )
    for name, row in result["compiles"].items():
        milliseconds = (f"{1e3 * row[key]:.0f} ms" for key in ("beside", "text"))
        table.add_row(name, f"{row['vendor']:.2f} s", *milliseconds)
    console.print(table)
    table = Table("target", "made in", "size", title="the page of a 32-layer Llama, once compiled")
    for name, row in result["pages"].items():
        table.add_row(name, f"{row['seconds']:.2f} s", f"{row['bytes'] / 1024:.0f} KiB")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": cpu.model(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "compiles": compiles(given.rounds),
        "pages": pages(32),
    }
    show(Console(), result)
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
