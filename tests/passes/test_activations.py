"""Activations are recognised by their expression: every spelling of one, and nothing that is nearly one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kpx.ir import module as m
from kpx.passes.activations import ROOTS, activation

SPELLINGS = {
    "relu": [jax.nn.relu, lambda x: jnp.maximum(x, 0), lambda x: jnp.maximum(-0.0, x)],
    "silu": [
        jax.nn.silu,
        lambda x: x * jax.nn.sigmoid(x),
        lambda x: x / (1 + jnp.exp(-x)),
        lambda x: 0.5 * x * (1 + jnp.tanh(x / 2)),
        lambda x: x * (1 / (jnp.exp(-x) + 1)),
    ],
    "gelu": [
        functools.partial(jax.nn.gelu, approximate=False),
        lambda x: 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2))),
        lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))),
        lambda x: x * 0.5 * (1 - jax.lax.erf(-x * math.sqrt(0.5))),
        lambda x: x / 2 * jax.lax.erfc(-x * math.sqrt(0.5)),
    ],
    "gelu_tanh": [
        jax.nn.gelu,
        lambda x: 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + jnp.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
        lambda x: x * jax.nn.sigmoid(1.5957691216 * (x + 0.044715 * jnp.power(x, 3.0))),
    ],
    "tanh": [jnp.tanh],
    "logistic": [jax.nn.sigmoid, lambda x: 1 / (1 + jnp.exp(-x)), lambda x: 0.5 * jnp.tanh(0.5 * x) + 0.5],
}
NEAR_MISSES = {
    "clamped below the range that is usual": lambda x: jax.nn.silu(jnp.maximum(x, -7)),
    "clamped within the gate alone": lambda x: x * jax.nn.sigmoid(jnp.maximum(x, -6.5)),
    "clamped outside of the gate alone": lambda x: jnp.maximum(x, -7) * jax.nn.sigmoid(x),
    "clamped far above": lambda x: jax.nn.gelu(jnp.minimum(x, 100), approximate=False),
    "a wider gate": lambda x: x * jax.nn.sigmoid(1.01 * x),
    "GELU by 1.702": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "a bound that is nearly zero": lambda x: jnp.maximum(x, 1e-4),
    "another cube": lambda x: 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3))),
    "with a zero of its own, which NaN and infinities make NaN": lambda x: jax.nn.silu(x) + 0 * x,
    "with a difference that is zero but for NaN": lambda x: jnp.tanh(x) + (x - x),
    "Mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "through f16, which overflows": lambda x: jax.nn.silu(x.astype(jnp.float16)).astype(x.dtype),
    "two inputs": lambda x: x * jax.nn.sigmoid(x[::-1]),
}


def _found(function, dtype) -> str | None:
    """The activation of its argument that a function computes."""
    text = jax.jit(function).lower(jax.ShapeDtypeStruct((4,), dtype)).as_text()
    module = m.parse(text)
    m.inline_calls(module)
    m.run_passes(module, "cse,symbol-dce")
    returned = next(op for op in m.walk(m.main(module)) if op.operation.name == "func.return").operands[0]
    root = m.producer(returned)
    found = activation(root) if isinstance(root, ROOTS) else None
    return None if found is None or m.producer(found[0]) is not None else found[1]


@pytest.mark.parametrize(
    ("name", "spelling"), [(n, i) for n, spellings in SPELLINGS.items() for i in range(len(spellings))]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_spelling_is_recognised(name, spelling, dtype):
    assert _found(SPELLINGS[name][spelling], dtype) == name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name, dtype):
    assert _found(NEAR_MISSES[name], dtype) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_change_of_a_constant_is_a_near_miss(seed):
    rng = np.random.default_rng(seed)
    by = 1 + float(rng.choice([-1, 1])) * 10 ** float(rng.uniform(-5, -1))
    where = rng.integers(3)
    changed = (
        lambda x: x * jax.nn.sigmoid(by * x),
        lambda x: by * x * jax.nn.sigmoid(x),
        lambda x: 0.5 * x * (by + jax.lax.erf(x * math.sqrt(0.5))),
    )[where]
    assert _found(changed, jnp.float32) is None
