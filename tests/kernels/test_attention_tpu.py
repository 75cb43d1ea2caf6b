"""The TPUs' attention, interpreted: results and gradients against f64."""

import jax.numpy as jnp
import numpy as np
import pytest

from kpx.kernels.attention_tpu import interpreted
from tests.kernels.attention_reference import check

# Batch, heads, heads of keys, length, keys, size; and what is computed.
CASES = {
    "causal": ((2, 4, 4, 256, 256, 64), {"causal": True}),
    "full": ((1, 2, 2, 128, 384, 128), {}),
    "grouped heads": ((1, 4, 2, 256, 256, 64), {"causal": True}),
    "heads of 80": ((1, 2, 1, 128, 128, 80), {"causal": True}),
    "a causal window": ((1, 2, 2, 256, 256, 64), {"causal": True, "window": 40}),
    "a window": ((1, 2, 2, 128, 256, 64), {"window": 70}),
    "a cap": ((1, 2, 2, 128, 128, 64), {"causal": True, "softcap": 1.5}),
    "lengths that are padded": ((1, 2, 1, 120, 250, 64), {}),
    "lengths that are padded, causal": ((1, 2, 1, 250, 250, 64), {"causal": True}),
}


def _arrays(shape, dtype):
    batch, heads, kv_heads, length, kv_length, size = shape
    rng = np.random.default_rng(0)
    shapes = (heads, length, size), (kv_heads, kv_length, size), (kv_heads, kv_length, size), (heads, length, size)
    return [rng.standard_normal((batch, *s)).astype(dtype) for s in shapes]


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_attention(case):
    shape, given = CASES[case]
    check(interpreted, _arrays(shape, np.float32), **given)


def test_results_and_gradients_in_bf16_are_those_of_attention():
    check(interpreted, _arrays((1, 4, 2, 256, 256, 64), jnp.bfloat16), causal=True, relative=8e-3)


@pytest.mark.parametrize("given", [{}, {"causal": True}, {"window": 30}, {"causal": True, "window": 20}])
@pytest.mark.parametrize("length", [128, 121])
def test_keys_that_bools_hide_have_no_weight_and_a_query_that_sees_none_is_zero(given, length):
    seen = np.random.default_rng(0).random((2, 1, 1, length)) < 0.5
    seen[0, ..., :50] = False
    seen[1] = False
    out, by_query, _, _ = check(interpreted, _arrays((2, 4, 2, length, length, 64), np.float32), hidden=seen, **given)
    assert not np.any(out[1])
    assert not np.any(by_query[1])
