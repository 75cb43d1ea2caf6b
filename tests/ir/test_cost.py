"""FLOPs and bytes."""

import jax
import jax.numpy as jnp
import pytest

from kpx.ir.cost import cost


def _cost(fn, *arrays):
    return cost(jax.jit(fn).lower(*arrays).compiler_ir("stablehlo"))


def test_a_product_costs_two_flops_a_term():
    found = _cost(jnp.dot, jnp.ones((4, 8)), jnp.ones((8, 16)))
    assert found.flops == 2 * 4 * 8 * 16


def test_a_convolution_costs_its_kernel_at_every_output():
    x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((5, 3, 3, 3))
    found = _cost(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), x, w)
    assert found.flops == 2 * (5 * 6 * 6) * (3 * 3 * 3)


def test_a_scan_costs_its_body_times_its_length():
    w = jnp.ones((7, 8, 8))
    found = _cost(lambda x, w: jax.lax.scan(lambda c, w: (c @ w, None), x, w)[0], jnp.ones((4, 8)), w)
    assert found.flops == pytest.approx(7 * 2 * 4 * 8 * 8, rel=0.01)


def test_bytes_hold_arguments_and_results():
    found = _cost(lambda x: x + 1, jnp.ones(1000, jnp.bfloat16))
    assert found.bytes == 2 * 2 * 1000
