"""MKL's products, called from XLA, against f64; and what happens where they cannot be had."""

import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kpx
from kpx.kernels import mkl
from tests.optional import torch

needs_mkl = pytest.mark.skipif(not mkl.available(), reason=f"MKL's products cannot be called: {mkl.missing()}")
tiles = pytest.mark.skipif("bf16_tiles" not in kpx.hardware.target.Target("cpu").features, reason="the CPU has no AMX")


def _rms(given, wanted) -> float:
    given = np.asarray(given, np.float64)
    return float(np.sqrt(np.mean((given - wanted) ** 2) / np.mean(wanted**2)))


def _random_product(seed: int):
    """A dot_general over arrays whose dimensions are in any order that MKL reads in place, and maybe a transpose."""
    rng = np.random.default_rng(seed)
    batch = [int(n) for n in rng.integers(1, 5, rng.integers(0, 3))]
    m, n, k = (int(s) for s in rng.choice([2, 3, 17, 48, 129, 300], 3))
    k = max(k, -(-(1 << 20) // (2 * m * n * int(np.prod(batch)))))  # enough work to be taken

    def operand(rows, columns):
        dims = [("r", rows), ("c", columns)] if rng.integers(2) else [("c", columns), ("r", rows)]
        at = sorted(rng.integers(0, 2, len(batch)))  # batch dimensions before the matrix, or around its rows
        order = [d for d, p in zip(range(len(batch)), at, strict=True) if p == 0]
        rest = [d for d in range(len(batch)) if d not in order]
        names = [*order, dims[0][0], *rest, dims[1][0]]
        sizes = [dict(dims)[x] if isinstance(x, str) else batch[x] for x in names]
        return names, rng.standard_normal(sizes).astype(np.float32)

    (left, a), (right, b) = operand(m, k), operand(k, n)
    numbers = (((left.index("c"),), (right.index("r"),)), (
        tuple(left.index(d) for d in range(len(batch))), tuple(right.index(d) for d in range(len(batch)))))  # fmt: skip
    order = list(range(len(batch))), [len(batch)], [len(batch) + 1]
    permutation = [*order[1], *order[0], *order[2]] if rng.integers(2) else None

    def product(x, y, **options):
        z = jax.lax.dot_general(x, y, numbers, **options)
        return z if permutation is None else jnp.transpose(z, permutation)

    return product, a, b


@needs_mkl
@pytest.mark.parametrize("seed", range(60))
def test_a_product_in_any_layout_matches_f64_as_well_as_xla_does(seed):
    product, a, b = _random_product(seed)
    with jax.enable_x64(True):
        wanted = np.asarray(product(a.astype(np.float64), b.astype(np.float64)))
    compiled = kpx.compile(product, a, b)
    assert sum(n for rule, n in compiled.rewrites.items() if rule.startswith("mkl_product")) == 1
    assert _rms(compiled(a, b), wanted) < max(2 * _rms(jax.jit(product)(a, b), wanted), 2e-6)


@needs_mkl
@tiles
@pytest.mark.parametrize("seed", range(20))
def test_a_bf16_product_in_any_layout_is_summed_in_f32(seed):
    product, a, b = _random_product(seed)
    a, b = a.astype(ml_dtypes.bfloat16), b.astype(ml_dtypes.bfloat16)
    with jax.enable_x64(True):
        wanted = np.asarray(product(a.astype(np.float64), b.astype(np.float64)))
    compiled = kpx.compile(lambda x, y: product(x, y, preferred_element_type=jnp.float32), a, b)
    assert "kpx_matmul_bf16" in compiled.stablehlo
    assert _rms(compiled(a, b), wanted) < 1e-6


@needs_mkl
@pytest.mark.parametrize("seed", range(24))
def test_a_relu_with_bias_and_addend_is_done_by_the_product_and_keeps_nan(seed):
    rng = np.random.default_rng(seed)
    rows = [int(n) for n in rng.integers(1, 24, rng.integers(1, 4))]
    k, n = (int(s) for s in rng.choice([24, 130, 257], 2))
    k = max(k, -(-(1 << 20) // (2 * int(np.prod(rows)) * n)))
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((*rows, k), (k, n)))
    b, z = rng.standard_normal(n).astype(np.float32), rng.standard_normal((*rows, n)).astype(np.float32)
    with_bias, with_addend = rng.integers(2, size=2)
    x.reshape(-1)[0] = np.nan

    def block(x, w, b, z):
        y = x @ w
        y = y + b if with_bias else y
        return jnp.maximum(z + y if with_addend else y, 0)

    compiled = kpx.compile(block, x, w, b, z)
    assert compiled.rewrites.get("relu_into_product") == int(np.prod(rows) > 1)
    wanted = np.maximum(x.astype(np.float64) @ w + with_bias * b + with_addend * z, 0)
    np.testing.assert_allclose(compiled(x, w, b, z), wanted, rtol=1e-5, atol=1e-6 * k)


@needs_mkl
def test_gradients_of_a_product_match_f64():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))

    def loss(x, y):
        return jnp.sum(jnp.sin(x @ y))

    ours = kpx.jit(jax.grad(loss, argnums=(0, 1)))(a, b)
    with jax.enable_x64(True):
        wanted = jax.grad(loss, argnums=(0, 1))(a.astype(np.float64), b.astype(np.float64))
    for o, w in zip(ours, wanted, strict=True):
        assert _rms(o, np.asarray(w)) < 1e-5


@needs_mkl
def test_a_product_of_many_columns_is_cut_among_threads_without_a_gap():
    rng = np.random.default_rng(1)
    for m, n in ((7, 5003), (5003, 7), (513, 1025)):
        a, b = rng.standard_normal((m, 96)).astype(np.float32), rng.standard_normal((96, n)).astype(np.float32)
        compiled = kpx.compile(lambda x, y: x @ y, a, b)
        assert "kpx_matmul_f32" in compiled.stablehlo
        assert _rms(compiled(a, b), a.astype(np.float64) @ b) < 1e-6


@needs_mkl
def test_calls_from_many_threads_at_once_all_end_and_are_right():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((300, 300)).astype(np.float32) for _ in range(2))
    compiled = kpx.compile(lambda x, y: x @ y @ (x.T @ y.T) + y @ x, a, b)
    wanted = np.asarray(compiled(a, b))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for got in pool.map(lambda _: np.asarray(compiled(a, b)), range(200)):
            np.testing.assert_array_equal(got, wanted)


