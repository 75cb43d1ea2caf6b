"""Kernels against what else there is: measured where a GPU is at hand, and compiled for those that are not.

`python -m bench.kernels [--json FILE] [--rounds 20] [--small]`

Measured (correct first, then medians of rounds in which all run in turn, each a ratio to the fastest): kpx's kernel, plain
XLA, each other implementation by name (cuDNN, tokamax), jax.nn, cuDNN through jax.nn. Without a GPU that part says "not run".

Compiled, with the vendors' compilers: memory beyond arguments and results with kpx's kernels and without, and what Triton's
own compiler says of the kernels: registers, spills, shared memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import kpx
from bench import kernel_resources
from kpx.hardware import cpu, plugins
from kpx.kernels import registry, selection
from kpx.kernels.attention import attention_kernel
from kpx.kernels.group_norm import by_groups
from kpx.kernels.paged_attention import paged_attention_kernel

TARGETS = ("cuda:h100", "cuda:h200", "cuda:b200", "rocm:mi300x", "tpu-v5e", "tpu-v6e", "tpu-v5p")


def attention_case(length: int, heads: int = 16, kv_heads: int = 4, size: int = 128) -> dict[str, Any]:
    """Causal attention, bf16: its inputs, plain form, kpx's, and others by name."""
    shapes = (1, heads, length, size), (1, kv_heads, length, size), (1, kv_heads, length, size)
    given = {"scale": size**-0.5, "causal": True}

    def nn(implementation, q, k, v):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), 1, 2)

    others = {"jax.nn": functools.partial(nn, "xla"), "cuDNN (jax.nn)": functools.partial(nn, "cudnn")}
    plain = functools.partial(attention_kernel.decomposition, **given)
    return {
        "shapes": shapes,
        "plain": plain,
        "kpx": functools.partial(kpx.ops.attention, causal=True),
        "others": others,
    }


def loss_case(tokens: int, vocabulary: int, size: int) -> dict[str, Any]:
    """The loss of a language model's last layer, bf16, over labels that are fixed."""
    labels = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)

    def plain(x, w):
        logits = jnp.einsum("td,vd->tv", x, w, preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], 1)[:, 0]

    fused = functools.partial(_loss, labels)
    return {"shapes": ((tokens, size), (vocabulary, size)), "plain": plain, "kpx": fused, "others": {}}


def _loss(labels, x, w):
    return kpx.ops.linear_cross_entropy(x, w, jnp.asarray(labels))


def norm_case(tokens: int, size: int) -> dict[str, Any]:
    """A layer norm with the sum that carries its input on, bf16."""

    def block(normalized, x, w, b):
        return x + jnp.sin(normalized(x, w, b))

    def plain(x, w, b):
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-5) * w + b).astype(
            x.dtype
        )

    forms = {"plain": functools.partial(block, plain), "kpx": functools.partial(block, kpx.ops.layer_norm)}
    return {"shapes": ((tokens, size), (size,), (size,)), "others": {}} | forms


def grouped_case(rows: int, groups: int, size: int, width: int) -> dict[str, Any]:
    """Rows by their experts' matrices, bf16, of experts that have different numbers of rows."""
    sizes = np.random.default_rng(0).multinomial(rows, np.ones(groups) / groups).astype(np.int32)

    def form(product, x, w):
        return product(x, w, jnp.asarray(sizes))

    forms = {"plain": jax.lax.ragged_dot, "kpx": kpx.ops.grouped_matmul}
    found = {name: functools.partial(form, product) for name, product in forms.items()}
    return {"shapes": ((rows, size), (groups, size, width)), "others": {}} | found


def decoding_case(kv_length: int, batch: int = 8, page: int = 0) -> dict[str, Any]:
    """One query's attention over a cache that is half full, bf16, 32 heads that share 8; whole, or in pages."""
    lengths = np.full(batch, kv_length // 2, np.int32)
    if not page:

        def plain(q, k, v):
            given = {"scale": 128**-0.5, "causal": False, "given": "kv_lengths"}
            return attention_kernel.decomposition(q, k, v, jnp.asarray(lengths), **given)

        def ours(q, k, v):
            return kpx.ops.attention(q, k, v, kv_lengths=jnp.asarray(lengths))

        cache = (batch, 8, kv_length, 128)
        return {"shapes": ((batch, 32, 1, 128), cache, cache), "plain": plain, "kpx": ours, "others": {}, "alone": True}
    each = kv_length // page
    table = np.random.default_rng(0).permutation(batch * each).reshape(batch, each).astype(np.int32)

    def in_pages(function, q, k, v):
        return function(q, k, v, jnp.asarray(lengths), jnp.asarray(table), scale=128**-0.5)

    forms = {"plain": functools.partial(in_pages, paged_attention_kernel.decomposition)}
    forms["kpx"] = functools.partial(in_pages, kpx.ops.paged_attention)
    pages = (8, batch * each, page, 128)
    return {"shapes": ((batch, 32, 128), pages, pages), "others": {}, "alone": True} | forms


def gated_case(rows: int, size: int, width: int) -> dict[str, Any]:
    """A gated linear layer (SwiGLU), bf16; its kernels are used by name."""

    def plain(x, gate, up):
        return jax.nn.silu(x @ gate) * (x @ up)

    names = {"cuda": "gated_triton_cuda", "rocm": "gated_triton_rocm", "tpu": "gated_pallas"}
    named = {platform: {"kpx.gated_linear": name} for platform, name in names.items()}
    shapes = (rows, size), (size, width), (size, width)
    return {"shapes": shapes, "plain": plain, "kpx": plain, "others": {}, "named": named}


def quantized_norm_case(tokens: int, size: int) -> dict[str, Any]:
    """A sum, its RMS norm, and that in int8 with a scale for each row."""

    def plain(x, residual, w):
        total = x + residual
        wide = total.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6) * w.astype(jnp.float32)
        scale = jnp.max(jnp.abs(y), -1, keepdims=True) / 127
        return jnp.round(y / scale).astype(jnp.int8), scale, total

    shapes = (tokens, size), (tokens, size), (size,)
    return {"shapes": shapes, "plain": plain, "kpx": plain, "others": {}, "alone": True}


