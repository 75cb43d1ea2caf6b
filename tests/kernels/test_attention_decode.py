"""A decoding step's attention: over a cache that is whole or in pages, interpreted against f64, and compiled for GPUs and TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels.attention import attention_kernel
from kpx.kernels.attention_decode import paged
from kpx.kernels.paged_attention import paged_attention, paged_attention_kernel
from tests.kernels.attention_reference import further
from tests.reference import assert_closer

pytest.importorskip("triton")

TRITON_CALL = "__gpu$xla.gpu.triton"


def _decode(platform):
    return next(i.function for i in attention_kernel.implementations if i.name == f"decode_{platform}")


def _check(function, reference, arrays, relative=2e-6):
    """`arrays`: those of floats are f64 in the reference."""
    ours, theirs = (jax.jit(f)(*arrays) for f in (function, reference))
    with jax.enable_x64(True):
        wide = (a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays)
        assert_closer(ours, theirs, jax.jit(reference)(*wide), relative=relative)
    return ours


def _step(what, platform="cuda", shape=(3, 6, 2, 1, 700, 40, 40), mask=None, **given):
    batch, heads, kv_heads, length, kv_length, size, value_size = shape
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(s).astype(np.float32)
        for s in (
            (batch, heads, length, size),
            (batch, kv_heads, kv_length, size),
            (batch, kv_heads, kv_length, value_size),
        )
    ]
    others = further(batch, heads, length, kv_length) | {"mask": mask}
    arrays += [others[name] for name in what.split()]
    given = {"scale": size**-0.5, "causal": False, "given": what} | given
    functions = (functools.partial(f, **given) for f in (_decode(platform), attention_kernel.decomposition))
    return _check(*functions, arrays)


STEPS = {
    "lengths": ("kv_lengths", {}),
    "first positions": ("offset", {"causal": True}),
    "first positions and a window": ("offset", {"causal": True, "window": 50}),
    "sinks": ("kv_lengths sinks", {}),
    "slopes": ("kv_lengths offset slopes", {"causal": True}),
    "a cap": ("kv_lengths", {"softcap": 2.0}),
}


@pytest.mark.parametrize("platform", ["cuda", pytest.param("rocm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", STEPS)
def test_a_step_over_a_cache_is_attention_with(what, platform):
    names, given = STEPS[what]
    _step(names, platform, **given)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 256, 16, 16), (2, 8, 8, 3, 300, 64, 32), (1, 12, 3, 7, 1030, 128, 128)])
def test_a_step_of_several_queries_is_attention(shape):
    _step("kv_lengths offset", shape=shape, causal=True)


@pytest.mark.parametrize("low", [-np.inf, -1e9])
@pytest.mark.parametrize("shape", [(3, 1, 1, 700), (3, 6, 1, 700), (1, 1, 1, 700)])
def test_a_step_whose_keys_are_hidden_is_attention(shape, low):
    seen = np.random.default_rng(0).random(shape) < 0.5
    seen[..., 400:] = False
    if shape[0] == 3:
        seen[1] = False
    out = _step("mask", mask=seen, low=low)
    assert shape[0] == 1 or low > -np.inf or not np.any(out[1])


@pytest.mark.parametrize("low", [-1e30, -np.inf])
def test_a_step_with_numbers_added_is_attention(low):
    rng = np.random.default_rng(0)
    added = np.where(rng.random((3, 1, 1, 700)) < 0.5, rng.standard_normal((3, 1, 1, 700)), low).astype(np.float32)
    added[..., 500:] = low
    _step("mask", mask=added)


def test_a_step_of_no_keys_is_zero():
    arrays = [np.ones(s, np.float32) for s in ((2, 2, 1, 16), (2, 2, 256, 16), (2, 2, 256, 16))]
    out = _decode("cuda")(*arrays, np.array([0, 256], np.int32), scale=1.0, causal=False, given="kv_lengths")
    assert not np.any(out[0])
    np.testing.assert_allclose(out[1], 1, rtol=1e-6)


def test_a_step_has_the_gradients_of_attention():
    arrays = [
        np.random.default_rng(i).standard_normal((2, 2, n, 16)).astype(np.float32) for i, n in enumerate((1, 256, 256))
    ]
    lengths = np.array([3, 200], np.int32)
    given = {"scale": 0.25, "causal": False, "given": "kv_lengths"}

    def gradients(function):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a, lengths, **given))), (0, 1, 2))(*arrays)

    ours, theirs = gradients(_decode("cuda")), gradients(attention_kernel.decomposition)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def _pages(batch=3, heads=6, kv_heads=2, size=32, page=16, pages=40, each=17, value_size=None):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((batch, heads, size)).astype(np.float32)
    key_pages = rng.standard_normal((kv_heads, pages, page, size)).astype(np.float32)
    value_pages = rng.standard_normal((kv_heads, pages, page, value_size or size)).astype(np.float32)
    lengths = rng.integers(1, each * page + 1, batch).astype(np.int32)
    table = np.stack([rng.permutation(pages)[:each] for _ in range(batch)]).astype(np.int32)
    return [query, key_pages, value_pages, lengths, table]


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize(
    "given", [{}, {"page": 128, "each": 3, "pages": 9}, {"value_size": 16, "kv_heads": 6}], ids=str
)
def test_keys_in_pages_are_read_where_they_are(given, platform):
    kernel = functools.partial(paged, platform=platform, scale=0.2)
    _check(kernel, functools.partial(paged_attention_kernel.decomposition, scale=0.2), _pages(**given))


def test_pages_behind_a_sequences_length_are_not_read():
    arrays = _pages()
    arrays[3][:] = 20  # of the first two pages
    arrays[1][:, arrays[4][0, 2]] = np.nan
    assert np.isfinite(
        paged(*(a[:1] if i in (0, 3, 4) else a for i, a in enumerate(arrays)), platform="cuda", scale=1.0)
    ).all()


def test_paged_attention_is_attention_over_the_pages_in_order():
    query, key_pages, value_pages, lengths, table = _pages()
    lengths[1] = 0
    out = paged_attention(query, key_pages, value_pages, lengths, table, softcap=2.0)
    assert not np.any(out[1])
    for i in (0, 2):
        key, value = (a[:, table[i]].reshape(2, -1, 32)[:, : lengths[i]] for a in (key_pages, value_pages))
        wanted = kpx.ops.attention(query[i][:, None], key, value, softcap=2.0)[:, 0]
        np.testing.assert_allclose(out[i], wanted, rtol=1e-5, atol=1e-6)


def test_paged_attention_can_be_batched_and_differentiated():
    query, *rest = _pages()

    def loss(q):
        return jnp.sum(paged_attention(q, *rest) ** 2)

    assert jax.grad(loss)(query).shape == query.shape
    assert jax.vmap(lambda q: paged_attention(q, *rest))(np.stack([query, query])).shape == (2, *query.shape)


REFUSED = {
    "They are `.batch, heads, size.`": lambda q, k, v, n, t: paged_attention(q[0], k, v, n, t),
    "their heads divide the queries'": lambda q, k, v, n, t: paged_attention(q[:, :5], k, v, n, t),
    "They are `.batch.` and": lambda q, k, v, n, t: paged_attention(q, k, v, n[:2], t),
    "softcap=-1. It is more than 0": lambda q, k, v, n, t: paged_attention(q, k, v, n, t, softcap=-1),
    "Lengths and pages are integers": lambda q, k, v, n, t: paged_attention(q, k, v, n.astype(float), t),
}


@pytest.mark.parametrize("says", REFUSED)
def test_pages_that_do_not_go_together_are_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        REFUSED[says](*_pages())


TARGETS = [
    pytest.param("cuda:a100", marks=pytest.mark.slow),
    "cuda:h100",
    pytest.param("cuda:b200", marks=pytest.mark.slow),
    "rocm:mi300x",
]


def _struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_compiles_and_its_kernel_is_chosen(target):
    def step(q, k, v, lengths):
        return kpx.ops.attention(q, k, v, kv_lengths=lengths)

    q, k = _struct(8, 32, 1, 128), _struct(8, 8, 4096, 128)
    compiled = kpx.compile(step, q, k, k, _struct(8, dtype=jnp.int32), target=target)
    assert compiled.kernels["kpx.attention"].startswith("decode_")
    assert TRITON_CALL in compiled.hlo


@pytest.mark.parametrize(
    "target", [*TARGETS, "tpu-v5e", *(pytest.param(t, marks=pytest.mark.slow) for t in ("tpu-v6e", "tpu-v5p"))]
)
def test_paged_attention_compiles_and_gathers_no_pages(target):
    q, pages = _struct(8, 32, 128), _struct(8, 512, 16, 128)
    spec = [q, pages, pages, _struct(8, dtype=jnp.int32), _struct(8, 64, dtype=jnp.int32)]
    compiled = kpx.compile(lambda *a: kpx.ops.paged_attention(*a), *spec, target=target)
    assert compiled.kernels["kpx.paged_attention"].startswith("paged_")
    assert compiled.memory.temp_bytes < 8 * 8 * 64 * 16 * 128 * 2 / 4  # a quarter of the keys that are in use


def test_a_step_that_sees_every_key_is_left_to_xla_with_the_reason():
    q, k = _struct(2, 8, 1, 64), _struct(2, 8, 1024, 64)
    compiled = kpx.compile(lambda q, k: kpx.ops.attention(q, k, k), q, k, target="cuda:h100")
    assert "every key is seen, and plain products read each once too" in compiled.kernels["kpx.attention"]
