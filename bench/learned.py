"""What the learned start saves: `python -m bench.learned [--json FILE]`.

Every implementation of attention is measured here over shapes of real models. Then each case is ranked by what the others
say (leave-one-out), and by rules: how many implementations must be tried until the fastest is found, and how much slower
than it the first tried is.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import torch  # noqa: F401  (its libraries are what some implementations call)
from rich.console import Console
from rich.table import Table

import kpx
from kpx.hardware.cpu import model
from kpx.kernels.selection import PLAIN
from kpx.learned import Ranking
from kpx.observe.demo import versions
from kpx.runtime.build import environment

# Batch, heads, heads of keys, length, size; causal.
_SHAPES = [
    (1, 12, 12, 32, 64, False), (8, 12, 12, 128, 64, False), (32, 12, 12, 64, 32, False), (4, 12, 12, 197, 64, False),
    (1, 12, 12, 512, 64, True), (1, 32, 8, 512, 64, True), (1, 16, 16, 1024, 64, True), (1, 8, 8, 2048, 64, True),
    (1, 8, 8, 1024, 128, False), (16, 4, 4, 16, 16, False), (2, 8, 2, 256, 64, True), (1, 4, 4, 4096, 64, True),
]  # fmt: skip


def measure(seconds: float) -> list[dict[str, Any]]:
    """Each case's text, rules' choice, and the seconds of every implementation."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (jnp.float32, jnp.bfloat16):
            for batch, heads, kv_heads, length, size, causal in _SHAPES:
                query = jax.ShapeDtypeStruct((batch, heads, length, size), dtype)
                key = jax.ShapeDtypeStruct((batch, kv_heads, length, size), dtype)

                def attend(q, k, v, causal=causal):
                    return kpx.ops.attention(q, k, v, causal=causal)

                tuned = kpx.tune(attend, query, key, key, cache=f"{folder}/{len(found)}.json", seconds=seconds)
                (case,) = tuned.measured
                found.append({"case": case.case, "rules": case.rules, "seconds": case.seconds, "order": case.order})
    return found


def evaluate(cases: list[dict[str, Any]], here: dict[str, str]) -> list[dict[str, Any]]:
    """For each case, by rules and as learned from the others: tries until the fastest, and the first's time over its."""
    rows = []
    for case in cases:
        seconds = case["seconds"]
        ranking = Ranking()
        for other in cases:
            if other is not case:
                ranking.add(other["case"], here, other["seconds"])
        names = sorted(seconds, key=lambda n, first=case["rules"]: n != first)
        learned, _ = ranking.order(case["case"], here, names)
        best = min(seconds, key=seconds.__getitem__)
        rows.append({
            "case": case["case"], "fastest": best,
            **{f"{name} tries": order.index(best) + 1 for name, order in (("rules", names), ("learned", learned))},
            **{f"{name} first": seconds[order[0]] / seconds[best] for name, order in (("rules", names), ("learned", learned))},
        })  # fmt: skip
    return rows


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.learned", description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    cases = measure(options.seconds)
    rows = evaluate(cases, environment(kpx.Target("cpu")))
    result = {
        "machine": model(), "versions": versions(), "cases": cases, "rows": rows,
        "mean": {k: statistics.fmean(r[k] for r in rows) for k in rows[0] if k.endswith("tries")}
        | {k: math.exp(statistics.fmean(math.log(r[k]) for r in rows)) for k in rows[0] if k.endswith("first")},
    }  # fmt: skip
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    table = Table("", "fastest", *(k for k in rows[0] if k.endswith(("tries", "first"))))
    for row in [*rows, {"case": "mean", "fastest": "", **result["mean"]}]:
        numbers = [f"{row[k]:.2f}" for k in row if k.endswith(("tries", "first"))]
        table.add_row(row["case"][:60], row["fastest"], *numbers)
    Console().print(table, f"{result['machine']}; the fastest of {PLAIN} and the others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
