"""Masks that no input decides, however they are computed, become what they are."""

import jax
import jax.numpy as jnp
import pytest

import kpx
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.passes import known_masks

LENGTH = 160


def _positions(axis):
    return jnp.expand_dims(jnp.arange(LENGTH), 1 - axis)


WRITTEN = {
    "by counting": (lambda: jnp.cumsum(jnp.ones((LENGTH, LENGTH), jnp.int32), 0) > _positions(1), "causal"),
    "by indexing": (
        lambda: jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[jnp.arange(LENGTH)][:, jnp.arange(LENGTH)],
        "causal",
    ),
    "as everything": (lambda: jnp.cumsum(jnp.ones((LENGTH, LENGTH), jnp.int32), 0) > 0, "true"),
    "as a window": (lambda: jnp.abs(_positions(0) - _positions(1)) % LENGTH < 20, "left"),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_mask_is_known(written):
    mask, becomes = WRITTEN[written]
    lowered = jax.jit(lambda x: jnp.where(mask(), x, 0)).lower(jnp.ones((2, LENGTH, LENGTH)))
    module = lowered.compiler_ir("stablehlo")
    m.inline_calls(module)
    assert known_masks.simplify(module) == (becomes != "left")
    m.verify(module)
    select = [op for op in m.walk(m.main(module)) if op.operation.name == "stablehlo.select"][-1]
    assert known_masks.is_by_position(select.operands[0]) == (becomes != "left")
    x = jnp.arange(2.0 * LENGTH * LENGTH).reshape(2, LENGTH, LENGTH)
    assert (call_module(module)(x)[0] == jnp.where(mask(), x, 0)).all()


def test_a_mask_that_an_input_decides_is_left():
    module = jax.jit(lambda x, m: jnp.where(m > 0, x, 0)).lower(*[jnp.ones((8, 8))] * 2).compiler_ir("stablehlo")
    assert known_masks.simplify(module) == 0


@pytest.mark.parametrize("target", ["cuda:h100", "tpu-v5e"])
def test_attention_under_a_causal_mask_that_was_computed_is_causal(target):
    def attend(q, k, v):
        mask = jnp.cumsum(jnp.ones((LENGTH, LENGTH), jnp.int32), 0) > _positions(1)
        scores = jnp.where(mask, q @ jnp.swapaxes(k, -1, -2) * 0.1, -jnp.inf)
        return jax.nn.softmax(scores, -1) @ v

    spec = jax.ShapeDtypeStruct((2, 4, LENGTH, 64), jnp.bfloat16)
    assert "cumsum" in str(jax.make_jaxpr(attend)(spec, spec, spec))
    compiled = kpx.compile(attend, spec, spec, spec, target=target)
    assert compiled.fusions == {"kpx.attention": 1}