def group_norm_case(batch: int, side: int, channels: int, groups: int) -> dict[str, Any]:
    """A group norm and its SiLU, channels last."""

    def plain(x, w, b):
        return jax.nn.silu(by_groups(x, groups, 1e-5, -1) * w + b).astype(x.dtype)

    ours = functools.partial(_group_norm, groups)
    shapes = (batch, side, side, channels), (channels,), (channels,)
    return {"shapes": shapes, "plain": plain, "kpx": ours, "others": {}, "alone": True}


def _group_norm(groups, x, w, b):
    return kpx.ops.group_norm(x, groups, w, b, activation="silu")


def rotary_case(batch: int, heads: int, length: int) -> dict[str, Any]:
    """Rotary embedding of heads of 128."""

    def plain(x, cos, sin):
        first, second = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-second, first], -1) * sin

    shapes = (batch, heads, length, 128), (length, 128), (length, 128)
    return {"shapes": shapes, "plain": plain, "kpx": plain, "others": {}, "alone": True}


def separable_case(batch: int, side: int, channels: int, width: int) -> dict[str, Any]:
    """A depthwise convolution of 3x3, ReLU, and one of 1x1; its kernel is used by name."""

    def convolved(x, w, groups):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    def plain(x, depthwise, pointwise):
        return convolved(jnp.maximum(convolved(x, depthwise, channels), 0), pointwise, 1)

    named = {platform: {"kpx.separable_conv": f"separable_{platform}"} for platform in ("cuda", "rocm")}
    shapes = (batch, side, side, channels), (3, 3, 1, channels), (1, 1, channels, width)
    return {"shapes": shapes, "plain": plain, "kpx": plain, "others": {}, "named": named, "alone": True}


def cases(small: bool) -> dict[str, dict[str, Any]]:
    """What is measured and compiled, by name."""
    lengths = (256,) if small else (4096, 16384)
    found = {f"attention, {n}": attention_case(n) for n in lengths}
    cache = 512 if small else 8192
    found[f"decoding, a cache of {cache}"] = decoding_case(cache)
    found[f"decoding, {cache} in pages"] = decoding_case(cache, page=16)
    tokens, vocabulary, size = (64, 1000, 32) if small else (8192, 128256, 4096)
    found[f"linear + cross-entropy, {vocabulary}"] = loss_case(tokens, vocabulary, size)
    rows, groups, size, width = (64, 4, 32, 16) if small else (8192, 16, 2048, 1024)
    found[f"layer norm, {tokens} of {4 * width}"] = norm_case(tokens, 4 * width)
    found[f"grouped matmul, {rows} rows, {groups} groups"] = grouped_case(rows, groups, size, width)
    rows, size, width = (128, 128, 256) if small else (8192, 4096, 14336)
    found[f"gated linear, {rows} by {size} by {width}"] = gated_case(rows, size, width)
    found[f"sum, norm and int8, {rows} of {size}"] = quantized_norm_case(rows, size)
    side, channels = (8, 64) if small else (64, 320)
    found[f"group norm and SiLU, {side} by {side} by {channels}"] = group_norm_case(4, side, channels, 32)
    found["rotary, heads of 128"] = rotary_case(1, 4, 64) if small else rotary_case(4, 32, 4096)
    side, channels = (8, 32) if small else (56, 256)
    found[f"depthwise-separable, {side} by {side} by {channels}"] = separable_case(8, side, channels, 2 * channels)
    return found


def with_gradient(function: Callable) -> Callable:
    """The result's sum of squares, and its gradients by every input."""

    def total(*arrays):
        return jnp.sum(jnp.square(function(*arrays).astype(jnp.float32)))

    return lambda *arrays: jax.value_and_grad(total, tuple(range(len(arrays))))(*arrays)


