"""Training steps to plan: a Llama in JAX with its layers in a scan, small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import llama

SMALL = llama.Sizes(width=64, hidden=128, layers=4, heads=8, kv_heads=4, vocabulary=256)
OPTIMIZER = optax.adamw(1e-3)


def llama_loss(sizes=SMALL, dtype=jnp.float32):
    """`(weights, tokens) -> loss`, with no word of shardings; its layers are checkpointed, in a scan."""

    def loss(weights, tokens):
        weights = jax.tree.map(lambda w: w.astype(dtype), weights)
        x = weights["embedding"][tokens]
        layer = jax.checkpoint(lambda x, w: (llama._layer(x, w, sizes), None))
        x, _ = jax.lax.scan(layer, x, weights["layers"])
        logits = (llama._norm(x, weights["norm"]) @ weights["embedding"].T).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    return loss


def llama_step(sizes=SMALL, dtype=jnp.float32):
    """`(weights, state, tokens) -> (weights, state, loss)`."""
    loss = llama_loss(sizes, dtype)

    def step(weights, state, tokens):
        value, gradient = jax.value_and_grad(loss)(weights, tokens)
        updates, state = OPTIMIZER.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    return step


def specs(sizes=SMALL, batch=16, length=32):
    """The structs of its arguments."""
    weights = jax.tree.map(
        lambda e: jax.ShapeDtypeStruct(e[0], jnp.float32), llama.shapes(sizes), is_leaf=lambda e: isinstance(e, tuple)
    )
    return weights, jax.eval_shape(OPTIMIZER.init, weights), jax.ShapeDtypeStruct((batch, length), jnp.int32)


def start(sizes=SMALL):
    """Seeded weights, and the optimizer's state."""
    leaves, tree = jax.tree.flatten(specs(sizes)[0])
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jax.random.normal(k, s.shape) * 0.05 if len(s.shape) > 1 else jnp.ones(s.shape)
        for k, s in zip(keys, leaves, strict=True)
    ]
    weights = jax.tree.unflatten(tree, made)
    return weights, OPTIMIZER.init(weights)


def batches(count, batch=16, length=32):
    return [np.random.default_rng(i).integers(0, 256, (batch, length)).astype(np.int32) for i in range(count)]