@needs_mkl
def test_torch_keeps_its_own_number_of_threads():
    # In a process of its own, where JAX computes in the caller's thread: the one whose setting a product changes.
    script = """
        import re
        import torch
        torch.set_num_threads(3)
        import kpx

        def threads():
            return re.search(r"mkl_get_max_threads\\(\\) : (\\d+)", torch.__config__.parallel_info()).group(1)

        before = threads()
        optimized = kpx.optimize(torch.nn.Linear(256, 256).eval())
        with torch.no_grad():
            optimized(torch.randn(256, 256))
        print(before, threads())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3", "3"]


@needs_mkl
@tiles
def test_high_precision_keeps_infinities_and_is_closer_than_bf16():
    linear = torch.nn.Linear(512, 512, bias=False).eval()
    x = torch.randn(128, 512)
    optimized = kpx.optimize(linear, config=kpx.Config(matmul_precision="high"))
    with torch.no_grad():
        got = optimized(x)
        assert optimized.compile_for([x], {}).rewrites["mkl_product_in_three_bf16"] == 1
        wanted = linear.double()(x.double()).numpy()
        linear.float()
        assert _rms(got.numpy(), wanted) < 2e-5
        x[3, 5] = float("inf")
        got, eager = optimized(x), linear(x)
    assert torch.equal(got.isinf(), eager.isinf())
    assert torch.equal(got[eager.isinf()], eager[eager.isinf()])


_SCRIPT = """
    import json, sys
    import numpy as np
    {imports}
    import kpx
    from kpx.kernels import mkl
    a = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    compiled = kpx.compile(lambda x: x @ x, a)
    error = float(np.abs(np.asarray(compiled(a)) - a.astype(np.float64) @ a).max())
    print(json.dumps([mkl.missing(), "kpx_matmul" in compiled.stablehlo, error]))
"""


def _elsewhere(imports: str = "import torch", **variables) -> list:
    script = textwrap.dedent(_SCRIPT).replace("{imports}", imports)
    environment = {**os.environ, **{k: str(v) for k, v in variables.items()}}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_without_torch_products_are_xlas_own():
    missing, called, error = _elsewhere(imports="")
    assert "not loaded" in missing
    assert not called
    assert error < 1e-3


@needs_mkl
def test_without_a_working_compiler_products_are_xlas_own(tmp_path):
    missing, called, error = _elsewhere(CXX="no-such-compiler", XDG_CACHE_HOME=tmp_path)
    assert "compiler" in missing
    assert not called
    assert error < 1e-3


@needs_mkl
def test_a_damaged_or_missing_library_in_the_cache_is_compiled_again(tmp_path):
    assert _elsewhere(XDG_CACHE_HOME=tmp_path)[:2] == [None, True]
    (library,) = (tmp_path / "kpx").glob("*.so")
    library.write_bytes(b"not a library")
    missing, called, error = _elsewhere(XDG_CACHE_HOME=tmp_path)
    assert (missing, called) == (None, True)
    assert error < 1e-3


@needs_mkl
def test_a_cache_folder_that_cannot_be_made_is_not_needed(tmp_path):
    (tmp_path / "file").write_text("")
    missing, called, _ = _elsewhere(XDG_CACHE_HOME=tmp_path / "file", TMPDIR=tmp_path)
    assert (missing, called) == (None, True)


@needs_mkl
def test_a_module_over_several_devices_keeps_products_that_xla_can_partition():
    script = """
        import numpy as np
        import torch
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        import kpx
        from jax.sharding import NamedSharding, PartitionSpec
        mesh = jax.make_mesh((2,), ("d",))
        by_row = NamedSharding(mesh, PartitionSpec("d"))
        a = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
        product = kpx.jit(lambda x, y: x @ y, in_shardings=(by_row, None), out_shardings=by_row)
        lowered = product.lower(a, a)
        assert "kpx_matmul" not in lowered.as_text()
        np.testing.assert_allclose(product(a, a), a.astype(np.float64) @ a, rtol=1e-4, atol=1e-3)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
