"""Attention on the CPU: some queries at a time, against XLA's plain form, jax.nn's and PyTorch's.

`python -m bench.cpu_attention [--json FILE] [--rounds 5] [--small]`

All forms run in turn within one process; each row tells how many times faster kpx is than the others, by medians, forward
and with gradients, and whether kpx chose to cut. That results are right is the tests' to tell.
"""

from __future__ import annotations

import argparse
import functools
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
import torch
from rich.console import Console
from rich.table import Table

import kpx
from kpx.hardware import cpu
from kpx.kernels.attention import attention_kernel

# Batch, heads, heads of keys, length, size.
CASES = [(8, 12, 12, 128, 64), (4, 12, 12, 256, 64), (1, 12, 12, 512, 64), (1, 32, 8, 512, 64), (2, 12, 12, 1024, 64),
         (1, 8, 8, 2048, 64)]  # fmt: skip
SMALL = [(1, 4, 2, 64, 16), (1, 8, 8, 512, 16)]


def plain(causal: bool, size: int) -> Callable:
    """As XLA computes it, with its products by the same library as kpx's."""
    function = functools.partial(attention_kernel.decomposition, scale=size**-0.5, causal=causal)
    return kpx.jit(function, config=kpx.Config(disable=_patterns()))


@functools.cache
def _patterns() -> tuple[str, ...]:
    from kpx.kernels.patterns import patterns

    return tuple(p.name for p in patterns() if p.name.startswith("attention."))


def forms(causal: bool, group: int, size: int) -> dict[str, Callable]:
    """What is compared, by name; each takes and gives arrays of JAX."""
    ours = functools.partial(kpx.ops.attention, causal=causal)

    def nn(q, k, v):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
        return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=causal), 1, 2)

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)

    return {"kpx": kpx.jit(ours), "plain": plain(causal, size), "jax.nn": jax.jit(nn), "PyTorch": sdpa}


def trained(function: Callable, in_torch: bool) -> Callable:
    """The gradients of a sum of sines, by all arrays."""
    if not in_torch:
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a).astype(jnp.float32))), (0, 1, 2))

    def gradients(*arrays):
        arrays = [a.detach().requires_grad_() for a in arrays]
        function(*arrays).float().sin().sum().backward()
        return [a.grad for a in arrays]

    return gradients


def run(case: tuple, causal: bool, gradient: bool, dtype: str, rounds: int) -> dict[str, Any]:
    """One row: medians over kpx's, and whether it chose to cut."""
    batch, heads, kv_heads, length, size = case
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((batch, h, length, size)).astype(np.float32) for h in (heads, kv_heads, kv_heads)]
    arrays = [jnp.asarray(a, dtype) for a in exact]
    tensors = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in exact]
    found = forms(causal, heads // kv_heads, size)
    calls = {}
    for name, form in found.items():
        in_torch = name == "PyTorch"
        if gradient:
            form = trained(form, in_torch)
            form = form if in_torch else kpx.jit(form, config=_config(name)) if name != "jax.nn" else jax.jit(form)
        calls[name] = functools.partial(form, *(tensors if in_torch else arrays))
    ours = functools.partial(kpx.ops.attention, causal=causal)
    compiled = kpx.compile(trained(ours, False) if gradient else ours, *arrays)
    fused = compiled.kernels.get("kpx.attention", "") == "in_chunks" or any("gradient" in f for f in compiled.fusions)
    row = {"case": case, "causal": causal, "gradient": gradient, "dtype": dtype, "cut": fused}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())  # compiles
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
        time.sleep(0.3)  # PyTorch's threads, the last, wait actively for 0.2 s
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return row | {"times faster than": {n: round(s / medians["kpx"], 3) for n, s in medians.items() if n != "kpx"}}


def _config(name: str) -> kpx.Config:
    return kpx.Config(disable=_patterns()) if name == "plain" else kpx.Config()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = SMALL if given.small else CASES
    rows = [
        run(case, causal, gradient, dtype, given.rounds)
        for dtype in ("float32", "bfloat16")
        for gradient in (False, True)
        for case in cases[3 * gradient * (not given.small) :]
        for causal in (False, True)
    ]
    table = Table("dtype", "case", "", "", "plain", "jax.nn", "PyTorch", "cut")
    table.title = "how many times faster kpx is"
    for row in rows:
        ratios = (f"{r:.2f}" for r in row["times faster than"].values())
        kind = "causal" if row["causal"] else "", "gradients" if row["gradient"] else ""
        table.add_row(row["dtype"], "x".join(map(str, row["case"])), *kind, *ratios, "yes" if row["cut"] else "")
    Console().print(table)
    if given.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "kpx": kpx.__version__}
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": cpu.model(),
            "versions": versions,
            "rounds": given.rounds,
        }
        pathlib.Path(given.json).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
