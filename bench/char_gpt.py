"""A character-level GPT trained in several precisions: `python -m bench.char_gpt [--steps 500] [--json FILE]`.

The text is the project's own: its documents and the docstrings of its modules. Model, data order and optimizer are the same for
all; `kpx.jit` computes the whole step (loss, gradients, AdamW) with `Config.training(precision=...)`. What is told is the mean loss
of the last 50 steps, and that on text that was held out, over those in f32.
"""

from __future__ import annotations

import argparse
import ast
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import kpx
from kpx.hardware.cpu import model as cpu_model
from kpx.observe.demo import versions
from kpx.precision import Policy

PRECISIONS: dict[str, Any] = {
    "f32": None, "bf16": "bf16", "f16": "f16", "fp8": "fp8", "fp8, stochastic gradients": Policy("fp8", stochastic=True),
    "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
_LAYERS, _WIDTH, _HEADS, _LENGTH, _BATCH = 4, 128, 4, 128, 16
_ROOT = pathlib.Path(__file__).resolve().parents[1]


def text() -> str:
    """The project's documents and docstrings."""
    parts = [(_ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for folder in ("kpx", "bridges", "kernels", "bench"):
        for file in sorted((_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)):
                    parts.append(doc)
    return "\n".join(parts)


class Data:
    """Characters as numbers, and batches of them."""

    def __init__(self, given: str):
        self.characters = sorted(set(given))
        number = {c: i for i, c in enumerate(self.characters)}
        numbers = np.array([number[c] for c in given], np.int32)
        cut = int(0.9 * len(numbers))
        self.train, self.held_out = numbers[:cut], numbers[cut:]

    def batch(self, source: np.ndarray, seed: int) -> np.ndarray:
        """Windows at random places, `[batch, length + 1]`."""
        places = np.random.default_rng(seed).integers(0, len(source) - _LENGTH - 1, _BATCH)
        return np.stack([source[p : p + _LENGTH + 1] for p in places])


def initial(vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """A GPT's parameters, as GPT-2 draws them."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 + 4 * _LAYERS))

    def matrix(*shape, scale=1.0):
        return 0.02 * scale * jax.random.normal(next(keys), shape)

    def layer():
        deep = (2 * _LAYERS) ** -0.5
        return {
            "norm": jnp.ones(_WIDTH), "qkv": matrix(_WIDTH, 3 * _WIDTH), "out": matrix(_WIDTH, _WIDTH, scale=deep),
            "norm2": jnp.ones(_WIDTH), "up": matrix(_WIDTH, 4 * _WIDTH), "down": matrix(4 * _WIDTH, _WIDTH, scale=deep),
        }  # fmt: skip

    return {
        "tokens": matrix(vocabulary, _WIDTH), "places": matrix(_LENGTH, _WIDTH),
        "layers": [layer() for _ in range(_LAYERS)], "norm": jnp.ones(_WIDTH),
    }  # fmt: skip


def _normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def loss(params: dict[str, Any], windows: jax.Array) -> jax.Array:
    """The mean cross entropy of each next character, nats."""
    given, wanted = windows[:, :-1], windows[:, 1:]
    x = params["tokens"][given] + params["places"]
    mask = jnp.tril(jnp.ones((_LENGTH, _LENGTH), bool))
    for layer in params["layers"]:
        qkv = (_normed(x, layer["norm"]) @ layer["qkv"]).reshape(*x.shape[:2], 3, _HEADS, -1)
        q, k, v = (jnp.swapaxes(qkv[:, :, i], 1, 2) for i in range(3))
        scores = jnp.where(mask, q @ jnp.swapaxes(k, 2, 3) * q.shape[-1] ** -0.5, -1e30)
        found = jnp.swapaxes(jax.nn.softmax(scores) @ v, 1, 2).reshape(x.shape)
        x = x + found @ layer["out"]
        x = x + jax.nn.gelu(_normed(x, layer["norm2"]) @ layer["up"]) @ layer["down"]
    logits = _normed(x, params["norm"]) @ params["tokens"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def train(precision: Any, steps: int, data: Data) -> dict[str, Any]:
    """Losses of a run, the loss on held-out text, and how many products were computed in what."""
    config = kpx.Config.training(precision=precision, measure_seconds=0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, min(50, steps // 5 + 1), steps, 2e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))

    def step(params, state, windows):
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = initial(len(data.characters))
    state = optimizer.init(params)
    counts = kpx.compile(kpx.jit(step, config=config), params, state, data.batch(data.train, 0)).precisions
    compiled, losses = kpx.jit(step, config=config), []
    for i in range(steps):
        params, state, value = compiled(params, state, data.batch(data.train, i))
        losses.append(float(value))
    held_out = jax.jit(loss)
    tested = [float(held_out(params, data.batch(data.held_out, 10**6 + i))) for i in range(20)]
    return {
        "losses": losses,
        "last": float(np.mean(losses[-50:])),
        "held_out": float(np.mean(tested)),
        "counts": counts,
    }


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="bench.char_gpt", description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), metavar="PRECISION")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    data = Data(text())
    runs = {name: train(PRECISIONS[name], options.steps, data) for name in dict.fromkeys(("f32", *options.only))}
    table = Table(title=f"A character-level GPT, {options.steps} steps · {cpu_model()}")
    for column in ("precision", "last 50 losses", "over f32", "held out", "over f32", "products"):
        table.add_column(column)
    exact = runs["f32"]
    for name, run in runs.items():
        run["last_over_f32"], run["held_out_over_f32"] = (
            run["last"] / exact["last"],
            run["held_out"] / exact["held_out"],
        )
        counts = ", ".join(f"{n} {p}" for p, n in run["counts"].items()) or "as they are"
        numbers = run["last"], run["last_over_f32"], run["held_out"], run["held_out_over_f32"]
        table.add_row(name, *(f"{n:.4f}" for n in numbers), counts)
    Console(width=150).print(table)
    if options.json:
        made = {"machine": cpu_model(), "versions": versions(), "steps": options.steps, "characters": len(data.train)}
        thin = {name: {**run, "losses": [round(v, 4) for v in run["losses"][::10]]} for name, run in runs.items()}
        pathlib.Path(options.json).write_text(json.dumps({**made, "runs": thin}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
