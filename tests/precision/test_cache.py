"""A cache of keys and values in few bits: how near its attention is to f64, what it takes, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.errors import ConfigError, InputError
from kpx.precision import KVCache
from tests.reference import distance

_FAR = {"int8": 0.01, "fp8": 0.05}


def _given(tokens=12, heads=2, shared=3, width=64, seed=0):
    random = np.random.default_rng(seed)
    q = random.standard_normal((2, heads * shared, tokens, width)).astype(np.float32)
    k, v = (random.standard_normal((2, heads, tokens, width)).astype(np.float32) for _ in range(2))
    return q, k, v


def _exact(q, k, v):
    """Causal attention in f64."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = q @ np.swapaxes(k, 2, 3) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_whole_prompt_is_near_f64(precision):
    q, k, v = _given()
    cache = KVCache.zeros(2, 2, 16, 64, precision).append(k, v)
    assert 1e-4 < distance(np.asarray(cache.attend(jnp.asarray(q)), np.float64), _exact(q, k, v)) < _FAR[precision]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_tokens_one_by_one_give_what_all_at_once_do(precision):
    q, k, v = _given()

    @kpx.jit
    def step(cache, q, k, v):
        cache = cache.append(k, v)
        return cache, cache.attend(q)

    cache, rows = KVCache.zeros(2, 2, 16, 64, precision), []
    for t in range(q.shape[2]):
        cache, row = step(cache, *(a[:, :, t : t + 1] for a in (q, k, v)))
        rows.append(np.asarray(row))
    whole = KVCache.zeros(2, 2, 16, 64, precision).append(k, v)
    np.testing.assert_allclose(np.concatenate(rows, 2), whole.attend(jnp.asarray(q)), rtol=1e-4, atol=1e-5)
    assert int(cache.length) == 12


def test_it_takes_little_more_than_a_quarter_of_f32():
    assert KVCache.zeros(4, 8, 128, 64).nbytes / (2 * 4 * 8 * 128 * 64 * 4) < 0.27


def test_it_goes_through_a_scan():
    q, k, v = _given()

    def step(cache, given):
        q, k, v = given
        cache = cache.append(k, v)
        return cache, cache.attend(q)

    tokens = tuple(jnp.moveaxis(jnp.asarray(a)[:, :, :, None], 2, 0) for a in (q, k, v))
    _, rows = kpx.jit(lambda c, t: jax.lax.scan(step, c, t))(KVCache.zeros(2, 2, 12, 64), tokens)
    given = np.moveaxis(np.asarray(rows)[:, :, :, 0], 0, 2)
    assert distance(given.astype(np.float64), _exact(q, k, v)) < _FAR["int8"]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_odd_tokens_harm_what_sees_them_alone(precision):
    q, k, v = _given()
    k[:, :, 4, 3], v[:, :, 6], v[:, :, 8, 1] = np.nan, 0, 1e30
    given = np.asarray(KVCache.zeros(2, 2, 12, 64, precision).append(k, v).attend(jnp.asarray(q)))
    assert np.isfinite(given[:, :, :4]).all()
    assert np.isnan(given[:, :, 4:]).all()


def test_what_does_not_fit_is_refused():
    q, k, v = _given()
    cache = KVCache.zeros(2, 2, 12, 64).append(k, v)
    with pytest.raises(InputError, match="12 are in it: 12 more do not fit"):
        cache.append(k, v)
    with pytest.raises(InputError, match="do not fit a cache"):
        cache.append(k[:, :1], v[:, :1])
    with pytest.raises(InputError, match="does not fit a cache"):
        cache.attend(jnp.asarray(q)[:, :3])
    with pytest.raises(ConfigError, match="Use 'int8' or 'fp8'"):
        KVCache.zeros(2, 2, 12, 64, "int4")
