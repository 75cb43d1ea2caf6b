"""Training steps to plan: a Llama in JAX with its layers in a scan, small."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kpx
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


def plans_that_train_alike(*kinds, count=3):
    """A step, and plans of it by their axes for this machine's devices, each found to train to the losses of one device."""
    step, data = llama_step(), batches(count)
    weights, state = start()
    plain, wanted, plans = jax.jit(step), [], []
    for tokens in data:
        weights, state, loss = plain(weights, state, tokens)
        wanted.append(float(loss))
    for fixed in kinds:
        weights, state = start()
        plan = kpx.plan(step, weights, state, data[0], target="cpu", fixed=fixed)
        assert {a: n for a, n in plan.mesh.items() if n > 1} == fixed, plan.mesh
        planned = plan.apply(step)
        for tokens, loss in zip(data, wanted, strict=True):
            weights, state, found = planned(weights, state, tokens)
            np.testing.assert_allclose(found, loss, atol=1e-5)
        placed = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), (weights, state), plan.placed()[:2])
        assert all(jax.tree.leaves(placed))
        plans.append(plan)
    return step, plans
