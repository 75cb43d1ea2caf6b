"""PyTorch's own op database through kpx: which ops pass, which are unsupported, which are wrong.

`python -m bench.opinfo [--json FILE [--keep]] [--dtype f32 ...] [--samples N] [--no-gradients] [--views]
[OP ...]`

Every sample takes some hours on two cores: `--json` is written as ops end, and with `--keep` a run of some ops or
dtypes replaces those in the file and leaves the others.

Every sample input of every op is captured, compiled and run by `kpx.optimize`, many samples in one model; where one of
them fails, they are halved until it stands alone. A value passes where it is as close to PyTorch's result in double
precision as PyTorch's own is, up to a tolerance. With `--views` the graph takes a view of every tensor first: permuted,
sliced, stepped, expanded, or a permuted copy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections import Counter
from collections.abc import Callable
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


def run_op(name: str, dtypes: tuple[str, ...], limit: int | None, gradients: bool, views: bool) -> dict[str, Any]:
    """The verdicts on one op, by dtype: `{dtype: {forward: {...}, gradient: {...}}}`."""
    import warnings

    warnings.simplefilter("ignore")
    from bench.opinfo_check import check

    return {dtype: check(name, dtype, limit, gradients and dtype == "f32", views) for dtype in dtypes}


def run_all(
    ops: list[str],
    dtypes: tuple[str, ...],
    limit: int | None,
    gradients: bool,
    views: bool,
    workers: int,
    ended: Callable[[dict[str, Any]], Any],
) -> dict:
    """Every op's verdicts. An op whose process dies is reported as crashed, and the others go on.

    `ended` is given the results so far after each 25 ops.
    """
    results: dict[str, Any] = {}
    left = list(ops)
    while left:
        context = multiprocessing.get_context("spawn")
        # One process serves many ops; those in flight when one dies are run again, alone.
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(run_op, op, dtypes, limit, gradients, views): op for op in left}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    if len(results) % 25 == 0 or len(results) == len(ops):
                        print(f"  {len(results)}/{len(ops)} ops, last {futures[future]}", flush=True)
                        ended(results)
            except BrokenProcessPool:
                pass
        remaining = [op for op in left if op not in results]
        if len(remaining) == len(left) or (remaining and len(remaining) <= workers):
            for op in remaining:
                results[op] = _alone(op, dtypes, limit, gradients, views)
            remaining = []
        left = remaining
    return results


def _alone(op: str, dtypes: tuple[str, ...], limit: int | None, gradients: bool, views: bool) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(run_op, op, dtypes, limit, gradients, views).result()
        except BrokenProcessPool:
            crashed = {"verdict": "wrong", "reason": "the process died", "samples": 0}
            return {dtype: {"forward": crashed} for dtype in dtypes}


def summary(results: dict) -> dict[str, dict[str, int]]:
    """How many ops have each verdict, by dtype and pass, and how many samples they were given."""
    counts: dict[str, Counter] = {}
    for verdicts in results.values():
        for dtype, parts in verdicts.items():
            for part, found in parts.items():
                counted = counts.setdefault(f"{dtype} {part}", Counter())
                counted[found["verdict"]] += 1
                counted["samples"] += found.get("samples", 0)
    return {k: dict(v) for k, v in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="only these (name or name.variant)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", action="store_true", help="keep what the file says of other ops and dtypes")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; all of them by default")
    parser.add_argument("--samples", type=int, help="at most so many samples an op, spread evenly; all by default")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--views", action="store_true", help="on views that the graph takes of its inputs")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    every = names()
    ops = [n for n in every if n in given.ops or n.partition(".variant:")[0] in given.ops] if given.ops else every
    if given.ops and not ops:
        parser.error(f"no op of the database is named {given.ops}")
    dtypes = tuple(given.dtype or DTYPES)
    kept = {}
    if given.json and given.keep:
        with open(given.json) as file:
            kept = json.load(file)["ops"]

    def save(results: dict) -> dict:
        merged = {op: kept.get(op, {}) | results.get(op, {}) for op in {*kept, *results}}
        if given.json:
            write(given.json, merged)
        return merged

    results = run_all(ops, dtypes, given.samples, not given.no_gradients, given.views, given.workers, save)
    report(save(results))


def write(path: str, results: dict) -> None:
    import jax
    import torch

    record = {
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
        "summary": summary(results),
        "ops": dict(sorted(results.items())),
    }
    with open(path, "w") as file:
        json.dump(record, file, indent=1)
        file.write("\n")


def report(results: dict) -> None:
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
    totals = Table("dtype and pass", "pass", "unsupported", "wrong", "left out", "samples", title="Ops by verdict")
    for key, counts in summary(results).items():
        totals.add_row(key, *(str(counts.get(v, 0)) for v in ("pass", "unsupported", "wrong", "left out", "samples")))
    console.print(totals)


if __name__ == "__main__":
    main()
