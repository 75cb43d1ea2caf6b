"""The loss over a linear layer: against the logits written out, in f64, and in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from tests.reference import assert_closer


def _plain(x, weight, labels, bias=None, softcap=None):
    logits = jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    counted = (labels >= 0) & (labels < weight.shape[0])
    own = jnp.take_along_axis(jax.nn.log_softmax(logits, -1), jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(counted, -own, 0)


def _arrays(dtype, shape=(3, 7), size=16, vocabulary=50):
    rng = np.random.default_rng(0)
    x, weight, bias = (
        rng.standard_normal(s).astype(dtype) for s in ((*shape, size), (vocabulary, size), (vocabulary,))
    )
    labels = rng.integers(0, vocabulary, shape, dtype=np.int32)
    labels.flat[:2] = -100, vocabulary
    return x, weight, bias, labels


def _both(function, labels, *arrays):
    def total(*arrays):
        losses = function(*arrays)
        return jnp.sum(losses * jnp.sin(jnp.arange(losses.size)).reshape(losses.shape)), losses

    gradients, losses = jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return [losses, *gradients]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "given", [{}, {"chunk": 16}, {"chunk": 7, "softcap": 2.0}, {"chunk": 50}, {"chunk": 1000}], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_losses_and_gradients_are_those_of_the_logits(dtype, given, biased):
    x, weight, bias, labels = _arrays(dtype)
    arrays = [x, weight, *([bias] if biased else [])]

    def called(function, given):
        return jax.jit(
            lambda *a: _both(lambda x, w, *b: function(x, w, labels, bias=b[0] if b else None, **given), labels, *a)
        )

    plain = called(_plain, {k: v for k, v in given.items() if k != "chunk"})
    ours, theirs = called(kpx.ops.linear_cross_entropy, given)(*arrays), plain(*arrays)
    with jax.enable_x64(True):
        exact = plain(*(a.astype(np.float64) for a in arrays))
    for made, other, reference in zip(ours, theirs, exact, strict=True):
        assert_closer(made, other, reference, relative=2e-6 if dtype == np.float32 else 1e-2)


def test_a_label_that_is_none_has_no_loss_and_no_gradient():
    x, weight, _, labels = _arrays(np.float32)
    losses, pull = jax.vjp(lambda x: kpx.ops.linear_cross_entropy(x, weight, labels), x)
    assert not np.any(losses.reshape(-1)[:2])
    (by_x,) = pull(jnp.ones_like(losses))
    assert not np.any(by_x.reshape(-1, 16)[:2])
    assert np.all(np.any(by_x.reshape(-1, 16)[2:], -1))


def test_it_can_be_batched():
    x, weight, _, labels = _arrays(np.float32)
    batched = jax.vmap(functools.partial(kpx.ops.linear_cross_entropy), (0, None, 0))(x, weight, labels)
    np.testing.assert_allclose(batched, kpx.ops.linear_cross_entropy(x, weight, labels), rtol=1e-5)


@pytest.mark.parametrize(
    "target", ["cuda:h100", *(pytest.param(t, marks=pytest.mark.slow) for t in ("tpu-v5e", "rocm:mi300x"))]
)
def test_a_gradient_takes_a_tenth_of_the_memory_of_the_logits(target):
    tokens, vocabulary, size = 8192, 32000, 256
    x, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, size), (vocabulary, size)))
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def step(function, x, weight, labels):
        return jax.value_and_grad(lambda x, w: function(x, w, labels).mean(), (0, 1))(x, weight)

    as_written = kpx.Config(level="conservative")
    plain, ours = (
        kpx.compile(functools.partial(step, function), x, weight, labels, target=target, config=as_written)
        for function in (_plain, functools.partial(kpx.ops.linear_cross_entropy, chunk=1000))
    )
    assert ours.memory.temp_bytes < plain.memory.temp_bytes / 10


REFUSED = {
    r"inputs \(3, 7, 16\), weights \(50, 8\)": lambda x, w, b, n: (x, w[:, :8], n, {}),
    r"labels \(7, 3\)": lambda x, w, b, n: (x, w, n.T, {}),
    "inputs of float32 and weights of bfloat16": lambda x, w, b, n: (x, w.astype(jnp.bfloat16), n, {}),
    "labels of float32. They are integers": lambda x, w, b, n: (x, w, n.astype(np.float32), {}),
    r"a bias \(16,\)": lambda x, w, b, n: (x, w, n, {"bias": b[:16]}),
    "softcap=0. It is more than 0": lambda x, w, b, n: (x, w, n, {"softcap": 0}),
    "chunk=0. It is 1 or more": lambda x, w, b, n: (x, w, n, {"chunk": 0}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    *arrays, given = REFUSED[says](*_arrays(np.float32))
    with pytest.raises(kpx.InputError, match=says):
        kpx.ops.linear_cross_entropy(*arrays, **given)
