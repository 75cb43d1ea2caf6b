"""What a model's depth costs its first call: `python -m bench.depth [--rounds 3] [--json FILE]`.

GPT-2 of some widths' layers, random weights: capturing it, tracing it to StableHLO, rewriting, and compiling, with layers as a
loop and unrolled, in turn. Ratios are to the same with six layers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kpx
from kpx.hardware.cpu import model as cpu_model
from kpx.observe.demo import versions

_DEPTHS = (6, 12, 24, 48)
_WAYS = ("auto", "unrolled")
_BASE = _DEPTHS[0]


def _gpt(layers: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_embd": 384, "n_head": 6, "vocab_size": 1000, "n_positions": 128}
    return GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)).eval()


def _measured(layers: int, way: str) -> dict[str, Any]:
    """Seconds of one first compilation, by part, and what it made."""
    model, ids = _gpt(layers), torch.zeros(1, 64, dtype=torch.long)
    config = kpx.Config(layers=way, measure_seconds=0)
    start = time.perf_counter()
    compiled = kpx.optimize(model, config=config).compile_for([ids], {})
    whole = time.perf_counter() - start
    stages = compiled.seconds
    found = {"trace": stages.pop("trace"), "compile": stages.pop("compile")}
    found["rewrite"] = sum(stages.values())
    found["capture and load"] = whole - sum(found.values())
    found["rewrite and compile"] = found["rewrite"] + found["compile"]
    return {"seconds": {**found, "whole": whole}, "layers": compiled.layers, "lines": compiled.hlo.count("\n")}


def run(rounds: int, console: Console) -> dict[str, Any]:
    """Medians of all depths and ways, measured in turn."""
    _measured(2, "auto")  # what a process does once
    cases = [(layers, way) for layers in _DEPTHS for way in _WAYS]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for layers, way in track(cases * rounds, "compiling", console=console):
        found[layers, way].append(_measured(layers, way))
    rows = []
    for (layers, way), runs in found.items():
        base = found[_BASE, way]
        ratios = {part: statistics.median(r["seconds"][part] / b["seconds"][part] for r, b in zip(runs, base, strict=True))
                  for part in runs[0]["seconds"]}  # fmt: skip
        rows.append({"depth": layers, "way": way, "over_six_layers": ratios, "lines_of_hlo": runs[0]["lines"],
                     "layers": runs[0]["layers"]})  # fmt: skip
    between = {str(d): statistics.median(u["seconds"]["whole"] / a["seconds"]["whole"]
                                         for a, u in zip(found[d, "auto"], found[d, "unrolled"], strict=True))
               for d in _DEPTHS}  # fmt: skip
    return {"machine": cpu_model(), "versions": versions(), "rounds": rounds, "rows": rows,
            "unrolled_over_loop_whole": between}  # fmt: skip


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints ratios."""
    parts = ("capture and load", "trace", "rewrite", "compile", "rewrite and compile", "whole")
    table = Table(title=f"Time over that with {_BASE} layers · {result['machine']}")
    for column in ("layers", "as", *parts, "lines of HLO"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        ratios = (f"{row['over_six_layers'][part]:.2f}" for part in parts)
        table.add_row(str(row["depth"]), row["way"], *ratios, str(row["lines_of_hlo"]))
    console.print(table)
    told = ", ".join(f"{d} layers {r:.2f}" for d, r in result["unrolled_over_loop_whole"].items())
    console.print(f"The whole, unrolled over a loop: {told}.")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.depth", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    result = run(options.rounds, Console(stderr=True))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    show(Console(), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
