"""The TPUs' attention, interpreted: results and gradients against f64."""

import jax.numpy as jnp
import numpy as np
import pytest

from kpx.kernels import visible
from kpx.kernels.attention_tpu import interpreted
from tests.kernels.attention_reference import arrays_of, banded, check, further

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


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_attention(case):
    shape, given = CASES[case]
    check(interpreted, arrays_of(shape, np.float32), **given)


def test_results_and_gradients_in_bf16_are_those_of_attention():
    check(interpreted, arrays_of((1, 4, 2, 256, 256, 64), jnp.bfloat16), causal=True, relative=8e-3)


@pytest.mark.parametrize("given", [{}, {"causal": True}, {"window": 30}, {"causal": True, "window": 20}])
@pytest.mark.parametrize("length", [128, 121])
def test_keys_that_bools_hide_have_no_weight_and_a_query_that_sees_none_is_zero(given, length):
    seen = np.random.default_rng(0).random((2, 1, 1, length)) < 0.5
    seen[0, ..., :50] = False
    seen[1] = False
    out, by_query, _, _ = check(interpreted, arrays_of((2, 4, 2, length, length, 64), np.float32), hidden=seen, **given)
    assert not np.any(out[1])
    assert not np.any(by_query[1])


FURTHER = {
    "sinks": ("sinks", {"causal": True}),
    "lengths": ("kv_lengths", {}),
    "segments": ("segments", {}),
    "segments, causal": ("segments", {"causal": True}),
    "segments of keys": ("segments kv_segments", {"causal": True}),
    "segments and lengths": ("segments kv_lengths", {"window": 40}),
    "sinks and lengths": ("sinks kv_lengths", {"causal": True}),
}


@pytest.mark.parametrize("length", [256, 245])
@pytest.mark.parametrize("what", FURTHER)
def test_results_and_gradients_are_those_of_attention_given(what, length):
    names, given = FURTHER[what]
    arrays = further(3, 4, length, length)
    variable = {n: arrays[n] for n in names.split() if n == "sinks"}
    fixed = {n: arrays[n] for n in names.split() if n not in variable}
    check(interpreted, arrays_of((3, 4, 2, length, length, 64), np.float32), fixed=fixed, variable=variable, relative=4e-6,
          **given)  # fmt: skip


@pytest.mark.parametrize("further_names", ["", "segments", "kv_lengths"])
@pytest.mark.parametrize("length", [256, 245])
def test_a_known_mask_is_taken_as_it_is(length, further_names):
    seen = banded(length)
    seen[7] = False
    fixed = {n: further(2, 2, length, length)[n] for n in further_names.split()}
    check(interpreted, arrays_of((2, 2, 2, length, length, 64), np.float32), fixed={"mask": seen} | fixed, causal=True,
          visible=visible.in_bits(seen))  # fmt: skip


@pytest.mark.parametrize("length", [128, 121])
def test_a_query_that_sees_nothing_sees_all_alike_where_what_is_hidden_has_a_score(length):
    seen = np.random.default_rng(0).random((2, 1, 1, length)) < 0.5
    seen[1] = False
    check(interpreted, arrays_of((2, 4, 2, length, length, 64), np.float32), hidden=seen, low=-1e9)
