"""Real sentences of mixed length through MiniLM, from text to embeddings: `python -m bench.sentences [--json FILE]`.

The sentences are those of the project's own documents. Every way gets them in the order in which they stand; peers in
batches, each padded to its longest; kpx all at once, with `kpx.Buckets(..., by_row=True)`, which computes no padding.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kpx
from kpx.hardware.cpu import model as cpu_model
from kpx.observe import minilm
from kpx.observe.demo import versions
from kpx.observe.timing import interleaved, once

_LENGTHS = (8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256)
_ROOT = pathlib.Path(__file__).resolve().parents[1]


def sentences(count: int) -> list[str]:
    """Sentences of the project's documents, in order, of three words at least."""
    found = []
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = re.sub(r"```.*?```", " ", (_ROOT / name).read_text(), flags=re.S)
        for paragraph in re.split(r"\n\s*\n|\n- ", text):
            if not paragraph.lstrip().startswith(("|", "#")):
                plain = re.sub(r"[*`\[\]]|\(http\S*\)", "", " ".join(paragraph.split()))
                found += [s for s in re.split(r"(?<=[.:;])\s+", plain) if len(s.split()) > 2]
    return found[:count]


def _run(model: Callable, tokenizer: Any, texts: list[str], batch: int) -> torch.Tensor:
    """Embeddings, some sentences at a time."""
    found = []
    for i in range(0, len(texts), batch):
        given = minilm.tokenize(tokenizer, texts[i : i + batch])
        found.append(minilm.embed(model(**given), given["attention_mask"]))
    return torch.cat(found)


def _onnx(model: torch.nn.Module, given: dict[str, Any], folder: str) -> str:
    """The model as an ONNX file whose batch and length may vary."""
    path = f"{folder}/model.onnx"
    names = list(given)
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in names}
    torch.onnx.export(
        model, (), path, kwargs=given, dynamo=True, verbose=False, dynamic_shapes=axes, output_names=["hidden"]
    )
    return path


def _onnx_runtime(model: torch.nn.Module, given: dict[str, Any]) -> Callable:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(_onnx(model, given, folder), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}

    def call(**inputs):
        arrays = {k: v.numpy() for k, v in inputs.items() if k in wanted}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


def _openvino(model: torch.nn.Module, given: dict[str, Any]) -> Callable:
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        compiled = ov.Core().compile_model(ov.convert_model(_onnx(model, given, folder)), "CPU",
                                           {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"})  # fmt: skip
    request = compiled.create_infer_request()
    names = [i.get_any_name() for i in compiled.inputs]

    def call(**inputs):
        return torch.from_numpy(request.infer({n: inputs[n].numpy() for n in names})[compiled.outputs[0]].copy())

    return call


def _hidden(model: Callable) -> Callable:
    return lambda **given: model(**given).last_hidden_state


def ways(model: torch.nn.Module, given: dict[str, Any], batch: int) -> dict[str, tuple[Callable[[], Callable], int]]:
    """By name, what makes a model to call, and how many sentences it gets at a time."""
    buckets = kpx.Buckets(batch=[4, 16, 64], sequence=_LENGTHS, by_row=True)
    return {
        "torch eager": (lambda: _hidden(model), batch),
        "torch.compile": (lambda: _hidden(torch.compile(model, dynamic=True)), batch),
        "ONNX Runtime": (lambda: _onnx_runtime(model, given), batch),
        "OpenVINO": (lambda: _openvino(model, given), batch),
        "kpx": (lambda: _hidden(kpx.optimize(model, dynamic_shapes=buckets)), 1 << 20),
    }


def measure(count: int, batch: int, rounds: int) -> dict[str, Any]:
    """First-call and median seconds of each way over all sentences, and the least cosine to eager's embeddings."""
    model, tokenizer = minilm.load()
    texts = sentences(count)
    given = minilm.tokenize(tokenizer, texts[:4])
    rows: dict[str, Any] = {}
    calls, wanted = {}, torch.empty(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (make, at_once) in ways(model, given, batch).items():
            made: list[Any] = []

            def first(make=make, at_once=at_once, made=made):
                call = make()
                made.extend((call, _run(call, tokenizer, texts, at_once)))

            try:
                seconds = once(first)
            except Exception as error:  # each peer fails with types of its own, and the table says so
                rows[name] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
                continue
            call, found = made
            wanted = found if name == "torch eager" else wanted
            rows[name] = {"first_seconds": seconds, "least_cosine": float((found * wanted).sum(1).min())}
            calls[name] = lambda call=call, at_once=at_once: _run(call, tokenizer, texts, at_once)
        for name, seconds in interleaved(calls, rounds).items():
            rows[name]["median_seconds"] = seconds
    lengths = [int(n) for n in minilm.tokenize(tokenizer, texts)["attention_mask"].sum(1)]
    others = [r["median_seconds"] for n, r in rows.items() if n != "kpx" and "failed" not in r]
    return {
        "machine": f"{cpu_model()}, {torch.get_num_threads()} threads", "versions": versions(), "rounds": rounds,
        "sentences": len(texts), "batch": batch, "tokens": {"shortest": min(lengths), "longest": max(lengths),
        "mean": sum(lengths) / len(lengths)}, "ways": rows, "kpx over the fastest": min(others) / rows["kpx"].get("median_seconds", math.inf),
    }  # fmt: skip


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.sentences", description=__doc__)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    result = measure(options.count, options.batch, options.rounds)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2))
    tokens = result["tokens"]
    table = Table("", "median ms", "first, s", "least cosine to eager",
        title=f"{result['sentences']} sentences of {tokens['shortest']} to {tokens['longest']} tokens, {tokens['mean']:.0f} on average")  # fmt: skip
    for name, row in result["ways"].items():
        told = [row["failed"], "", ""] if "failed" in row else [
            f"{row['median_seconds'] * 1e3:.0f}", f"{row['first_seconds']:.1f}", f"{row['least_cosine']:.7f}"]  # fmt: skip
        table.add_row(name, *told)
    console = Console()
    console.print(table, f"kpx over the fastest: {result['kpx over the fastest']:.2f}x", result["machine"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
