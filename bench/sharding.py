"""Plans of training steps for pods: how long planning takes, and the plan beside layouts written by hand.

`python -m bench.sharding [--json FILE] [--no-compile]`

The hand-written layouts are those that MaxText publishes for these models (its scripts end_to_end/tpu: weights fully sharded over
all chips, alone or with a tensor axis), under the same cost model. The plan's peak memory is the TPU compiler's, where it is
installed. Steps are AdamW, bf16 products over f32 weights, each layer rematerialized.

Gradients between two hosts of eight H100s, as compiled: the bytes that a device sends of each kind of exchange, beside those of f32.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import kpx
from bench import llama
from kpx.hardware import plugins
from kpx.hardware.cpu import model
from kpx.sharding import exchange
from kpx.train import Step

SIZES = {
    "Llama-2-7B": llama.Sizes(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama.Sizes(4096, 14336, 32, 32, 8, 128256),
    "Llama-2-70B": llama.Sizes(8192, 28672, 80, 64, 8, 32000),
}
# model, target, batch, length, layouts by hand
CASES = (
    ("Llama-2-7B", "tpu-v5e:16x16", 256, 4096, ({"fsdp": 256}, {"fsdp": 64, "tensor": 4})),
    ("Llama-3-8B", "tpu-v6e:16x16", 256, 8192, ({"fsdp": 256}, {"fsdp": 64, "tensor": 4})),
    ("Llama-2-70B", "tpu-v5p:8x8x8", 512, 4096, ({"fsdp": 512}, {"fsdp": 128, "tensor": 4})),
)
LARGE = ("Llama-3-8B", "tpu-v5p:16x16x16", 4096, 4096)
OPTIMIZER = optax.adamw(3e-4)
# what is exchanged between hosts, of a small Llama in f32
HOSTS, SMALL = "cuda:h100:2x8", llama.Sizes(512, 1024, 4, 8, 8, 4096)


def step(sizes: llama.Sizes) -> Any:
    """A training step with no word of shardings."""

    def trained(weights, state, tokens):
        value, gradient = jax.value_and_grad(_loss)(weights, tokens, sizes)
        updates, state = OPTIMIZER.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    return trained


def _loss(weights: Any, tokens: jax.Array, sizes: llama.Sizes, dtype: Any = jnp.bfloat16) -> jax.Array:
    narrow = jax.tree.map(lambda w: w.astype(dtype), weights)
    layer = jax.checkpoint(lambda x, w: (llama._layer(x, w, sizes), None))
    x, _ = jax.lax.scan(layer, narrow["embedding"][tokens], narrow["layers"])
    logits = (llama._norm(x, narrow["norm"]) @ narrow["embedding"].T).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))


def specs(sizes: llama.Sizes, batch: int, length: int) -> tuple[Any, ...]:
    """Structs of its arguments."""
    weights = jax.tree.map(
        lambda e: jax.ShapeDtypeStruct(e[0], jnp.float32), llama.shapes(sizes), is_leaf=lambda e: isinstance(e, tuple)
    )
    return weights, jax.eval_shape(OPTIMIZER.init, weights), jax.ShapeDtypeStruct((batch, length), jnp.int32)


def planned(name: str, target: str, batch: int, length: int, **options: Any) -> tuple[kpx.Plan, float]:
    """A plan, and the seconds that it took."""
    sizes = SIZES[name]
    start = time.perf_counter()
    plan = kpx.plan(step(sizes), *specs(sizes, batch, length), target=target, confirm=0, **options)
    return plan, time.perf_counter() - start


def compared(name: str, target: str, batch: int, length: int, by_hand: Any, compiles: bool) -> dict[str, Any]:
    """A row: the plan, layouts by hand, and the compiler's account of the plan."""
    plan, seconds = planned(name, target, batch, length)
    row: dict[str, Any] = {
        "target": target, "batch": batch, "length": length, "planning seconds": seconds, "plan": plan.mesh,
        "predicted seconds": plan.predicted_seconds, "foreseen bytes": plan.memory_per_device_bytes, "by hand": {},
    }  # fmt: skip
    for mesh in by_hand:
        text = " x ".join(f"{a} {n}" for a, n in mesh.items())
        try:
            other, _ = planned(name, target, batch, length, fixed={"data": 1, "context": 1, **mesh})
            row["by hand"][text] = other.predicted_seconds / plan.predicted_seconds
        except kpx.KpxError as error:
            row["by hand"][text] = f"{type(error).__name__}: {str(error)[:120]}"
    if compiles:
        sizes = SIZES[name]
        try:
            compiled = kpx.compile(plan.apply(step(sizes)), *plan.specs, target=target)
            row["compiler's bytes"], row["fits"] = compiled.memory.peak_bytes, compiled.memory.fits
            row["kernels"] = compiled.kernels
        except kpx.OutOfMemoryError as error:
            row["compiler's bytes"], row["fits"] = error.used_bytes, False
    return row


