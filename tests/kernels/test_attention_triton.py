"""The GPUs' attention in Triton, interpreted: results and gradients against f64, and compiled for GPUs that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import visible
from kpx.kernels.attention import attention, attention_kernel
from kpx.kernels.attention_gpu import flash
from kpx.kernels.registry import implemented_for
from tests.kernels.attention_reference import arrays_of, banded, both, check, further

pytest.importorskip("triton")

# Batch, heads, heads of keys, length, keys, sizes of keys and of values.
SHAPES = {
    "blocks that divide": (1, 2, 2, 128, 128, 32, 32),
    "blocks that do not": (2, 2, 2, 150, 150, 40, 40),
    "grouped heads": (2, 4, 2, 70, 70, 16, 16),
    "one key head": (1, 3, 1, 64, 64, 64, 64),
    "values of another size": (1, 2, 2, 65, 65, 48, 16),
    "more keys than queries": (1, 2, 1, 33, 260, 64, 64),
    "more queries than keys": (1, 2, 2, 200, 60, 32, 32),
    "one query": (2, 4, 2, 1, 260, 64, 64),
    "one key": (1, 2, 2, 40, 1, 32, 32),
    "large heads": (1, 1, 1, 32, 48, 256, 256),
}


def _check(shape, dtype=np.float32, *, platform="cuda", **given):
    return check(functools.partial(flash, platform=platform), arrays_of(shape, dtype, given.pop("seed", 0)), **given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_results_and_gradients_are_those_of_attention(shape, causal):
    _check(SHAPES[shape], causal=causal)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_results_and_gradients_in_f16_are_those_of_attention(platform):
    _check((1, 4, 2, 130, 130, 64, 64), np.float16, causal=True, platform=platform, relative=2e-3)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_results_and_gradients_at_random_shapes_are_those_of_attention(seed):
    rng = np.random.default_rng(100 + seed)
    kv_heads, group, batch = (int(n) for n in rng.integers(1, 4, 3))
    length, kv_length = (int(n) for n in rng.integers(1, 180, 2))
    size, value_size = (int(n) for n in rng.integers(1, 70, 2))
    shape = batch, kv_heads * group, kv_heads, length, kv_length, size, value_size
    window = {"window": int(rng.integers(1, 200))} if rng.integers(2) else {}
    _check(shape, causal=bool(rng.integers(2)), platform="rocm", relative=4e-6, seed=seed, **window)


SETTINGS = {
    "a causal window": {"causal": True, "window": 20},
    "a window": {"window": 7},
    "a cap": {"causal": True, "softcap": 2.0},
    "a cap and a window": {"window": 40, "softcap": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_results_and_gradients_are_those_of_attention_with(settings):
    _check((2, 4, 2, 150, 150, 32, 32), **SETTINGS[settings])


@pytest.mark.parametrize("shape", [(2, 1, 1, 150), (1, 4, 150, 150), (150, 150), (2, 4, 150, 150)])
def test_keys_that_bools_hide_have_no_weight(shape):
    seen = np.random.default_rng(0).random(shape) < 0.6
    _check((2, 4, 2, 150, 150, 32, 32), hidden=seen, causal=len(shape) == 2)


@pytest.mark.parametrize("shape", [(1, 4, 70, 70), (70, 70), (2, 4, 70, 70)])
def test_what_bools_hide_may_have_a_score_of_its_own(shape):
    seen = np.random.default_rng(0).random(shape) < 0.6
    seen[..., 3, :] = False  # all alike, where nothing is seen
    _check((2, 4, 2, 70, 70, 32, 32), hidden=seen, low=-1e9)


@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (1, 4, 70, 70), (70, 70), (2, 4, 70, 70)])
def test_numbers_that_are_added_have_gradients_too(shape):
    added = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _check((2, 4, 2, 70, 70, 32, 32), added=added, causal=len(shape) == 2, softcap=3.0, relative=4e-6)


FURTHER = {
    "sinks": ("sinks", {"causal": True}),
    "slopes": ("slopes", {"causal": True}),
    "slopes, looking ahead": ("slopes", {}),
    "lengths": ("kv_lengths", {}),
    "first positions": ("offset", {"causal": True}),
    "first positions and a window": ("offset", {"causal": True, "window": 9}),
    "first positions and a window that looks ahead": ("offset", {"window": 9}),
    "lengths and first positions": ("kv_lengths offset", {"causal": True}),
    "segments": ("segments kv_segments", {}),
    "segments, causal": ("segments kv_segments", {"causal": True}),
    "all": ("sinks slopes kv_lengths offset segments kv_segments", {"causal": True, "softcap": 3.0}),
}


@pytest.mark.parametrize("platform", ["cuda", pytest.param("rocm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", FURTHER)
def test_results_and_gradients_are_those_of_attention_given(what, platform):
    names, given = FURTHER[what]
    arrays = further(3, 4, 90, 150)
    variable = {n: arrays[n] for n in names.split() if n in ("sinks", "slopes")}
    fixed = {n: arrays[n] for n in names.split() if n not in variable}
    _check((3, 4, 2, 90, 150, 32, 32), platform=platform, fixed=fixed, variable=variable, relative=4e-6, **given)


@pytest.mark.parametrize("given", [{}, {"causal": True}, {"softcap": 2.0, "window": 60}], ids=str)
@pytest.mark.parametrize("lengths", [(300, 300), (130, 270)])
def test_blocks_that_a_known_mask_hides_are_skipped_and_nothing_else(lengths, given):
    seen = banded(*lengths)
    _check((2, 4, 2, *lengths, 32, 32), hidden=seen, visible=visible.in_bits(seen), **given)


def test_blocks_that_a_known_mask_shows_may_end_where_a_sequence_does():
    seen = banded(300)
    arrays = further(2, 4, 300, 300)
    fixed = {"mask": seen, "kv_lengths": arrays["kv_lengths"]}
    _check((2, 4, 2, 300, 300, 16, 16), fixed=fixed, visible=visible.in_bits(seen))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_random_masks_are_skipped_and_nothing_else(seed):
    coarse = np.random.default_rng(seed).random((7, 8)) < 0.3
    seen = np.kron(coarse, np.ones((32, 20), bool))
    seen[5] = False
    _check((1, 2, 1, *seen.shape, 16, 16), hidden=seen, visible=visible.in_bits(seen), platform="rocm")


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    seen = np.ones((1, 1, 40, 40), bool)
    seen[..., 5, :] = False
    out, by_query, _, _ = _check((1, 2, 2, 40, 40, 16, 16), hidden=seen)
    assert not np.any(out[:, :, 5])
    assert not np.any(by_query[:, :, 5])


def test_minus_infinity_that_is_added_hides():
    added = np.where(np.random.default_rng(0).random((1, 1, 40, 40)) < 0.5, -np.inf, 0).astype(np.float32)
    added[..., 7, :] = -np.inf
    *arrays, _ = arrays_of((1, 2, 2, 40, 40, 16, 16), np.float32)
    ours, theirs = (f(*arrays, added, scale=1.0, causal=False) for f in
                    (functools.partial(flash, platform="cuda"), attention_kernel.decomposition))  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not np.any(ours[:, :, 7])


def test_large_scores_do_not_overflow():
    arrays = [100 * a for a in arrays_of((1, 1, 1, 40, 40, 32, 32), np.float32)]
    out = flash(*arrays[:3], scale=1.0, causal=True, platform="cuda")
    assert np.isfinite(out).all()


def test_the_interpreter_refuses_bf16():
    arrays = [jnp.ones((1, 2, 16, 16), jnp.bfloat16)] * 3
    with pytest.raises(Exception, match=r"was given bf16, which Triton's interpreter does not know\. Use f16"):
        flash(*arrays, scale=1.0, causal=False, platform="cuda")


@pytest.mark.parametrize("target", ["cuda:a100", "cuda:h200", "cuda:b200", "rocm:mi300x"])
@pytest.mark.parametrize(("size", "dtype"), [(40, jnp.bfloat16), (128, jnp.bfloat16), (256, jnp.float32)])
def test_forward_and_backward_compile_for(target, size, dtype):
    spec = jax.ShapeDtypeStruct((2, 8, 1000, size), dtype)
    grouped = jax.ShapeDtypeStruct((2, 2, 1000, size), dtype)
    platform = kpx.Target(target).platform

    def results(q, k, v):
        return both(lambda *a: flash(*a, scale=0.1, causal=True, platform=platform), q, k, v, q)

    compiled = kpx.compile(results, spec, grouped, grouped, target=target)
    assert compiled.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


@pytest.mark.parametrize("target", ["cuda:h100", "rocm:mi300x"])
def test_all_that_attention_may_be_given_compiles(target):
    batch, heads, length, kv_length, size = 2, 8, 300, 520, 64
    q, k = (jax.ShapeDtypeStruct((batch, n, m, size), jnp.bfloat16) for n, m in ((heads, length), (2, kv_length)))
    by_head = jax.ShapeDtypeStruct((heads,), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, heads, length, kv_length), jnp.bfloat16)
    by_batch, at, of = (jax.ShapeDtypeStruct((batch, *s), jnp.int32) for s in ((), (length,), (kv_length,)))

    def step(q, k, v, sinks, bias, slopes, lengths, offset, segments, kv_segments):
        def total(q, k, v, sinks, bias):
            out = kpx.ops.attention(
                q, k, v, sinks=sinks, mask=bias, slopes=slopes, kv_lengths=lengths, offset=offset, segment_ids=segments,
                kv_segment_ids=kv_segments, causal=True, window=100, softcap=20.0,
            )  # fmt: skip
            return jnp.sum(jnp.sin(out))

        return jax.grad(total, (0, 1, 2, 3, 4))(q, k, v, sinks, bias)

    def hidden(q, k, v):
        seen = banded(length, kv_length)
        return both(lambda *a: flash(*a, seen, scale=0.1, causal=True, platform=platform, low=-1e9,
                                     visible=visible.in_bits(seen)), q, k, v, q)  # fmt: skip

    platform = kpx.Target(target).platform
    with implemented_for(platform):
        compiled = kpx.compile(step, q, k, k, by_head, bias, by_head, by_batch, by_batch, at, of, target=target)
    assert compiled.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 4  # the bias has its own
    assert kpx.compile(hidden, q, k, k, target=target).hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


REFUSED = {
    "heads must be of 256 at most, and are of 512 and 512": {"size": 512},
    "it takes bf16, f16 or f32 alone, not float64, float64, float64": {"dtype": jnp.float64},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_support_is_left_to_xla_with_the_reason(reason):
    given = REFUSED[reason]
    arrays = [jax.ShapeDtypeStruct((1, 2, 500, given.get("size", 64)), given.get("dtype", jnp.bfloat16))] * 3
    with jax.enable_x64(True):
        compiled = kpx.compile(attention, *arrays, target="cuda:h100")
    assert f"; flash_cuda: {reason}" in compiled.kernels["kpx.attention"]
