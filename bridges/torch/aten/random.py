"""ATen's random ops. Each takes a JAX key of its own at every call; PyTorch's stream of numbers is not reproduced."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.common import is_complex, is_float
from kpx.bridges.torch.aten.nn import scaled_dot_product_attention as _attention
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers


def _dtype(dtype, like=None):
    if dtype is not None:
        return to_jax(dtype)
    return jnp.dtype(jnp.float32) if like is None else like.dtype


def _draw(key, shape, dtype):
    """Uniform in [0, 1), of any floating dtype."""
    if jnp.finfo(dtype).bits >= 32:
        return jax.random.uniform(key, shape, dtype)
    # Rounding to a 16-bit float may reach 1.
    return jnp.minimum(jax.random.uniform(key, shape, jnp.float32).astype(dtype), 1 - jnp.finfo(dtype).epsneg)


# Uniform and normal ----------------------------------------------------------------------------


@lowers(aten.rand.default, aten.rand.generator, random=True)
def rand(size, *, generator=None, dtype=None, key):
    return _draw(key, size, _dtype(dtype))


@lowers(aten.rand_like.default, random=True)
def rand_like(x, *, dtype=None, memory_format=None, key):
    return _draw(key, x.shape, _dtype(dtype, x))


@lowers(aten.uniform.default, random=True)
def uniform(x, from_=0.0, to=1.0, *, generator=None, key):
    return _draw(key, x.shape, x.dtype) * jnp.asarray(to - from_, x.dtype) + jnp.asarray(from_, x.dtype)


@lowers(aten.geometric.default, random=True)
def geometric(x, p, *, generator=None, key):
    """How many trials until the first success, at least one."""
    u = jax.random.uniform(key, x.shape, jnp.float32)
    return jnp.maximum(jnp.ceil(jnp.log1p(-u) / jnp.log1p(jnp.float32(-p))), 1).astype(x.dtype)


def _normal(key, shape, dtype):
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jax.random.normal(key, shape, dtype)
    return jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)


@lowers(aten.randn.default, aten.randn.generator, random=True)
def randn(size, *, generator=None, dtype=None, key):
    return _normal(key, size, _dtype(dtype))


@lowers(aten.randn_like.default, random=True)
def randn_like(x, *, dtype=None, memory_format=None, key):
    return _normal(key, x.shape, _dtype(dtype, x))


@lowers(aten.normal_functional.default, random=True)
def normal_functional(x, mean=0.0, std=1.0, *, generator=None, key):
    # Of a complex tensor PyTorch shifts both parts.
    mean = complex(mean, mean) if is_complex(x) else mean
    return _normal(key, x.shape, x.dtype) * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype)


@lowers(aten.normal.Tensor_float, aten.normal.Tensor_Tensor, aten.normal.float_Tensor, random=True)
def normal(mean=0.0, std=1.0, *, generator=None, key):
    arrays = [a for a in (mean, std) if hasattr(a, "dtype")]
    dtype = jnp.result_type(*arrays)
    shape = jnp.broadcast_shapes(*(a.shape for a in arrays))
    return _normal(key, shape, dtype) * jnp.asarray(std, dtype) + jnp.asarray(mean, dtype)


@lowers(aten.normal.float_float, random=True)
def normal_of_size(mean, std, size, *, generator=None, dtype=None, key):
    kind = _dtype(dtype)
    return _normal(key, size, kind) * jnp.asarray(std, kind) + jnp.asarray(mean, kind)


# Integers --------------------------------------------------------------------------------------


def _integers(key, shape, low, high, dtype):
    kind = jnp.int64 if dtype is None else to_jax(dtype)
    return jax.random.randint(key, shape, low, high, jnp.int64).astype(kind)


@lowers(aten.randint.default, aten.randint.generator, random=True)
def randint(high, size, *, generator=None, dtype=None, key):
    return _integers(key, size, 0, high, dtype)


@lowers(aten.randint.low, aten.randint.low_generator, random=True)
def randint_low(low, high, size, *, generator=None, dtype=None, key):
    return _integers(key, size, low, high, dtype)


@lowers(aten.randint_like.default, aten.randint_like.Tensor, random=True)
def randint_like(x, high, *, dtype=None, memory_format=None, key):
    return jax.random.randint(key, x.shape, 0, high, jnp.int64).astype(_dtype(dtype, x))


@lowers(aten.randint_like.low_dtype, random=True)
def randint_like_low(x, low, high, *, dtype=None, memory_format=None, key):
    return jax.random.randint(key, x.shape, low, high, jnp.int64).astype(_dtype(dtype, x))


@lowers(aten.randperm.default, aten.randperm.generator, random=True)
def randperm(n, *, generator=None, dtype=None, key):
    return jax.random.permutation(key, n).astype(jnp.int64 if dtype is None else to_jax(dtype))


# Choices ---------------------------------------------------------------------------------------


def _bernoulli(key, p, shape):
    return jax.random.uniform(key, shape, jnp.float32) < jnp.asarray(p, jnp.float32)


def _mixed(h):
    """Wellons' 32-bit finalizer with the least known bias (github.com/skeeto/hash-prospector)."""
    h = (h ^ (h >> 16)) * np.uint32(0x21F0AAAD)
    h = (h ^ (h >> 15)) * np.uint32(0x735A2D97)
    return h ^ (h >> 15)


