"""Kernels: values and gradients against an f64 reference, composites, and the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import activation, attention, norm, registry
from tests.reference import assert_closer


def _array(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def _plain_layer_norm(x, w, b):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * w + b


def _plain_rms_norm(x, w):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def _plain_gelu(x):
    return x * 0.5 * (1 + jax.lax.erf(x / np.asarray(np.sqrt(2), x.dtype)))


def _plain_attention(q, k, v):
    k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


CASES = {
    "layer_norm": (norm.layer_norm, _plain_layer_norm, [(4, 64), (64,), (64,)]),
    "rms_norm": (norm.rms_norm, _plain_rms_norm, [(4, 64), (64,)]),
    "gelu": (activation.gelu, _plain_gelu, [(4, 64)]),
    "attention": (functools.partial(attention.attention, causal=True), _plain_attention,
                  [(2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_no_farther_from_f64_than_plain_jax(name, dtype):
    kernel, plain, shapes = CASES[name]
    arrays = [_array(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]
    weight = _array(*shapes[0], seed=9, dtype=dtype)

    def run(fn, arrays, weight):
        def loss(*a):
            return (fn(*a) * weight).sum()

        return [fn(*arrays), *jax.grad(loss, tuple(range(len(arrays))))(*arrays)]

    ours = run(kpx.jit(kernel) if dtype == jnp.float32 else kernel, arrays, weight)
    theirs = run(plain, arrays, weight)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in arrays]
        reference = run(plain, [jnp.asarray(a) for a in wide], jnp.asarray(np.asarray(weight, np.float64)))
    for o, t, r in zip(ours, theirs, reference, strict=True):
        assert o.dtype == dtype
        assert_closer(o, t, r, relative=1e-6)


def test_a_kernel_is_one_composite_in_the_module_and_its_choice_is_told():
    q = _array(1, 2, 4, 8)
    fn = functools.partial(attention.attention, causal=True)
    text = jax.jit(fn).lower(q, q, q).as_text()
    assert text.count('stablehlo.composite "kpx.attention"') == 1
    told = kpx.compile(fn, q, q, q).kernels["kpx.attention"]
    assert told.startswith("decomposition (XLA); ")
    assert "in_chunks: from 256 queries and 3 MiB of scores on" in told


def test_a_row_that_sees_nothing_is_zero_and_its_gradient_is_finite():
    q = _array(1, 1, 2, 4)
    mask = jnp.array([[False, False], [True, False]])

    def run(q):
        return attention.attention(q, q, q, mask=mask)

    assert (run(q)[0, 0, 0] == 0).all()
    assert jnp.isfinite(jax.grad(lambda q: run(q).sum())(q)).all()


def test_kernels_batch_and_differentiate_twice():
    x = _array(3, 4, 16)
    np.testing.assert_allclose(jax.vmap(norm.layer_norm)(x), norm.layer_norm(x), rtol=1e-5, atol=1e-6)
    assert jax.hessian(lambda x: norm.rms_norm(x).sum())(x[0, 0]).shape == (16, 16)


def test_an_implementation_for_the_target_takes_the_composites_place(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))

    @registry.kernel("kpx.test_double", version=1)
    def double(x, *, times):
        return x * times

    @double.on("cpu", supports=lambda x, times: None if x.shape[0] % 2 == 0 else "odd length")
    def by_addition(x, *, times):
        return x + x

    even = kpx.compile(lambda x: double(x, times=2), jnp.ones(4))
    odd = kpx.compile(lambda x: double(x, times=2), jnp.ones(3))
    assert even.kernels == {"kpx.test_double": "by_addition"}
    assert "add" in even.stablehlo
    assert odd.kernels == {"kpx.test_double": "decomposition (XLA); by_addition: odd length"}
    np.testing.assert_array_equal(even(jnp.ones(4)), 2 * np.ones(4))
    np.testing.assert_array_equal(odd(jnp.ones(3)), 2 * np.ones(3))


def test_a_name_that_is_taken_or_malformed_is_refused():
    with pytest.raises(kpx.KpxError, match=r"`kpx\.gelu` is registered already"):
        registry.kernel("kpx.gelu", version=1)(lambda x: x)
    with pytest.raises(kpx.KpxError, match="not a kernel's name"):
        registry.kernel("gelu", version=1)(lambda x: x)


def test_somebody_elses_composite_is_left_to_xla():
    def fn(x):
        return jax.lax.composite(lambda x: x + 1, "other.op", version=1)(x)

    compiled = kpx.compile(fn, jnp.ones(3))
    assert compiled.kernels == {}
    np.testing.assert_array_equal(compiled(jnp.ones(3)), 2 * np.ones(3))
