"""Products of groups of rows: against a loop over groups in f64, interpreted, and compiled for what is not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import grouped_matmul_gpu as gpu
from kpx.kernels.grouped_matmul import rows_kernel, sums_kernel
from kpx.kernels.grouped_matmul_tpu import megablox
from tests.reference import assert_closer

# Rows, groups, inner and outer size: one row a block and many, more groups than rows, one group.
SIZES = [(18, 4, 16, 8), (3, 8, 16, 8), (300, 3, 40, 24), (513, 1, 4, 4), (64, 64, 5, 3), (200, 5, 130, 70)]


def _case(rows, groups, inner, outer, seed):
    """Rows, matrices, cotangents and groups' sizes, some of them empty, and some rows of no group."""
    rng = np.random.default_rng(seed)
    sizes = np.diff(np.sort(rng.integers(0, rows + 1, groups)), prepend=0).astype(np.int32)
    arrays = (rng.standard_normal(s) for s in ((rows, inner), (groups, inner, outer), (rows, outer)))
    return *arrays, sizes


def _ranges(sizes):
    return [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]


def _rows(x, weight, sizes):
    wanted = np.zeros((len(x), weight.shape[2]))
    for matrix, of in zip(weight, _ranges(sizes), strict=True):
        wanted[of] = x[of] @ matrix
    return wanted


def _sums(x, y, sizes):
    return np.stack([x[of].T @ y[of] for of in _ranges(sizes)])


def _both(product, sizes):
    def run(x, weight, cotangent):
        out, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, weight)
        return out, *pull(cotangent)

    return run


def _exact(x, weight, cotangent, sizes):
    return _rows(x, weight, sizes), _rows(cotangent, weight.swapaxes(1, 2), sizes), _sums(x, cotangent, sizes)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_is_multiplied_with_its_groups_matrix(sizes, seed, dtype):
    *arrays, groups = _case(*sizes, seed)
    arrays = [a.astype(dtype) for a in arrays]
    ours = kpx.jit(_both(kpx.ops.grouped_matmul, groups))(*arrays)
    plain = jax.jit(_both(jax.lax.ragged_dot, groups))(*arrays)
    exact = _exact(*(a.astype(np.float64) for a in arrays), groups)
    for made, other, wanted in zip(ours, plain, exact, strict=True):
        assert made.dtype == dtype
        assert_closer(made, other, wanted, relative=1e-6 if dtype == np.float32 else 4e-3)


@pytest.mark.slow
def test_it_differentiates_twice_forward_and_reverse_and_batches():
    x, weight, cotangent, sizes = _case(18, 4, 6, 5, 0)
    product = functools.partial(kpx.ops.grouped_matmul, group_sizes=sizes)

    def looped(x, weight):
        group = np.repeat(np.arange(5), [*sizes, 18 - sizes.sum()])
        chosen = jnp.concatenate([weight, jnp.zeros((1, 6, 5))])[group]
        return jnp.einsum("mk,mkn->mn", x, chosen)

    def derivatives(product):
        def penalty(x, weight):
            by_x, by_weight = jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w)) * cotangent), (0, 1))(x, weight)
            return jnp.sum(by_x**2) + jnp.sum(jnp.cos(by_weight))

        along = jax.jvp(product, (x, weight), (jnp.cos(x), jnp.sin(weight)))[1]
        batch = jax.vmap(lambda s: product(x * s, weight))(jnp.arange(3.0))
        return [*jax.grad(penalty, (0, 1))(x, weight), along, batch]

    with jax.enable_x64(True):
        for ours, wanted in zip(derivatives(product), derivatives(looped), strict=True):
            np.testing.assert_allclose(ours, wanted, atol=1e-10)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_gpus_kernels_interpreted_are_the_products(sizes, dtype, seed):
    pytest.importorskip("triton")
    x, weight, cotangent, groups = _case(*sizes, seed)
    x, weight, cotangent = (a.astype(dtype) for a in (x, weight, cotangent))
    found = (
        gpu.grouped_triton(x, weight, groups, transposed=False),
        gpu.grouped_triton(cotangent, weight, groups, transposed=True),
        gpu.grouped_sums_triton(x, cotangent, groups),
    )
    exact = _exact(*(a.astype(np.float64) for a in (x, weight, cotangent)), groups)
    for made, wanted in zip(found, exact, strict=True):
        assert_closer(made, wanted.astype(dtype), wanted, relative=2e-6 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_the_tpus_kernel_interpreted_is_the_sums(seed):
    x, _, y, sizes = _case(256, 4, 128, 256, seed)
    x, y = x.astype(np.float32), y.astype(np.float32)
    exact = _sums(x.astype(np.float64), y.astype(np.float64), sizes)
    assert_closer(megablox(x, y, sizes, interpret=True), exact.astype(np.float32), exact, relative=2e-6)


ROWS, INNER, OUTER, GROUPS = 4096, 512, 256, 16
SPECS = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((ROWS, INNER), (GROUPS, INNER, OUTER), (ROWS, OUTER))]
GROUP_SIZES = jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
# What takes JAX's own ragged products, forward and backward, and how many calls of kernels of kpx's there are.
TAKEN = {
    "cuda:h100": ({"kpx.grouped_matmul": "grouped_triton", "kpx.grouped_matmul_sums": "grouped_sums_triton"}, 3),
    "cuda:a100": ({"kpx.grouped_matmul": "grouped_triton", "kpx.grouped_matmul_sums": "grouped_sums_triton"}, 3),
    "rocm:mi300x": (dict.fromkeys(("kpx.grouped_matmul", "kpx.grouped_matmul_sums"), "decomposition (XLA)"), 0),
    "tpu-v5e": ({"kpx.grouped_matmul": "decomposition (XLA)", "kpx.grouped_matmul_sums": "megablox"}, 1),
    "tpu-v6e": ({"kpx.grouped_matmul": "decomposition (XLA)", "kpx.grouped_matmul_sums": "megablox"}, 1),
}


