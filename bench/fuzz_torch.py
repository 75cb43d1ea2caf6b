"""Random PyTorch modules against eager PyTorch: `python -m bench.fuzz --torch [--seed N] [--count 5000] [--log FILE]`.

The programs, the comparison and the explained differences are those of the tests (`tests/torch_fuzzing.py`). Each seed is a
module; `--seed N --count 1` runs one alone, and prints it reduced to its smallest lines. With `--log FILE` each outcome is a
line of JSON in the file, and seeds that are there already are not run again.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import multiprocessing
import os
import pathlib
import re
import time
from typing import Any

from rich.console import Console
from rich.progress import track

FIRST = 100_000  # the tests have the seeds below


def check_one(work: tuple[int, tuple[str, ...], bool]) -> dict[str, Any]:
    """Compare a seed's module; one that is wrong, or refused, is reduced."""
    seed, without, reduces = work
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.disable(logging.WARNING)  # of PyTorch's tracing
    from tests.torch_fuzzing import case_of, run, shrink

    start = time.time()
    case = case_of(seed, without)
    outcome = run(case)
    if outcome.is_reason_to_look and reduces:
        case, outcome = shrink(case, outcome)
    result = {
        "seed": seed,
        "door": case.door,
        "kind": outcome.kind,
        "what": outcome.what,
        "seconds": time.time() - start,
    }
    if outcome.is_reason_to_look:
        inputs = enumerate(case.program.make_inputs())
        used = [(i, t) for i, t in inputs if re.search(rf"\ba{i}\b", case.source.partition("\n")[2])]
        result["inputs"] = [f"a{i}: {str(t.dtype)[6:]}{list(t.shape)}, strides {t.stride()}" for i, t in used]
        result["source"] = case.source
    return result


def main(arguments=None) -> int:
    """Run the command line; the exit code is 1 where something differs that is not explained."""
    parser = argparse.ArgumentParser(prog="bench.fuzz --torch", description=__doc__)
    parser.add_argument("--seed", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--without", metavar="KINDS", default="", help="kinds of steps to leave out, with commas between"
    )
    parser.add_argument("--log", metavar="FILE", help="outcomes, a line each; those that it holds are not run again")
    options = parser.parse_args(arguments)
    without = tuple(filter(None, options.without.split(",")))
    log = pathlib.Path(options.log) if options.log else None
    results = {r["seed"]: r for r in map(json.loads, log.read_text().splitlines())} if log and log.exists() else {}
    seeds = [s for s in range(options.seed, options.seed + options.count) if s not in results]
    work = [(s, without, True) for s in seeds]
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=60) as pool:
        for result in track(pool.imap_unordered(check_one, work), "checking", len(work), console=Console(stderr=True)):
            results[result["seed"]] = result
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            if result["kind"] in ("wrong", "crashed") or options.count == 1:
                print(shown(result), flush=True)
    return summary(list(results.values()))


def shown(result: dict[str, Any]) -> str:
    """Return an outcome as text: what differs, the inputs and the source."""
    lines = [f"seed {result['seed']} ({result['door']}): {result['kind']}", *result["what"], *result.get("inputs", [])]
    return "\n  ".join([*lines, *result.get("source", "").splitlines()])


def summary(results: list[dict[str, Any]]) -> int:
    """Print counts: by kind, refusals by reason, explained differences by row of the documentation's table."""
    kinds = collections.Counter(r["kind"] for r in results)
    print(f"{len(results)} modules: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    for kind in ("explained", "refused"):
        reasons = collections.Counter(w for r in results if r["kind"] == kind for w in r["what"][:1])
        for reason, count in reasons.most_common():
            print(f"  {kind}, {count}: {reason}")
    return int(bool(kinds["wrong"] + kinds["crashed"]))
