"""Architectures from transformers through kpx: each must give what eager PyTorch gives, some in a training step too.

`python -m bench.zoo [--json FILE] [--no-training] [MODEL ...]`
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench.opinfo_check import without_paths
from bench.zoo_models import FAMILIES, TRAINED, build, family_of

# Relative to the largest value of an output or gradient, in f32.
TOLERANCE = 1e-4


def _tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """An output's tensors by name, nested ones flattened."""
    fields = dict(outputs) if hasattr(outputs, "keys") else {"output": outputs}
    found = {}
    for name, value in fields.items():
        for i, leaf in enumerate(pytree.tree_leaves(value)):
            if isinstance(leaf, torch.Tensor):
                found[f"{name}.{i}"] = leaf
    return found


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite where shapes, dtypes or NaN differ."""
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        return float("inf")
    if not wanted.numel():
        return 0.0
    g, w = got.detach().double(), wanted.detach().double()
    same = torch.isfinite(w)
    if not torch.equal(g[~same], w[~same]) and not torch.isnan(w[~same]).all():
        return float("inf")
    if not same.any():
        return 0.0
    return float((g[same] - w[same]).abs().max() / w[same].abs().max().clamp(min=1e-6))


def _loss(outputs: Any) -> torch.Tensor:
    floats = [t for t in _tensors(outputs).values() if t.is_floating_point() and t.requires_grad]
    return sum((t.square().mean() for t in floats), torch.zeros(()))


def _forward(name: str) -> dict[str, Any]:
    import kpx

    model, inputs = build(name)
    with torch.no_grad():
        wanted = _tensors(model(**inputs))
        got = _tensors(kpx.optimize(model)(**inputs))
    if wanted.keys() != got.keys():
        return {"verdict": "wrong", "reason": f"outputs {sorted(got)} where eager gives {sorted(wanted)}"}
    worst = max(_difference(got[k], wanted[k]) for k in wanted)
    return {"verdict": "match" if worst <= TOLERANCE else "wrong", "difference": worst, "outputs": len(wanted)}


def _step(name: str) -> dict[str, Any]:
    """Loss and every gradient of a step; in evaluation mode, so that both draw the same (nothing)."""
    import kpx

    model, inputs = build(name)
    found = []
    for call in (model, kpx.optimize(model)):
        model.zero_grad()
        loss = _loss(call(**inputs))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (wanted_loss, wanted), (loss, grads) = found
    if wanted.keys() != grads.keys():
        return {"verdict": "wrong", "reason": f"gradients differ in {sorted(wanted.keys() ^ grads.keys())[:5]}"}
    scale = max(float(g.abs().max()) for g in wanted.values())
    worst = max(float((grads[n] - g).abs().max() / max(float(g.abs().max()), 1e-3 * scale)) for n, g in wanted.items())
    worst = max(worst, _difference(loss, wanted_loss))
    return {"verdict": "match" if worst <= 10 * TOLERANCE else "wrong", "difference": worst, "gradients": len(grads)}


def check(name: str, training: bool) -> dict[str, Any]:
    """The verdicts on one architecture."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"family": family_of(name)}
    for part, run in (("forward", _forward), *((("training", _step),) if training and name in TRAINED else ())):
        try:
            found[part] = run(name)
        except Exception as error:  # whatever it is, it is this architecture's verdict
            found[part] = {"verdict": "failed", "reason": f"{type(error).__name__}: {without_paths(str(error))[:1200]}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="only these")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    every = [name for models in FAMILIES.values() for name in models]
    if unknown := [n for n in given.models if n not in every]:
        parser.error(f"unknown: {', '.join(unknown)}")
    results: dict[str, Any] = {}
    start = time.monotonic()
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(check, name, not given.no_training): name for name in given.models or every}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            if len(results) % 10 == 0:
                print(f"  {len(results)}/{len(futures)} architectures", flush=True)
    report(results, time.monotonic() - start, given)


def report(results: dict[str, Any], seconds: float, given: argparse.Namespace) -> None:
    import jax
    import transformers
    from rich.console import Console
    from rich.table import Table

    table = Table("family", "architecture", "forward", "training", "why")
    for name, found in sorted(results.items(), key=lambda item: (item[1]["family"], item[0])):
        parts = [found.get(part, {}) for part in ("forward", "training")]
        words = [p.get("verdict", "") + (f" {p['difference']:.0e}" if "difference" in p else "") for p in parts]
        why = next((p["reason"].split("\n")[0][:120] for p in parts if "reason" in p), "")
        table.add_row(found["family"], name, *words, why)
    console = Console()
    console.print(table)
    totals = {part: _totals(results, part) for part in ("forward", "training")}
    for part, counts in totals.items():
        console.print(f"{part}: {counts.get('match', 0)} of {sum(counts.values())} match")
    if given.json:
        record = {
            "versions": {
                "jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "date": time.strftime("%Y-%m-%d"),
            "minutes": round(seconds / 60, 1),
            "summary": totals,
            "models": dict(sorted(results.items())),
        }  # fmt: skip
        with open(given.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")


def _totals(results: dict[str, Any], part: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for found in results.values():
        if part in found:
            counts[found[part]["verdict"]] = counts.get(found[part]["verdict"], 0) + 1
    return counts


if __name__ == "__main__":
    main()
