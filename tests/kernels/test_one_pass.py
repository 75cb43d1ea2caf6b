"""What XLA computes in one pass over memory already, and kpx therefore has no kernel for."""

import jax
import jax.numpy as jnp
import optax
import pytest

import kpx

WEIGHTS = {name: jax.ShapeDtypeStruct((1024, 1024), jnp.float32) for name in "abcd"}
BYTES = sum(w.size * 4 for w in WEIGHTS.values())


@pytest.mark.parametrize("target", ["cuda:h100", "rocm:mi300x", "tpu-v5e"])
def test_a_step_of_adamw_reads_four_arrays_and_writes_three(target):
    optimizer = optax.adamw(1e-3)

    def step(weights, state, gradients):
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    compiled = kpx.compile(step, WEIGHTS, jax.eval_shape(optimizer.init, WEIGHTS), WEIGHTS, target=target)
    assert 7 * BYTES <= compiled.cost.bytes < 7.01 * BYTES
