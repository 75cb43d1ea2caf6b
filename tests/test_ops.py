"""The fused operations that JAX users call: differentiated, batched, refused; and on a target that has kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import kpx

Q, K = jnp.ones((2, 4, 32, 16)), jnp.ones((2, 2, 32, 16))


def test_attention_with_its_gradient_is_a_targets_kernel():
    spec = jax.ShapeDtypeStruct((2, 4, 256, 64), jnp.bfloat16)

    def step(q, k, v):
        return jax.grad(lambda *a: jnp.sum(kpx.ops.attention(*a, causal=True).astype(jnp.float32) ** 2), (0, 1, 2))(
            q, k, v
        )

    for target in ("cuda:h100", "rocm:mi300x", "tpu-v5e"):
        assert kpx.compile(step, spec, spec, spec, target=target).fusions == {"kpx.attention and its gradient": 1}


@pytest.mark.parametrize("given", [{}, {"window": 9}, {"softcap": 3.0}, {"causal": True, "window": 5}], ids=str)
def test_attention_can_be_batched_and_differentiated_twice(given):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((3, 2, 8, 4), (3, 1, 8, 4), (3, 1, 8, 4)))

    def loss(q):
        return jnp.sum(kpx.ops.attention(q, k[0], v[0], **given) ** 2)

    with jax.enable_x64(True):
        each = jnp.stack([kpx.ops.attention(a, b, c, **given) for a, b, c in zip(q, k, v, strict=True)])
        np.testing.assert_allclose(jax.vmap(lambda *a: kpx.ops.attention(*a, **given))(q, k, v), each, rtol=1e-12)
        check_grads(loss, (q[0],), order=2, rtol=1e-4)


def test_a_window_hides_what_is_far_and_a_cap_bounds_scores():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 12, 4)).astype(np.float32) for _ in "qkv")
    scores = np.einsum("hqd,hkd->hqk", q, k) / 2
    near = np.abs(np.subtract.outer(np.arange(12), np.arange(12))) < 3
    weights = jax.nn.softmax(jnp.where(near, 1.5 * np.tanh(scores / 1.5), -np.inf), -1)
    np.testing.assert_allclose(kpx.ops.attention(q, k, v, window=3, softcap=1.5), weights @ v, rtol=1e-5)


def test_a_mask_is_of_rows_and_causality_of_positions():
    q, k = jax.ShapeDtypeStruct((2, 4, 32, 16), jnp.bfloat16), jax.ShapeDtypeStruct((2, 4, 64, 16), jnp.bfloat16)
    mask = np.tri(32, 64, dtype=bool)
    for offset, holds in ((None, True), (7, False)):
        jaxpr = jax.make_jaxpr(lambda q, k, o=offset: kpx.ops.attention(q, k, k, mask=mask, causal=True, offset=o))(
            q, k
        )
        assert ("('visible', 'causal')" in str(jaxpr)) == holds


@pytest.mark.parametrize(
    "wrong",
    [
        {"sinks": jnp.ones(3)},
        {"slopes": jnp.ones((2, 4))},
        {"kv_lengths": jnp.ones(3, int)},
        {"kv_lengths": jnp.ones(2)},
        {"segment_ids": jnp.ones((2, 31), int)},
        {"kv_segment_ids": jnp.ones((2, 32), int)},
        {"mask": jnp.ones((3, 1, 1, 32), bool)},
        {"mask": jnp.ones((32, 32), int)},
    ],
    ids=str,
)
def test_arrays_that_do_not_go_with_attention_are_refused(wrong):
    with pytest.raises(kpx.InputError, match="was given"):
        kpx.ops.attention(Q, K, K, **wrong)


def test_attention_over_no_keys_is_zero():
    out = kpx.ops.attention(Q, K[:, :, :0], K[:, :, :0])
    assert out.shape == Q.shape
    assert not out.any()


REFUSED = {
    "Keys are of the queries' size": lambda: kpx.ops.attention(Q, K[..., :8], K),
    "values have the keys' heads and length": lambda: kpx.ops.attention(Q, K, K[:, :, :8]),
    "The heads of keys divide those of queries": lambda: kpx.ops.attention(Q[:, :3], K, K),
    "Each is a floating dtype": lambda: kpx.ops.attention(Q.astype(int), K.astype(int), K.astype(int)),
    "window=0. It is 1 or more": lambda: kpx.ops.attention(Q, K, K, window=0),
    "softcap=-1. It is more than 0": lambda: kpx.ops.attention(Q, K, K, softcap=-1),
    r"or `\[length, size\]`": lambda: kpx.ops.attention(Q[0], K[0, 0], K[0, 0]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        REFUSED[says]()
