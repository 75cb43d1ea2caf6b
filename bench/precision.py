"""Precisions beside each other and beside bf16 peers: `python -m bench.precision [--rounds 5] [--json FILE]`.

Speed: kpx in f32, bf16 and int8 (`Config(precision=...)`, the model in f32), and the peers' bf16, in turn in one process.
A decoding step of one token of Llama 3.2 1B's shape, random weights, after 127 others: f32 and weights kept in int8 and int4, with
the bytes that are held of them. Accuracy: how far outputs are from f32's, and of MiniLM with its real weights the rank correlation (Spearman) of sentence pairs'
similarities with those in f32 (`tests/data/similarity.tsv`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.table import Table

import kpx
from bench import peers
from bench.cases import CASES
from kpx.hardware.cpu import model as cpu_model
from kpx.observe import minilm
from kpx.observe.demo import versions
from kpx.observe.timing import interleaved
from kpx.precision import Budget, assign

PRECISIONS = ("f32", "bf16", "int8")
KEPT = ("f32", "int8-weights", "int4-weights")
FEW = ("fp8", "mxfp8", "nvfp4", "mxfp4")
_CASES = ("bert", "vit", "llama")
_PEERS = {"torch eager": peers.eager, "torch.compile": peers.compiled_by_torch, "OpenVINO": peers.openvino}
_PAIRS = pathlib.Path(__file__).resolve().parents[1] / "tests" / "data" / "similarity.tsv"


def _config(precision: str) -> kpx.Config:
    return kpx.Config(precision=None if precision == "f32" else precision, measure_seconds=0)


def pairs() -> list[tuple[float, str, str]]:
    """Pairs of sentences with how alike they are: 5 (the same said otherwise), 2 (of like things), 0 (of others)."""
    lines = _PAIRS.read_text().splitlines()[1:]
    return [(float(score), first, second) for score, first, second in (line.split("\t") for line in lines)]


def similarities(model: Callable, tokenizer: Any) -> np.ndarray:
    """The cosines of all pairs' embeddings."""
    found = []
    for texts in zip(*((first, second) for _, first, second in pairs()), strict=True):
        given = minilm.tokenize(tokenizer, list(texts), 32)
        with torch.no_grad():
            found.append(minilm.embed(model(**given)[0], given["attention_mask"]))
    return (found[0] * found[1]).sum(-1).double().numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks (numbers are taken to be all different)."""
    first, second = (x.argsort().argsort() for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def accuracy() -> dict[str, dict[str, Any]]:
    """By precision, the rank correlation with f32's similarities, and with the pairs' own grades."""
    model, tokenizer = minilm.load()
    wanted, found = None, {}
    for precision in dict.fromkeys((*PRECISIONS, *KEPT, *FEW)):
        optimized = kpx.optimize(model, config=_config(precision))
        given = similarities(optimized, tokenizer)
        wanted = given if wanted is None else wanted
        (entry,) = optimized._entries.values()
        found[precision] = {
            "spearman_with_f32": spearman(given, wanted),
            "largest_difference": float(np.abs(given - wanted).max()),
            "counts": entry.program.compiled.precisions,
        }
    return found


def budget(limits: Sequence[float] = (0.999, 0.9996)) -> dict[str, Any]:
    """What budgets come to on the same pairs, by least rank correlation: one that all may be int8 for, and one that they may not."""
    model, tokenizer = minilm.load()
    texts = [[first for _, first, _ in pairs()], [second for _, _, second in pairs()]]
    sides = [dict(minilm.tokenize(tokenizer, side, 32)) for side in texts]

    def cosines(outputs: list) -> np.ndarray:
        a, b = (
            minilm.embed(torch.tensor(o[0]), side["attention_mask"]) for o, side in zip(outputs, sides, strict=True)
        )
        return (a * b).sum(-1).double().numpy()

    def spearman_with_f32(outputs: list, reference: list) -> float:
        return spearman(cosines(outputs), cosines(reference))

    found = {}
    for limit in limits:
        made = assign(model, Budget(spearman_with_f32, limit, sides, strategy="local"))
        found[str(limit)] = {
            "reached": made.verified,
            "shares": made.shares,
            "tries": made.tries,
            "verdict": made.verdict,
        }
    return found


def speed(name: str, rounds: int) -> dict[str, Any]:
    """Median seconds of a case's calls, and how far kpx's outputs are from f32's."""
    model, inputs = CASES[name].make()
    calls: dict[str, Callable[[], Any]] = {}
    outputs, counts, failed = {}, {}, {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for precision in PRECISIONS:
            optimized = kpx.optimize(model, config=_config(precision))
            outputs[precision] = _first(optimized(**inputs))
            counts[precision] = optimized.compile_for([], inputs).precisions
            calls[f"kpx {precision}"] = lambda optimized=optimized: optimized(**inputs)
        narrow, given = CASES[name].make(dtype=torch.bfloat16)
        for peer, build in _PEERS.items():
            try:
                calls[f"{peer} bf16"] = build(narrow, given)
                calls[f"{peer} bf16"]()
            except Exception as error:  # of types of their own
                print(f"{name}: {peer} failed: {str(error).splitlines()[0][:100]}", file=sys.stderr)
                calls.pop(f"{peer} bf16", None)
                failed[peer] = str(error).splitlines()[0][:200]
        interleaved(calls, 1)
        seconds = interleaved(calls, rounds)
    far = {p: float((o - outputs["f32"]).norm() / outputs["f32"].norm()) for p, o in outputs.items()}
    theirs = min(s for way, s in seconds.items() if not way.startswith("kpx"))
    return {
        "median_seconds": seconds, "distance_from_f32": far, "counts": counts, "peers_that_failed": failed,
        "over_kpx_f32": {p: seconds["kpx f32"] / seconds[f"kpx {p}"] for p in PRECISIONS},
        "over_the_fastest_bf16_peer": {p: theirs / seconds[f"kpx {p}"] for p in PRECISIONS},
    }  # fmt: skip


def decode(rounds: int) -> dict[str, Any]:
    """Median seconds of a step of decoding, the bytes of weights that are held, and how far the logits are from f32's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.cases import Decoding

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    model = Decoding(LlamaForCausalLM(config).eval())
    shape = (16, 1, 8, 127, 64)
    inputs = {"input_ids": torch.tensor([[11]]), "keys": torch.randn(shape), "values": torch.randn(shape)}
    calls, outputs, held = {}, {}, {}
    with torch.no_grad():
        for precision in KEPT:
            optimized = kpx.optimize(model, config=_config(precision))
            outputs[precision] = _first(optimized(**inputs))
            (entry,) = optimized._entries.values()
            held[precision] = sum(a.nbytes for a in entry.program.held)
            calls[precision] = lambda optimized=optimized: optimized(**inputs)
        interleaved(calls, 1)
        seconds = interleaved(calls, rounds)
    return {
        "median_seconds": seconds, "held_bytes": held,
        "over_f32": {p: seconds["f32"] / s for p, s in seconds.items()},
        "held_of_f32": {p: b / held["f32"] for p, b in held.items()},
        "distance_from_f32": {p: float((o - outputs["f32"]).norm() / outputs["f32"].norm()) for p, o in outputs.items()},
    }  # fmt: skip


def _first(outputs: Any) -> torch.Tensor:
    return next(t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)).double()


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints ratios."""
    table = Table(title=f"kpx in a precision · {result['machine']}")
    for column in ("model", "precision", "over kpx f32", "over the fastest bf16 peer", "distance from f32"):
        table.add_column(column)
    for name, row in result["cases"].items():
        for p in PRECISIONS:
            ratios = row["over_kpx_f32"][p], row["over_the_fastest_bf16_peer"][p]
            table.add_row(name, p, *(f"{r:.2f}" for r in ratios), f"{row['distance_from_f32'][p]:.1g}")
    console.print(table)
    step = result["decode"]
    for p in KEPT[1:]:
        console.print(f"A decoding step of 1B, {p}: {step['over_f32'][p]:.2f} times as fast as f32, in {step['held_of_f32'][p]:.3f} "
                      f"of its bytes, {step['distance_from_f32'][p]:.1g} from it.")  # fmt: skip
    for row in result["budget"].values():
        console.print(f"A budget: {row['verdict']}")
    for precision, row in result["sentences"].items():
        console.print(f"MiniLM, {len(pairs())} pairs, {precision}: Spearman {row['spearman_with_f32']:.5f} with f32's.")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.precision", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE", help=", ".join(_CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    cases = {name: speed(name, options.rounds) for name in options.cases or _CASES}
    result = {"machine": cpu_model(), "versions": versions(), "rounds": options.rounds, "cases": cases,
              "decode": decode(options.rounds), "sentences": accuracy(), "budget": budget()}  # fmt: skip
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    show(Console(), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
