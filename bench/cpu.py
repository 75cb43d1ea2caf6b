"""Each case against its peers on the CPU: `python -m bench.cpu [--json FILE] [CASE ...]`.

All ways of running a case are timed in turn within one process, so that noise hits all alike; figures are
medians, and ratios are taken within the run. A row's fraction of the limit is how long its products would take at the
fastest product that was measured in the run, or its arrays at the bandwidth that was, over what kpx took.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils import _pytree as pytree

import kpx
from bench.cases import CASES, Case
from bench.peers import PEERS, optimized
from kpx.hardware.cpu import model
from kpx.observe.demo import versions
from kpx.observe.timing import interleaved, once

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def measure(case: Case, dtype: torch.dtype, rounds: int, peers: dict[str, Any], small: bool) -> dict[str, Any]:
    """First-call and median seconds of each peer on a case; for those that give tensors, the distance from eager.

    The distance is the root-mean-square difference over the root mean square of eager's outputs, the largest of all.
    """
    model, inputs = case.make(small=small, dtype=dtype)
    if "input" in inputs:  # models of one positional input
        model, inputs = _Named(model), {"x": inputs["input"]}
    rows: dict[str, Any] = {}
    calls = {}
    wanted: list[torch.Tensor] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, build in peers.items():
            calls_made: list[Any] = []

            def first(build=build, calls_made=calls_made):
                call = build(model, inputs)
                calls_made.extend((call, call()))

            try:
                seconds = once(first)
            except Exception as error:  # each peer fails with types of its own, and the table says so
                rows[name] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
                continue
            rows[name] = {"first_call_seconds": seconds}
            calls[name], outputs = calls_made
            found = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
            if name == "torch eager":
                wanted = found
            elif wanted and len(found) == len(wanted):
                rows[name]["distance_from_eager"] = max(map(_distance, found, wanted))
        interleaved(calls, 1)
        for name, seconds in interleaved(calls, rounds).items():
            rows[name]["median_seconds"] = seconds
    gc.collect()
    return rows


def _distance(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


class _Named(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """How many times faster kpx is than each peer and the fastest, and its first call's share of torch.compile's."""
    ours = rows["kpx"]
    if "failed" in ours:
        return {}
    found = {
        f"over {name}": row["median_seconds"] / ours["median_seconds"]
        for name, row in rows.items()
        if "failed" not in row and not name.startswith("kpx")
    }
    if found:
        found["over the fastest"] = min(found.values())
    if "failed" not in rows.get("torch.compile", {"failed": ""}):
        found["first call / torch.compile's"] = ours["first_call_seconds"] / rows["torch.compile"]["first_call_seconds"]
    return found


def work(case: Case, dtype: torch.dtype, small: bool) -> dict[str, float]:
    """The FLOPs of a case's products, and the bytes of its weights and inputs, which any way of running it reads."""
    from kpx.ir import cost
    from kpx.ir import module as m

    model, inputs = case.make(small=small, dtype=dtype)
    given = inputs if "input" not in inputs else {}
    args = [inputs["input"]] if "input" in inputs else []
    compiled = kpx.compile(model, *args, config=kpx.Config(level="none", prepare=False), **given)
    held = [*model.parameters(), *model.buffers(), *inputs.values()]
    return {
        "product_flops": cost.product_flops(m.walk(compiled._module.operation)),
        "bytes": float(sum(t.nbytes for t in held)),
    }


def bandwidth() -> float:
    """Bytes a second of summing an array that no cache holds, by PyTorch on all threads."""
    a = torch.ones(1 << 26)
    seconds = interleaved({"sum": lambda: a.sum()}, 7)["sum"]
    return a.nbytes / seconds


