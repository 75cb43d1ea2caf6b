"""The CPU's attention, some queries at a time: results and gradients against f64, and where it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import onednn, visible
from kpx.kernels.attention_cpu import in_chunks
from tests.kernels.attention_reference import arrays_of, banded, check, further
from tests.optional import torch

# Batch, heads, heads of keys, length, keys, size, and of values.
SHAPES = {
    "chunks that divide": (1, 2, 2, 256, 256, 16, 16),
    "chunks that do not": (2, 4, 2, 700, 700, 8, 8),
    "more keys": (1, 2, 1, 300, 900, 16, 8),
    "more queries": (1, 2, 1, 900, 200, 16, 16),
    "few queries": (2, 2, 2, 5, 40, 8, 8),
}
SETTINGS = {
    "all": {},
    "causal": {"causal": True},
    "a window": {"window": 30},
    "a causal window": {"causal": True, "window": 150},
    "a cap": {"causal": True, "softcap": 2.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_attention(shape, settings):
    check(in_chunks, arrays_of(SHAPES[shape]), **SETTINGS[settings])


FURTHER = {
    "sinks": ("sinks", {"causal": True}),
    "slopes": ("slopes", {"causal": True}),
    "lengths": ("kv_lengths", {"causal": True}),
    "first positions": ("offset", {"causal": True}),
    "segments": ("segments kv_segments", {"window": 60}),
    "all": ("sinks slopes kv_lengths offset segments kv_segments", {"causal": True, "window": 200}),
}


@pytest.mark.parametrize("what", FURTHER)
def test_results_and_gradients_are_those_of_attention_given(what):
    names, given = FURTHER[what]
    arrays = further(2, 4, 300, 500)
    variable = {n: arrays[n] for n in names.split() if n in ("sinks", "slopes")}
    fixed = {n: arrays[n] for n in names.split() if n not in variable}
    check(in_chunks, arrays_of((2, 4, 2, 300, 500, 16, 16)), fixed=fixed, variable=variable, relative=4e-6, **given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 300), (1, 4, 300, 300), (300, 300), (2, 4, 300, 1)])
def test_masks_are_cut_with_the_queries_and_keys(shape, causal):
    seen = np.random.default_rng(0).random(shape) < 0.6
    check(in_chunks, arrays_of((2, 4, 2, 300, 300, 16, 16)), hidden=seen, causal=causal)
    added = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    check(in_chunks, arrays_of((2, 4, 2, 300, 300, 16, 16)), added=added, causal=causal)


def test_a_mask_that_is_known_is_taken_as_it_is():
    seen = banded(300)
    check(in_chunks, arrays_of((2, 4, 2, 300, 300, 16, 16)), hidden=seen, visible=visible.in_bits(seen))


def test_a_module_of_pytorch_and_a_function_of_jax_are_computed_in_chunks_where_they_are_long():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def written_out(q, k, v):
        scores = jnp.where(jnp.tri(q.shape[2], dtype=bool), q @ jnp.swapaxes(k, -1, -2) / 4, -jnp.inf)
        return jax.nn.softmax(scores, -1) @ v

    config = kpx.Config(kernels={"kpx.attention": "in_chunks"}) if onednn.available() else None
    for length, chosen in ((1024, True), (128, config is not None)):
        arrays = [np.random.default_rng(i).standard_normal((1, 8, length, 16)).astype(np.float32) for i in range(3)]
        tensors = [*map(torch.from_numpy, arrays)]
        for compiled, given in (
            (kpx.compile(Attention().eval(), *tensors, config=config), tensors),
            (kpx.compile(written_out, *arrays, config=config), arrays),
        ):
            assert ("in_chunks" in compiled.kernels.get("kpx.attention", "").split(";")[0]) == chosen
            np.testing.assert_allclose(compiled(*given), jax.jit(written_out)(*arrays), rtol=2e-4, atol=2e-5)


def test_temporary_memory_is_a_fraction_of_the_scores():
    spec = jax.ShapeDtypeStruct((1, 8, 4096, 64), jnp.float32)

    def step(q, k, v):
        return jax.grad(lambda *a: jnp.sum(kpx.ops.attention(*a, causal=True) ** 2), (0, 1, 2))(q, k, v)

    scores = 4 * 8 * 4096 * 4096
    assert kpx.compile(step, spec, spec, spec).memory.temp_bytes < scores / 2
