"""Llama in JAX with its layers in a scan, and its training step, for compiling at pod scale; no weights are made.

Source: Touvron et al. 2023 (arXiv:2302.13971); grouped queries as in Llama 2 and 3. Sizes of the 1B: Llama 3.2 1B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


@dataclass(frozen=True)
class Sizes:
    """A Llama's sizes; those of Llama 3.2 1B by default (1.24 billion parameters, embeddings tied)."""

    width: int = 2048
    hidden: int = 8192
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def head(self) -> int:
        return self.width // self.heads


def shapes(sizes: Sizes) -> dict[str, Any]:
    """Weights' shapes, layers stacked, with the mesh axes that each dimension is sharded over."""
    n, w, h = sizes.layers, sizes.width, sizes.hidden
    q, kv = sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    layer = {
        "norm1": ((n, w), P(None, None)),
        "q": ((n, w, q), P(None, "fsdp", "model")),
        "k": ((n, w, kv), P(None, "fsdp", "model")),
        "v": ((n, w, kv), P(None, "fsdp", "model")),
        "o": ((n, q, w), P(None, "model", "fsdp")),
        "norm2": ((n, w), P(None, None)),
        "gate": ((n, w, h), P(None, "fsdp", "model")),
        "up": ((n, w, h), P(None, "fsdp", "model")),
        "down": ((n, h, w), P(None, "model", "fsdp")),
    }
    return {"embedding": ((sizes.vocabulary, w), P("model", "fsdp")), "norm": ((w,), P(None)), "layers": layer}


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary embedding of `x` [batch, length, heads, head]."""
    half = x.shape[-1] // 2
    frequency = 500000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * frequency
    cos, sin = (f(angle)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _layer(x: jax.Array, w: dict[str, jax.Array], sizes: Sizes) -> jax.Array:
    batch, length, _ = x.shape
    with jax.named_scope("attention"):
        h = _norm(x, w["norm1"])
        q = _rotated((h @ w["q"]).reshape(batch, length, sizes.heads, sizes.head))
        k = _rotated((h @ w["k"]).reshape(batch, length, sizes.kv_heads, sizes.head))
        v = (h @ w["v"]).reshape(batch, length, sizes.kv_heads, sizes.head)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(batch, length, -1) @ w["o"]
    with jax.named_scope("mlp"):
        h = _norm(x, w["norm2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def loss(weights: dict[str, Any], tokens: jax.Array, sizes: Sizes, rows: NamedSharding) -> jax.Array:
    """The mean cross-entropy of each next token; products in bf16, weights f32.

    Args:
        rows: how activations [batch, length, width] are sharded; left open, propagation repeats the batch everywhere.
    """

    def kept(x):
        return jax.lax.with_sharding_constraint(x, rows)

    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    with jax.named_scope("embedding"):
        x = kept(narrow["embedding"][tokens])
    step = jax.checkpoint(lambda x, w: (kept(_layer(x, w, sizes)), None))
    x, _ = jax.lax.scan(step, x, narrow["layers"])
    with jax.named_scope("head"):
        logits = (_norm(x, narrow["norm"]) @ narrow["embedding"].T).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))


def training_step(sizes: Sizes, mesh: jax.sharding.AbstractMesh, batch: int, length: int) -> tuple[Callable, tuple]:
    """A step of AdamW, and the structs of its arguments over a mesh with the axes `fsdp` and `model`.

    The batch is sharded over `fsdp`, weights and the optimizer's state over both.
    """
    optimizer, rows = optax.adamw(3e-4), NamedSharding(mesh, P("fsdp"))

    def step(weights, state, tokens):
        value, gradient = jax.value_and_grad(loss)(weights, tokens, sizes, rows)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    def struct(entry):
        shape, spec = entry
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    weights = jax.tree.map(struct, shapes(sizes), is_leaf=lambda leaf: isinstance(leaf, tuple))
    plain = jax.eval_shape(optimizer.init, weights)
    sharding = {leaf.shape: leaf.sharding for leaf in jax.tree.leaves(weights)}
    everywhere = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.get(s.shape, everywhere)), plain
    )
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    return step, (weights, state, tokens)


def step_flops(sizes: Sizes, batch: int, length: int) -> float:
    """The products of a training step by hand: forward, twice that backward, and what remat repeats.

    A layer's last product is not repeated: nothing backward needs its result.
    """
    tokens, w = batch * length, sizes.width
    kv = sizes.kv_heads * sizes.head
    last = 2 * tokens * w * sizes.hidden
    layer = 2 * tokens * (2 * w * w + 2 * w * kv + 2 * w * sizes.hidden) + last + 2 * 2 * batch * length**2 * w
    return sizes.layers * (4 * layer - last) + 3 * 2 * tokens * w * sizes.vocabulary