def dot_limit(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of a 1024 x 1024 x 1024 product in this run, by PyTorch, by XLA and by a layer of kpx's."""
    import jax

    from kpx.bridges.torch.tensors import to_array
    from kpx.jax_internals import compute_in_callers_thread

    compute_in_callers_thread()  # as `kpx.optimize` does, and before the first client is made
    a = torch.randn(1024, 1024).to(dtype)
    array = to_array(a, jax.devices("cpu")[0])
    product = jax.jit(lambda x: jax.numpy.matmul(x, x, preferred_element_type="float32")).lower(array).compile()
    layer = torch.nn.Linear(1024, 1024, bias=False).to(dtype).eval()
    ours = kpx.optimize(layer, config=kpx.Config(measure_seconds=0))
    calls = {"torch": lambda: a @ a, "XLA": lambda: product(array).block_until_ready(), "kpx": lambda: ours(a)}
    torch.set_grad_enabled(False)
    interleaved(calls, 3)
    return {name: 2 * 1024**3 / seconds / 1e9 for name, seconds in interleaved(calls, 21).items()}


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints the figures as a table a dtype."""
    for dtype, cases in result["cases"].items():
        limit = ", ".join(f"{k} {v:.0f}" for k, v in result["dot_gflops"][dtype].items())
        table = Table(title=f"{dtype}: median ms (first call s); a 1024^3 product: {limit} GFLOP/s")
        table.add_column("case")
        names = list(next(iter(cases.values())))
        for name in names:
            table.add_column(name, justify="right")
        table.add_column("over torch.compile", justify="right")
        table.add_column("over the fastest", justify="right")
        table.add_column("of the limit", justify="right")
        for case, rows in cases.items():
            cells = [
                "failed" if "failed" in r else f"{r['median_seconds'] * 1e3:.1f} ({r['first_call_seconds']:.1f})"
                for r in rows.values()
            ]
            found = result["ratios"][dtype].get(case, {})
            told = [found.get(name) for name in ("over torch.compile", "over the fastest")]
            limit = result["fraction_of_limit"][dtype].get(case)
            table.add_row(
                case, *cells, *(f"{r:.2f}x" if r else "-" for r in told), f"{limit:.0%}" if limit else "-"
            )  # fmt: skip
        console.print(table)
        for case, rows in cases.items():
            for name, row in rows.items():
                if "failed" in row:
                    console.print(f"[yellow]{case}, {name}:[/yellow] {row['failed']}", markup=True, highlight=False)
    console.print(
        f"[dim]{result['machine']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; "
        f"{result['rounds']} rounds, interleaved[/dim]"
    )


def _limit(result: dict[str, Any], dtype: str, name: str, small: bool) -> None:
    """Notes what fraction of this machine's limit kpx reaches on a case."""
    ours = result["cases"][dtype][name].get("kpx", {"failed": ""})
    if "failed" in ours:
        return
    done = work(CASES[name], _DTYPES[dtype], small)
    flops = max(result["dot_gflops"][dtype].values()) * 1e9
    least = max(done["product_flops"] / flops, done["bytes"] / (result["bandwidth_gbytes"] * 1e9))
    result["fraction_of_limit"].setdefault(dtype, {})[name] = least / ours["median_seconds"]


def _write(path: str, result: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(result, file, indent=2)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.cpu", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--dtype", choices=[*_DTYPES, "both"], default="f32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; default: all")
    parser.add_argument("--high", action="store_true", help="also kpx with matmul_precision='high'")
    parser.add_argument("--small", action="store_true", help="the small versions that tests use")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    peers = {name: PEERS[name] for name in options.peers.split(",")}
    if options.high:
        peers["kpx (high)"] = functools.partial(optimized, matmul_precision="high")
    dtypes = list(_DTYPES) if options.dtype == "both" else [options.dtype]
    cases = options.cases or list(CASES)
    result: dict[str, Any] = {
        "machine": f"{model()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "rounds": options.rounds,
        "dot_gflops": {},
        "bandwidth_gbytes": bandwidth() / 1e9,
        "fraction_of_limit": {},
        "cases": {},
        "ratios": {},
    }
    progress_console = Console(stderr=True)
    with Progress(console=progress_console) as progress:
        task = progress.add_task("", total=len(dtypes) * len(cases))
        for dtype in dtypes:
            result["dot_gflops"][dtype] = dot_limit(_DTYPES[dtype])
            rows = result["cases"].setdefault(dtype, {})
            for name in cases:
                progress.update(task, description=f"{name}, {dtype}")
                rows[name] = measure(CASES[name], _DTYPES[dtype], options.rounds, peers, options.small)
                progress.advance(task)
                result["ratios"].setdefault(dtype, {})[name] = ratios(rows[name]) if "kpx" in peers else {}
                _limit(result, dtype, name, options.small)
                if options.json:
                    _write(options.json, result)
    for against in ("torch.compile", "the fastest"):
        overs = [r[f"over {against}"] for d in result["ratios"].values() for r in d.values() if f"over {against}" in r]
        if overs:
            result[f"geometric_mean_over_{against.replace(' ', '_').replace('.', '_')}"] = statistics.geometric_mean(
                overs
            )
    if options.json:
        _write(options.json, result)
    show(Console(), result)
    ours = [row["kpx"] for rows in result["cases"].values() for row in rows.values() if "kpx" in row]
    return int(any("failed" in row for row in ours))  # a peer may fail; kpx may not


if __name__ == "__main__":
    sys.exit(main())
