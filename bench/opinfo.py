"""PyTorch's own op database through kpx: which ops pass, which are unsupported, which are wrong.

`python -m bench.opinfo [--json FILE] [--dtype f32 ...] [--samples N] [--no-gradients] [OP ...]`

Every sample input of every op is captured, compiled and run by `kpx.optimize`, many samples in one model; where one of
them fails, they are halved until it stands alone. A value passes where it is as close to PyTorch's result in double
precision as PyTorch's own is, up to a tolerance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

DTYPES = ("f32", "bf16", "int64", "bool", "complex64")
CHUNK = 24


def names() -> list[str]:
    """Every op of the database, `name` or `name.variant`, once."""
    from torch.testing._internal.common_methods_invocations import op_db

    from bench.opinfo_check import op_name

    return sorted({op_name(op) for op in op_db})


def run_op(name: str, dtypes: tuple[str, ...], limit: int | None, gradients: bool) -> dict[str, Any]:
    """The verdicts on one op, by dtype: `{dtype: {forward: {...}, gradient: {...}}}`."""
    import warnings

    warnings.simplefilter("ignore")
    from bench.opinfo_check import check

    return {dtype: check(name, dtype, limit, gradients and dtype == "f32") for dtype in dtypes}


def run_all(ops: list[str], dtypes: tuple[str, ...], limit: int | None, gradients: bool, workers: int) -> dict:
    """Every op's verdicts. An op whose process dies is reported as crashed, and the others go on."""
    results: dict[str, Any] = {}
    left = list(ops)
    while left:
        context = multiprocessing.get_context("spawn")
        # One process serves many ops; those in flight when one dies are run again, alone.
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(run_op, op, dtypes, limit, gradients): op for op in left}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    _progress(len(results), len(ops), futures[future])
            except BrokenProcessPool:
                pass
        remaining = [op for op in left if op not in results]
        if len(remaining) == len(left) or (remaining and len(remaining) <= workers):
            for op in remaining:
                results[op] = _alone(op, dtypes, limit, gradients)
            remaining = []
        left = remaining
    return results


def _alone(op: str, dtypes: tuple[str, ...], limit: int | None, gradients: bool) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(run_op, op, dtypes, limit, gradients).result()
        except BrokenProcessPool:
            crashed = {"verdict": "wrong", "reason": "the process died", "samples": 0}
            return {dtype: {"forward": crashed} for dtype in dtypes}


def _progress(done: int, total: int, op: str) -> None:
    if done % 25 == 0 or done == total:
        print(f"  {done}/{total} ops, last {op}", flush=True)


def summary(results: dict) -> dict[str, dict[str, int]]:
    """How many ops have each verdict, by dtype and pass."""
    counts: dict[str, Counter] = {}
    for verdicts in results.values():
        for dtype, parts in verdicts.items():
            for part, found in parts.items():
                counts.setdefault(f"{dtype} {part}", Counter())[found["verdict"]] += 1
    return {k: dict(v) for k, v in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="only these (name or name.variant)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; all of them by default")
    parser.add_argument("--samples", type=int, help="at most so many samples an op, spread evenly; all by default")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    every = names()
    ops = [n for n in every if n in given.ops or n.partition(".variant:")[0] in given.ops] if given.ops else every
    if given.ops and not ops:
        parser.error(f"no op of the database is named {given.ops}")
    dtypes = tuple(given.dtype or DTYPES)
    start = time.monotonic()
    results = run_all(ops, dtypes, given.samples, not given.no_gradients, given.workers)
    report(results, time.monotonic() - start, given)


def report(results: dict, seconds: float, given: argparse.Namespace) -> None:
    import jax
    import torch
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("op", "dtype", "pass", "verdict", "why", title="Ops that did not pass")
    for name, verdicts in sorted(results.items()):
        for dtype, parts in verdicts.items():
            for part, found in parts.items():
                if found["verdict"] in ("unsupported", "wrong"):
                    table.add_row(name, dtype, part, found["verdict"], found.get("reason", "").split("\n")[0][:200])
    console.print(table)
    totals = Table("dtype and pass", "pass", "unsupported", "wrong", "left out", title="Ops by verdict")
    for key, counts in summary(results).items():
        totals.add_row(key, *(str(counts.get(v, 0)) for v in ("pass", "unsupported", "wrong", "left out")))
    console.print(totals)
    if given.json:
        record = {
            "versions": {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "date": time.strftime("%Y-%m-%d"),
            "minutes": round(seconds / 60, 1),
            "samples_per_op": given.samples or "all",
            "summary": summary(results),
            "ops": dict(sorted(results.items())),
        }
        with open(given.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