def exchanged() -> dict[str, float]:
    """Of each kind of exchange of gradients between hosts, the bytes that a device sends, over those of f32."""
    groups, found = 2, {}
    weights, _, tokens = specs(SMALL, 32, 1024)
    for kind in (None, *exchange.KINDS):
        loss = functools.partial(_loss, sizes=SMALL, dtype=jnp.float32)
        trained = Step(
            lambda params, carried, batch, key, loss=loss: (loss(params, batch), (carried, {})), OPTIMIZER,
            exchange=exchange.Exchange(kind, groups) if kind else None,
        )  # fmt: skip
        state = jax.eval_shape(trained.start, weights)
        plan = kpx.plan(trained, state, tokens, target=HOSTS, fixed={"data": groups, "fsdp": 8}, confirm=0)
        compiled = kpx.compile(plan.apply(trained), *plan.specs, target=HOSTS)
        between = [c for c in compiled.collectives if c.axes == ("data",)]
        # A sum goes round twice, what is gathered or exchanged once.
        found[kind or "f32"] = sum(c.bytes * c.count * (2 if c.kind == "all-reduce" else 1) for c in between)
    return {kind: size / found["f32"] for kind, size in found.items()}


def environment() -> dict[str, Any]:
    """The machine and the versions, as they are written beside what was measured."""
    return {
        "machine": {"cpu": model(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"jax": jax.__version__, "kpx": kpx.__version__, "python": platform.python_version()},
    }


def run(compiles: bool, progress: Console) -> dict[str, Any]:
    """All rows, with the machine and versions."""
    found: dict[str, Any] = {**environment(), "rows": {}}
    for case in CASES:
        progress.print(f"{case[0]} on {case[1]}")
        found["rows"][case[0]] = compared(*case, compiles)
    progress.print(f"{LARGE[0]} on {LARGE[1]}")
    plan, seconds = planned(*LARGE)
    found["large"] = {"target": LARGE[1], "planning seconds": seconds, "plan": plan.mesh}
    if plugins.find("cuda") is not None:
        progress.print(f"exchanges of gradients between hosts of {HOSTS}")
        found["bytes between hosts"] = exchanged()
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    """Prints the rows."""
    table = Table()
    for column in (
        "model",
        "target",
        "planned in",
        "plan",
        "a step",
        "foreseen GiB",
        "compiler's GiB",
        "by hand, times the plan's",
    ):
        table.add_column(column)
    for name, row in found["rows"].items():
        hand = "; ".join(f"{k}: {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row["by hand"].items())
        told = f"{row[key] / 2**30:.2f}" if (key := "compiler's bytes") in row else "not run"
        mesh = " x ".join(f"{a} {n}" for a, n in row["plan"].items())
        table.add_row(
            name, row["target"], f"{row['planning seconds']:.1f} s", mesh, f"{row['predicted seconds']:.3g} s",
            f"{row['foreseen bytes'] / 2**30:.2f}", told, hand,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{LARGE[0]} on {LARGE[1]}: planned in {found['large']['planning seconds']:.1f} s: {found['large']['plan']}"
    )
    if sent := found.get("bytes between hosts"):
        console.print(
            "Gradients between hosts, bytes over f32's: " + ", ".join(f"{k} {n:.3f}" for k, n in sent.items())
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    found = run(not given.no_compile and plugins.find("tpu") is not None, Console(stderr=True))
    show(Console(), found)
    if given.json:
        with open(given.json, "w") as file:
            json.dump(found, file, indent=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
