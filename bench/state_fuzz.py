"""Sequences of mutations and calls, optimized against eager: `python -m bench.state_fuzz [--count 3000] [--json FILE]`.

The models, the mutations and the comparison are those of the tests (`tests/bridges/state`); here are more sequences.
With `--json`, each sequence's result is appended as it ends, and a later run goes on where an earlier one stopped.
`--seed N --steps K` runs one sequence again: its first K steps, or those of a comma-separated list (`0,3,`; `none`).
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import sys
import warnings
from typing import Any

from rich.console import Console
from rich.progress import track


def _prepare() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("KPX_MEASURE_SECONDS", "0")
    import logging

    import torch

    torch._logging.set_logs(all=logging.ERROR)  # graph breaks and recompilations are what is provoked here
    warnings.simplefilter("ignore")


def check_one(task: tuple[int, str | None]) -> dict[str, Any]:
    """Run one sequence; return which mutations applied, and the report of a difference."""
    _prepare()
    from tests.bridges.state import session

    seed, door = task
    applied: list[str] = []
    try:
        report = session.check(seed, door, applied)
    except Exception as error:  # a fault of the harness must not end 3,000 sequences
        report = f"--seed {seed}: the harness raised {type(error).__name__}: {str(error)[:1000]}"
    return {"seed": seed, "applied": applied, "report": report}


def repeat(seed: int, steps: str | None, door: str | None, kind: str | None) -> int:
    """Run one sequence again and print where it differs."""
    _prepare()
    from tests.bridges.state import session

    drawn = session.sequence(seed, door, kind)
    keep = _indices(steps, len(drawn.steps))
    for index in keep:
        print(f"{index}: {drawn.steps[index].name}")
    failure = session.run(drawn, keep)
    if failure is None:
        print(f"{drawn.kind} by {drawn.door}: equal after each step")
        return 0
    print(session.report(drawn, failure) if steps is None else f"step {failure.step}: {failure.message}")
    return 1


def _indices(text: str | None, count: int) -> list[int]:
    if text is None:
        return list(range(count))
    if text == "none":
        return []
    if "," in text:
        return [int(part) for part in text.split(",") if part]
    return list(range(min(int(text), count)))


def _earlier(path: pathlib.Path | None) -> dict[int, dict[str, Any]]:
    """Return the results of an earlier run; a line that was cut off is left out."""
    results = {}
    if path is not None and path.exists():
        for text in path.read_text().splitlines():
            try:
                result = json.loads(text)
            except ValueError:
                continue
            results[result["seed"]] = result
    return results


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.state_fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--from", dest="first", type=int, default=10_000, help="first seed; the tests have those below")
    parser.add_argument("--seed", type=int, help="run this sequence alone")
    parser.add_argument("--steps", help="how many steps of it, or which")
    parser.add_argument("--door", help="optimize, inplace, compile, torch.compile, eager, aot_eager or none")
    parser.add_argument("--kind", help="the model of the sequence")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE", help="append each sequence's result, one a line")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return repeat(options.seed, options.steps, options.door, options.kind)
    path = pathlib.Path(options.json) if options.json else None
    seeds = range(options.first, options.first + options.count)
    results = {seed: result for seed, result in _earlier(path).items() if seed in seeds}
    tasks = [(seed, options.door) for seed in seeds if seed not in results]
    context = multiprocessing.get_context("spawn")
    # A worker ends after some sequences, and its compiled programs with it.
    with context.Pool(options.processes, maxtasksperchild=40) as pool:
        for result in track(
            pool.imap_unordered(check_one, tasks), "checking", len(tasks), console=Console(stderr=True)
        ):
            results[result["seed"]] = result
            if path is not None:
                with path.open("a") as stream:
                    stream.write(json.dumps(result) + "\n")
            if result["report"]:
                print(result["report"], flush=True)
    return _summary(results)


def _summary(results: dict[int, dict[str, Any]]) -> int:
    applied = collections.Counter(name for result in results.values() for name in result["applied"])
    refused = applied.pop("refused by both", 0)
    differ = sorted(seed for seed, result in results.items() if result["report"])
    print(
        f"{len(results)} sequences, {applied.total()} mutations of {len(applied)} kinds; {refused} ended in an error "
        f"that eager PyTorch raises too: {len(differ)} differ {differ[:20]}"
    )
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
