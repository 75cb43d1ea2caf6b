"""Attention's forward and backward pass, found together in what JAX or PyTorch has differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels.attention import attention_kernel
from kpx.kernels.attention_tpu import interpreted
from kpx.passes import fusion
from tests.kernels.test_attention_fusion import (
    HEADS_FIRST,
    HEADS_THIRD,
    KERNELS,
    KNOWN_MASKS,
    LENGTH,
    _mask_added,
    _scaled_after,
    _scaled_before_and_hidden,
    on_each_target,
)
from tests.reference import assert_closer

WRITTEN = {
    "scaled after": (_scaled_after, HEADS_FIRST),
    "scaled before, hidden by where, heads third": (_scaled_before_and_hidden, HEADS_THIRD),
    "a mask added": (_mask_added, HEADS_FIRST),
    "JAX's own": (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), HEADS_THIRD),
}


WRITTEN |= KNOWN_MASKS


def _gradients(function):
    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(jnp.sin(out)), out

    def both(*arrays):
        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return [out, *gradients]

    return both


@pytest.mark.parametrize(("written", "target"), on_each_target(WRITTEN))
def test_attention_and_its_gradient_become_kernels_and_never_hold_the_scores(written, target):
    function, spec = WRITTEN[written]
    compiled = kpx.compile(_gradients(function), spec, spec, spec, target=target)
    assert compiled.fusions == {"kpx.attention and its gradient": 1}
    custom_call = f'custom_call_target="{KERNELS[target][1]}"'
    assert compiled.hlo.count(custom_call) == 3  # forward; queries; keys and values
    assert f"{LENGTH},{LENGTH}" not in compiled.hlo


@pytest.mark.parametrize("target", KERNELS)
def test_kernels_count_as_the_products_that_they_replaced(target):
    batch, heads, length, size = HEADS_FIRST.shape
    product = 2 * batch * heads * length * length * size
    forward = kpx.compile(_scaled_after, HEADS_FIRST, HEADS_FIRST, HEADS_FIRST, target=target)
    assert forward.cost.product_flops == 2 * product
    both = kpx.compile(_gradients(_scaled_after), HEADS_FIRST, HEADS_FIRST, HEADS_FIRST, target=target)
    assert both.cost.product_flops == pytest.approx(6 * product, rel=0.01)


@pytest.mark.parametrize("target", ["cuda:h100", "tpu-v5e"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_it_is_found_between_projections(target, kv_heads):
    def layer(x, w):
        q, k, v = ((x @ w[n]).reshape(2, LENGTH, -1, 64) for n in "qkv")
        return x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(2, LENGTH, -1) @ w["o"]

    sizes = {"q": 512, "k": 64 * kv_heads, "v": 64 * kv_heads, "o": 512}
    w = {n: jax.ShapeDtypeStruct((512, size), jnp.bfloat16) for n, size in sizes.items()}
    x = jax.ShapeDtypeStruct((2, LENGTH, 512), jnp.bfloat16)
    compiled = kpx.compile(jax.grad(lambda x, w: jnp.sum(layer(x, w) ** 2), (0, 1)), x, w, target=target)
    assert compiled.fusions == {"kpx.attention and its gradient": 1}


def _biased(q, k, v, bias):
    scores = (jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.1 + bias).astype(jnp.float32)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1).astype(v.dtype), v)


@pytest.mark.parametrize("function", [_biased, lambda q, k, v, b: kpx.ops.attention(q, k, v, mask=b)])
@pytest.mark.parametrize(("batch", "fused"), [(1, True), (2, False)])
def test_a_gradient_by_a_bias_is_the_kernels_where_it_is_smaller_than_the_scores(function, batch, fused):
    def step(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3))(*arrays)

    bias = jax.ShapeDtypeStruct((batch, 4, LENGTH, LENGTH), jnp.bfloat16)
    compiled = kpx.compile(step, HEADS_FIRST, HEADS_FIRST, HEADS_FIRST, bias, target="cuda:h100")
    assert compiled.fusions == ({"kpx.attention and its gradient": 1} if fused else {})


def test_a_gradient_by_values_alone_is_left_to_xla():
    def by_values(q, k, v):
        return jax.grad(lambda v: jnp.sum(_scaled_after(q, k, v) ** 2))(v)

    compiled = kpx.compile(by_values, HEADS_FIRST, HEADS_FIRST, HEADS_FIRST, target="tpu-v5e")
    assert "kpx.attention and its gradient" not in compiled.fusions


def test_a_gradient_that_the_kernel_does_not_support_is_left_to_xla():
    spec = jax.ShapeDtypeStruct((2, 4, 100, 64), jnp.bfloat16)
    compiled = kpx.compile(_gradients(_scaled_after), spec, spec, spec, target="tpu-v5e")
    assert "kpx.attention and its gradient" not in compiled.fusions


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_kernel_that_raises_is_left_out_with_a_warning(differentiated, without_libraries):
    def broken(query, key, value, *, scale, causal):
        raise RuntimeError("no such instruction")

    attention_kernel.on("cpu")(broken)
    fusion.is_of_use.cache_clear()
    try:
        q, k, v = (np.random.default_rng(i).standard_normal((2, 2, 128, 64)).astype(np.float32) for i in range(3))
        function = _gradients(_scaled_after) if differentiated else _scaled_after
        with pytest.warns(kpx.RewriteWarning, match="no such instruction"):
            compiled = kpx.compile(function, q, k, v)
        for ours, theirs in zip(jax.tree.leaves(compiled(q, k, v)), jax.tree.leaves(function(q, k, v)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    finally:
        attention_kernel.implementations.pop()
        fusion.is_of_use.cache_clear()


@pytest.fixture
def without_libraries(monkeypatch):
    """No library's attention on the CPU, which would be preferred."""
    kept = [i for i in attention_kernel.implementations if i.name != "onednn"]
    monkeypatch.setattr(attention_kernel, "implementations", kept)


@pytest.fixture
def on_the_cpu(without_libraries):
    """The TPU's kernel for the CPU, interpreted, so that what is spliced can be run."""
    attention_kernel.on("cpu")(interpreted)
    fusion.is_of_use.cache_clear()
    yield
    attention_kernel.implementations.pop()
    fusion.is_of_use.cache_clear()


@pytest.mark.parametrize("written", WRITTEN)
def test_results_and_gradients_are_no_farther_from_an_f64_reference_than_xlas(written, on_the_cpu):
    function, spec = WRITTEN[written]
    heads_third = spec is HEADS_THIRD
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((2, 128, 3, 64) if heads_third else (2, 3, 128, 64)).astype(np.float32) for _ in "qkv"
    ]
    compiled = kpx.compile(_gradients(function), *arrays)
    assert compiled.fusions == {"kpx.attention and its gradient": 1}
    plain = jax.jit(_gradients(function))(*arrays)
    with jax.enable_x64(True):
        exact = _gradients(function)(*(a.astype(np.float64) for a in arrays))
    for ours, theirs, reference in zip(compiled(*arrays), plain, exact, strict=True):
        assert_closer(ours, theirs, reference, relative=2e-6)
