"""Random programs with and without the passes: `python -m bench.fuzz [--count 5000] [--json FILE]`.

The programs and the comparison are those of the tests (`tests/test_fuzz.py`), in f32; here are more of them. With `--torch`
they are PyTorch modules instead, against eager PyTorch: see `bench.fuzz_torch`.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import track

_SOME = 50  # programs that a worker checks before it is asked again


def check_some(first: int) -> dict[str, Any]:
    """Programs of consecutive seeds: how many rewrites fired, and what differed."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from kpx.config import Config
    from tests.test_fuzz import check

    fired, differs = 0, {}
    for seed in range(first, first + _SOME):
        try:
            fired += check(seed, Config())
        except Exception as error:  # whatever is wrong with a program is what is looked for
            differs[seed] = f"{type(error).__name__}: {str(error)[:2000]}"
    return {"fired": fired, "differs": differs}


def main(arguments=None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--torch" in arguments:
        from bench import fuzz_torch

        return fuzz_torch.main([a for a in arguments if a != "--torch"])
    parser = argparse.ArgumentParser(prog="bench.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument(
        "--from", dest="first", type=int, default=10_000, help="the first seed; the tests have those below"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    from kpx.hardware.cpu import model
    from kpx.observe.demo import versions

    start, total = time.time(), collections.Counter()
    differs: dict[int, str] = {}
    seeds = range(options.first, options.first + options.count, _SOME)
    context = multiprocessing.get_context("spawn")
    # A worker ends after some turns, and its compiled programs with it.
    # (concurrent.futures' pool of Python 3.11 waits for ever once workers end so.)
    with context.Pool(os.cpu_count(), maxtasksperchild=10) as pool:
        for found in track(pool.imap(check_some, seeds), "checking", len(seeds), console=Console(stderr=True)):
            total["fired"] += found["fired"]
            differs |= found["differs"]
    result = {
        "machine": model(), "versions": versions(), "programs": len(seeds) * _SOME, "first_seed": options.first,
        "rewrites_fired": total["fired"], "differ": differs, "seconds": time.time() - start,
    }  # fmt: skip
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    print(f"{result['programs']} programs, {total['fired']} rewrites: {len(differs)} differ {sorted(differs)[:20]}")
    return int(bool(differs))


if __name__ == "__main__":
    sys.exit(main())