def _kept(key, p: float, shape):
    """Which elements dropout keeps, each with probability `p` by its own hash of place and key.

    A mask is most of what a training step draws. Computed in registers beside what it masks, it costs a few integer
    operations an element, where a generator's bits are written to memory and read again.
    """
    words = jax.random.key_data(key).reshape(-1)
    place = jnp.zeros(shape, jnp.uint32)
    for d in range(len(shape)):
        stride = np.uint32(math.prod(shape[d + 1 :]) & 0xFFFFFFFF)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, d) * stride
    h = _mixed(place * np.uint32(0x9E3779B9) + words[0])
    h = _mixed(h ^ words[1])
    for word in words[2:4]:
        h = h + word
    return _mixed(h) < np.uint32(min(int(p * 2**32), 2**32 - 1))


@lowers(aten.bernoulli.default, random=True)
def bernoulli(x, *, generator=None, key):
    return _bernoulli(key, x, x.shape).astype(x.dtype)


@lowers(aten.bernoulli.p, random=True)
def bernoulli_p(x, p=0.5, *, generator=None, key):
    return _bernoulli(key, p, x.shape).astype(x.dtype)


@lowers(aten.bernoulli.Tensor, random=True)
def bernoulli_tensor(x, p, *, generator=None, key):
    return _bernoulli(key, p, x.shape).astype(x.dtype)


@lowers(aten.multinomial.default, random=True)
def multinomial(p, num_samples, replacement=False, *, generator=None, key):
    """Indices drawn with the given weights: by inverting their cumulative sum, or as the winners of a race.

    Without replacement the largest of `p / E`, `E` exponential, are a sample (arXiv 1903.06059, there on a log scale).
    """
    p = p if p.dtype == jnp.float64 else p.astype(jnp.float32)
    valid = jnp.all((p >= 0) & (p < jnp.inf))
    checks.holds(valid, "probability tensor contains either `inf`, `nan` or element < 0", "RuntimeError")
    message = "invalid multinomial distribution (sum of probabilities <= 0)"
    checks.holds(~valid | jnp.all(jnp.sum(p, -1) > 0), message, "RuntimeError")
    if replacement or num_samples == 1:
        drawn = jax.random.uniform(key, (*p.shape[:-1], num_samples), p.dtype)
        return _inverted(jnp.cumsum(p, -1), drawn)
    # -log(1 - u) is positive: u is below 1, and above 0 by the smallest normal number at least.
    tiny = jnp.finfo(p.dtype).tiny
    race = p / -jnp.log1p(-jax.random.uniform(key, p.shape, p.dtype, minval=tiny))
    return jax.lax.top_k(race, num_samples)[1].astype(jnp.int64)


def _inverted(cumulative, drawn):
    """The first index whose cumulative weight exceeds the number drawn, `[0, 1)` of the total."""
    total = cumulative[..., -1:]
    point = jnp.minimum(drawn * total, jnp.nextafter(total, jnp.zeros_like(total)))

    def search(row, points):
        return jnp.searchsorted(row, points, side="right")

    for _ in range(cumulative.ndim - 1):
        search = jax.vmap(search)
    return search(cumulative, point).astype(jnp.int64)


@lowers(aten.poisson.default, random=True)
def poisson(rate, generator=None, *, key):
    seed = jax.random.key_data(key).reshape(-1)[:2]
    return jax.random.poisson(jax.random.wrap_key_data(seed, impl="threefry2x32"), rate, rate.shape).astype(rate.dtype)


@lowers(aten._standard_gamma.default, random=True)
def standard_gamma(alpha, generator=None, *, key):
    return jax.random.gamma(key, alpha.astype(jnp.promote_types(alpha.dtype, jnp.float32))).astype(alpha.dtype)


@lowers(aten._sample_dirichlet.default, random=True)
def sample_dirichlet(alpha, generator=None, *, key):
    drawn = jax.random.gamma(key, alpha)
    return drawn / drawn.sum(-1, keepdims=True)


# Dropout ---------------------------------------------------------------------------------------


def _drops(x, p, train):
    return bool(p) and train is not False


@lowers(aten.native_dropout.default, random=_drops)
def native_dropout(x, p, train, *, key):
    if train is False or p == 0:
        return x, jnp.ones(x.shape, bool)
    if p == 1:
        return jnp.zeros_like(x), jnp.zeros(x.shape, bool)
    kept = _kept(key, 1 - p, x.shape)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - p), x.dtype), 0).astype(x.dtype), kept


@lowers(aten.dropout.default, random=_drops)
def dropout(x, p, train, *, key):
    return native_dropout(x, p, train, key=key)[0]


@lowers(aten.rrelu_with_noise_functional.default, random=True)
def rrelu(x, noise, lower=0.125, upper=1 / 3, training=False, generator=None, *, key):
    if not training:
        slope = jnp.asarray((lower + upper) / 2, x.dtype)
        return jnp.where(x > 0, x, x * slope), noise
    slope = jax.random.uniform(key, x.shape, jnp.float32, lower, upper).astype(x.dtype)
    slope = jnp.where(x <= 0, slope, 1)
    return x * slope, slope


def _drops_weights(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    return dropout_p > 0


@lowers(aten.scaled_dot_product_attention.default, random=_drops_weights)
def scaled_dot_product_attention(
    query, key_, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False, key
):
    if not dropout_p:
        return _attention(query, key_, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return _dropped_attention(query, key_, value, attn_mask, dropout_p, is_causal, scale, key)


def _dropped_attention(query, keys, value, mask, p, causal, scale, key):
    """Attention whose weights are dropped, as PyTorch's reference says it."""
    groups = query.shape[-3] // keys.shape[-3] if query.ndim > 2 else 1
    if groups > 1:
        keys, value = (jnp.repeat(a, groups, -3) for a in (keys, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.matmul(query, jnp.swapaxes(keys, -1, -2)) * jnp.asarray(scale, query.dtype)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    if mask is not None:
        scores = scores + mask if is_float(mask) else jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1)
    return jnp.matmul(native_dropout(weights, p, True, key=key)[0], value)