@pytest.mark.parametrize("target", TAKEN)
@pytest.mark.parametrize(
    "product",
    [jax.lax.ragged_dot, pytest.param(kpx.ops.grouped_matmul, marks=pytest.mark.slow)],
    ids=["JAX's", "kpx's"],
)
def test_each_row_is_multiplied_once_on_every_accelerator(product, target):
    def step(x, weight, cotangent, sizes):
        return _both(product, sizes)(x, weight, cotangent)

    compiled = kpx.compile(step, *SPECS, GROUP_SIZES, target=target)
    kernels, calls = TAKEN[target]
    assert compiled.kernels == kernels
    assert compiled.fusions == {"kpx.grouped_matmul": 2, "kpx.grouped_matmul_sums": 1}
    assert compiled.hlo.count("kpx_product_flops") == calls
    assert compiled.cost.product_flops == 3 * 2 * ROWS * INNER * OUTER
    assert compiled.memory.temp_bytes < 2 * 2 * ROWS * (INNER + OUTER)


LEFT_ALONE = {
    "another result": lambda x, w, c, s: jax.lax.ragged_dot(x, w, s, preferred_element_type=jnp.float32),
    "a batch": lambda x, w, c, s: jax.vmap(jax.lax.ragged_dot)(x[None], w[None], s[None]),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_other_ragged_products_are_left_to_xla(what):
    compiled = kpx.compile(LEFT_ALONE[what], *SPECS, GROUP_SIZES, target="cuda:h100")
    assert (compiled.fusions, compiled.kernels) == ({}, {})


def test_what_a_kernel_does_not_take_is_told():
    x, y = (jax.ShapeDtypeStruct((100, n), jnp.float32) for n in (64, 32))
    compiled = kpx.compile(lambda x, y, s: sums_kernel(x, y, s), x, y, GROUP_SIZES, target="tpu-v5e")
    told = compiled.kernels["kpx.grouped_matmul_sums"]
    assert told == "decomposition (XLA); megablox: sizes must be multiples of 128, and are [100, 64, 32]"


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)], ids=["no rows", "no groups"])
def test_nothing_gives_nothing(shape):
    rows, groups = shape
    x, w, sizes = np.ones((rows, 4), np.float32), np.ones((groups, 4, 2), np.float32), np.zeros(groups, np.int32)
    for made in kpx.jit(_both(kpx.ops.grouped_matmul, sizes))(x, w, np.ones((rows, 2), np.float32)):
        assert not np.any(made)
    assert rows_kernel(x, w, sizes, transposed=False).shape == (rows, 2)


REFUSED = {
    r"rows \(8, 4\), matrices \(2, 3, 5\)": ((8, 4), (2, 3, 5), np.zeros(2, np.int32), np.float32),
    r"group sizes \(3,\)": ((8, 4), (2, 4, 5), np.zeros(3, np.int32), np.float32),
    "given float32 and float16": ((8, 4), (2, 4, 5), np.zeros(2, np.int32), np.float16),
    "group sizes of float32. They are integers": ((8, 4), (2, 4, 5), np.zeros(2, np.float32), np.float32),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    x, weight, sizes, dtype = REFUSED[says]
    with pytest.raises(kpx.InputError, match=says):
        kpx.ops.grouped_matmul(np.ones(x, np.float32), np.ones(weight, dtype), sizes)