def compiled(target: str, case: dict[str, Any], backward: bool) -> dict[str, Any]:
    """Bytes beyond arguments and results, and all that are moved, of the plain form and of kpx's; kernels that were chosen."""
    specs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in case["shapes"]]
    row: dict[str, Any] = {}
    for name, level in (("plain", "conservative"), ("kpx", "balanced")):
        function = with_gradient(case[name]) if backward else case[name]
        try:
            named = case.get("named", {}).get(kpx.Target(target).platform, {}) if name == "kpx" else {}
            made = kpx.compile(function, *specs, target=target, config=kpx.Config(level=level, kernels=named))
        except kpx.KpxError as error:
            row[name] = {"error": str(error).splitlines()[0]}
            continue
        row[name] = {"temporary": made.memory.temp_bytes, "moved": made.cost.bytes}
        row[name] |= {"products": made.cost.product_flops, "kernels": made.kernels, "fusions": made.fusions}
    return row


def measured(case: dict[str, Any], backward: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each form on this machine's device, as ratios to the fastest, and its distance from an f32 reference."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in case["shapes"]]
    wrap = with_gradient if backward else lambda f: f
    forms = {"kpx": kpx.jit(wrap(case["kpx"])), "plain XLA": jax.jit(wrap(case["plain"]))}
    forms |= {name: jax.jit(wrap(f)) for name, f in case["others"].items()}
    for kernel, name in _implementations(wrap(case["kpx"]), arrays):
        forms[name] = kpx.jit(wrap(case["kpx"]), config=kpx.Config(kernels={kernel: name}))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(wrap(case["plain"]))(*(a.astype(jnp.float32) for a in arrays))
    rows: dict[str, Any] = {}
    for name, form in list(forms.items()):
        try:
            result = jax.block_until_ready(form(*arrays))
        except Exception as error:  # what a library does not have here is told, and left out
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            del forms[name]
            continue
        rows[name] = {"distance": max(map(_distance, jax.tree.leaves(result), jax.tree.leaves(exact)))}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(*arrays))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        rows[name] |= {"seconds": median, "of the fastest": median / min(medians.values())}
    return rows


def _implementations(function: Callable, arrays: list[Any]) -> list[tuple[str, str]]:
    """The kernels of a function's fused ops here, each with one that takes its place by name."""
    with selection.recording() as found:
        kpx.compile(function, *arrays)
    platform = jax.default_backend().replace(
        "gpu", "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"
    )
    kernels = {case.kernel: registry.find(case.kernel) for case in found}
    return [
        (name, i.name) for name, kernel in kernels.items() if kernel is not None for i in kernel.on_target(platform)
    ]


def _distance(value: Any, exact: Any) -> float:
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    return float(np.sqrt(np.mean(np.square(value - exact))) / (np.sqrt(np.mean(np.square(exact))) or 1))


def show(console: Console, result: dict[str, Any]) -> None:
    """Prints what was measured and what was compiled."""
    if isinstance(result["measured"], str):
        console.print(f"measured: {result['measured']}")
    else:
        table = Table("case", "form", "of the fastest", "from f32", title=f"measured on {result['device']}")
        for name, rows in result["measured"].items():
            for form, row in rows.items():
                cells = (
                    ("error", row["error"])
                    if "error" in row
                    else (f"{row['of the fastest']:.2f}", f"{row['distance']:.1e}")
                )
                table.add_row(name, form, *cells)
        console.print(table)
    table = Table("target", "case", "plain", "with kernels", "moved", "products", "fused")
    table.title = "memory beyond arguments and results; what is moved, and products, with kernels over without"
    for target, rows in result["compiled"].items():
        for name, row in rows.items():
            sizes = (row[k].get("error") or f"{row[k]['temporary'] / 2**20:,.0f} MiB" for k in ("plain", "kpx"))
            plain, ours = row["plain"], row["kpx"]
            whole = not ("error" in plain or "error" in ours)
            ratios = [f"{ours[k] / plain[k]:.2f}" if whole and plain[k] else "" for k in ("moved", "products")]
            table.add_row(target, name, *sizes, *ratios, ", ".join(ours.get("fusions", {})))
    console.print(table)
    table = Table("kernel", "architecture", "registers", "spilled", "shared memory", title="kernels, by Triton")
    for row in result["resources"]:
        table.add_row(row["kernel"], row["architecture"], *(str(row[k]) for k in ("registers", "spilled", "shared")))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="small cases, measured on whatever device there is")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    device = jax.devices()[0]
    runs = [
        (name, case, backward)
        for name, case in cases(given.small).items()
        for backward in (False, True)
        if not (backward and case.get("alone"))
    ]
    label = lambda name, backward: f"{name}, {'forward and backward' if backward else 'forward'}"  # noqa: E731
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": cpu.model(),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
        "measured": "not run: there is no GPU here",
        "compiled": {
            t: {label(n, b): compiled(t, c, b) for n, c, b in runs}
            for t in TARGETS
            if plugins.find(kpx.Target(t).platform)
        },
        "resources": kernel_resources.every() if importlib.util.find_spec("triton") else [],
    }
    if device.platform == "gpu" or given.small:
        result["measured"] = {label(n, b): measured(c, b, given.rounds) for n, c, b in runs}
    show(console, result)
    if given.json:
        pathlib.Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
