"""ATen's backward ops, which the graphs of training hold: most are the pullback of a forward rule."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kpx.bridges.torch.aten import indexing, nn, pooling, scatter
from kpx.bridges.torch.aten.common import pullback, sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers

# Convolution -----------------------------------------------------------------------------------


@lowers(aten.convolution_backward.default)
def convolution_backward(
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    def forward(x, weight):
        return nn.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)

    empty = jnp.zeros((0,), x.dtype)
    by_x, by_weight = pullback(forward, x, weight)(grad) if output_mask[0] or output_mask[1] else (empty, empty)
    spatial = [d for d in range(grad.ndim) if d != 1]
    by_bias = jnp.sum(grad, spatial) if output_mask[2] else empty
    return tuple(g if wanted else empty for g, wanted in zip((by_x, by_weight, by_bias), output_mask, strict=True))


@lowers(aten.conv_tbc_backward.default)
def conv_tbc_backward(grad, x, weight, bias, pad):
    by_x, by_weight = pullback(lambda x, w: nn.conv_tbc(x, w, None, pad), x, weight)(grad)
    return by_x, by_weight, jnp.sum(grad, (0, 1))


# Attention -------------------------------------------------------------------------------------


def _scores(query, key, mask, causal, scale):
    wide = sum_dtype(query.dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=wide) * jnp.asarray(scale, wide)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask.astype(wide)
    return scores, jnp.asarray(scale, wide)


def _for_each_head(array, query):
    """Keys or values, repeated for the heads that share them."""
    groups = query.shape[-3] // array.shape[-3]
    return array if groups == 1 else jnp.repeat(array, groups, -3)


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def flash_attention(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """Attention, and the logarithm of each row's sum, which the backward op takes."""
    shared = query.shape[-3] != key.shape[-3]
    out = nn.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=shared)
    scores, _ = _scores(query, _for_each_head(key, query), attn_mask, is_causal, scale)
    return out, jax.nn.logsumexp(scores, -1)


@lowers(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def flash_attention_backward(
    grad, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
):
    """Weights from the saved sums, and no more products than needed (arXiv 2205.14135, algorithm 4)."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = _for_each_head(key, query), _for_each_head(value, query)
    scores, factor = _scores(query, key, attn_mask, is_causal, scale)
    wide = scores.dtype
    hidden = jnp.isneginf(logsumexp)[..., None]
    weights = jnp.where(hidden, 0, jnp.exp(scores - jnp.where(hidden, 0, logsumexp[..., None])))
    narrow = weights.astype(grad.dtype)

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type=wide)

    by_value = product(jnp.swapaxes(narrow, -1, -2), grad)
    by_weights = product(grad, jnp.swapaxes(value, -1, -2))
    delta = jnp.sum(grad.astype(wide) * out.astype(wide), -1, keepdims=True)
    by_scores = (weights * (by_weights - delta) * factor).astype(grad.dtype)
    by_query, by_key = product(by_scores, key), product(jnp.swapaxes(by_scores, -1, -2), query)
    if groups > 1:  # heads that share a key: their gradients add up
        by_key, by_value = (a.reshape(*a.shape[:-3], -1, groups, *a.shape[-2:]).sum(-3) for a in (by_key, by_value))
    return by_query.astype(query.dtype), by_key.astype(key.dtype), by_value.astype(value.dtype)


# Pooling ---------------------------------------------------------------------------------------


def _avg_pool_backward(n):
    def back(grad, x, *settings):
        return pullback(lambda x: pooling.avg_pool(x, *settings, n=n), x)(grad)[0]

    return back


def _adaptive_avg_pool_backward(n):
    def back(grad, x):
        return pullback(lambda x: pooling.adaptive_avg_pool(x, grad.shape[-n:], n=n), x)(grad)[0]

    return back


for _n in (2, 3):
    lowers(getattr(aten, f"avg_pool{_n}d_backward").default)(_avg_pool_backward(_n))
    lowers(getattr(aten, f"_adaptive_avg_pool{_n}d_backward").default)(_adaptive_avg_pool_backward(_n))
    lowers(getattr(aten, f"max_pool{_n}d_with_indices_backward").default)(
        lambda grad, x, *rest, _n=_n: pooling.spread_to_places(grad, x, rest[-1], _n)
    )
    lowers(getattr(aten, f"adaptive_max_pool{_n}d_backward").default)(
        lambda grad, x, indices, _n=_n: pooling.spread_to_places(grad, x, indices, _n)
    )
    lowers(getattr(aten, f"fractional_max_pool{_n}d_backward").default)(
        lambda grad, x, kernel, out, indices, _n=_n: pooling.spread_to_places(grad, x, indices, _n)
    )


# Padding ---------------------------------------------------------------------------------------


def _replicated(x, padding):
    pairs = [(padding[i], padding[i + 1]) for i in range(0, len(padding), 2)][::-1]
    for axis, (low, high) in zip(range(x.ndim - len(pairs), x.ndim), pairs, strict=True):
        index = jnp.clip(jnp.arange(-low, x.shape[axis] + high), 0, x.shape[axis] - 1)
        x = jnp.take(x, index, axis)
    return x


for _n in (1, 2, 3):
    lowers(getattr(aten, f"replication_pad{_n}d_backward").default)(
        lambda grad, x, padding: pullback(lambda x: _replicated(x, padding), x)(grad)[0]
    )


# Embeddings and indexing -----------------------------------------------------------------------


@lowers(aten.embedding_dense_backward.default)
def embedding_dense_backward(grad, indices, num_weights, padding_idx, scale_grad_by_freq):
    flat = indices.reshape(-1)
    rows = grad.reshape(-1, grad.shape[-1]).astype(sum_dtype(grad.dtype))
    if scale_grad_by_freq:
        counts = jnp.zeros(num_weights, rows.dtype).at[flat].add(1)
        rows = rows / counts[flat][:, None]
    if padding_idx >= 0:
        flat = jnp.where(flat == padding_idx, num_weights, flat)
    total = jnp.zeros((num_weights, rows.shape[-1]), rows.dtype).at[flat].add(rows, mode="drop")
    return total.astype(grad.dtype)


@lowers(aten._embedding_bag_backward.default)
def embedding_bag_backward(
    grad, indices, offsets, offset2bag, bag_size, maximum_indices, num_weights, scale_grad_by_freq, mode, sparse,
    per_sample_weights, padding_idx=-1,
):  # fmt: skip
    return embedding_bag_dense_backward(
        grad, indices, _owners(offsets, indices, offset2bag), bag_size, maximum_indices, num_weights,
        scale_grad_by_freq, mode, per_sample_weights, padding_idx,
    )  # fmt: skip


def _owners(offsets, indices, offset2bag):
    """The bag of each row: what the forward op gave, or computed where it did not."""
    if offset2bag.size or not indices.size:
        return offset2bag
    places = jnp.arange(indices.shape[0], dtype=offsets.dtype)
    return (jnp.searchsorted(offsets, places, side="right") - 1).astype(offsets.dtype)


@lowers(aten._embedding_bag_dense_backward.default)
def embedding_bag_dense_backward(
    grad, indices, offset2bag, bag_size, maximum_indices, num_weights, scale_grad_by_freq, mode, per_sample_weights,
    padding_idx=-1,
):  # fmt: skip
    base = jnp.zeros((num_weights, grad.shape[-1]), grad.dtype)
    if mode == indexing.BAG_MAX:
        columns = jnp.arange(grad.shape[-1])[None]
        wanted = jnp.where(bag_size[:, None] > 0, maximum_indices, num_weights)
        return base.at[wanted, columns].add(grad, mode="drop")
    rows = grad.at[offset2bag].get(mode="fill", fill_value=0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    if mode == indexing.BAG_MEAN:
        rows = rows / jnp.maximum(bag_size[offset2bag], 1)[:, None].astype(rows.dtype)
    if scale_grad_by_freq:
        counts = jnp.zeros(num_weights, rows.dtype).at[indices].add(1)
        rows = rows / counts[indices][:, None]
    target = jnp.where(indices == padding_idx, num_weights, indices) if padding_idx >= 0 else indices
    return base.at[target].add(rows, mode="drop")


@lowers(aten._embedding_bag_per_sample_weights_backward.default)
def embedding_bag_weights_backward(grad, weight, indices, offsets, offset2bag, mode, padding_idx=-1):
    rows = grad.at[_owners(offsets, indices, offset2bag)].get(mode="fill", fill_value=0)
    product = jnp.sum(rows * weight[indices], -1)
    return jnp.where(indices == padding_idx, 0, product) if padding_idx >= 0 else product


@lowers(aten.masked_scatter_backward.default)
def masked_scatter_backward(grad, mask, sizes):
    """The gradient of the source: those of the places that took its values, in order, then zeros."""
    mask = jnp.broadcast_to(mask, grad.shape).reshape(-1)
    count = math.prod(sizes)
    order = jnp.where(mask, jnp.cumsum(mask) - 1, count)
    return jnp.zeros(count, grad.dtype).at[order].set(grad.reshape(-1), mode="drop").reshape(sizes)


# Others ----------------------------------------------------------------------------------------


@lowers(aten._cdist_backward.default)
def cdist_backward(grad, x1, x2, p, cdist):
    if not (cdist.size and x1.size):
        return jnp.zeros_like(x1)
    x1 = jnp.broadcast_to(x1, (*cdist.shape[:-1], x1.shape[-1]))  # PyTorch sums over batches itself
    return pullback(lambda x1: nn.cdist(x1, x2, p, None), x1)(grad)[0]


@lowers(aten._pdist_backward.default)
def pdist_backward(grad, x, p, pdist):
    return pullback(lambda x: nn.pdist(x, p), x)(grad)[0]


@lowers(aten._weight_norm_interface_backward.default)
def weight_norm_backward(grad, v, g, norms, dim):
    axes = tuple(d for d in range(v.ndim) if d != dim)

    def forward(v, g):
        return v * (g / jnp.sqrt(jnp.sum(jnp.square(v), axes, keepdims=True)))

    return pullback(forward, v, g)(grad)


@lowers(aten._segment_reduce_backward.default)
def segment_reduce_backward(grad, output, data, reduce, *, lengths=None, offsets=None, axis=0, initial=None):
    lengths = jnp.diff(offsets, axis=-1) if lengths is None else lengths
    if reduce == "prod":
        return _segment_prod_backward(grad, data, lengths, axis, 1 if initial is None else initial)

    def forward(data):
        return scatter.segment_reduce(data, reduce, lengths=lengths, axis=axis, initial=initial)

    return pullback(forward, data)(grad)[0]


def _segment_prod_backward(grad, data, lengths, axis, initial):
    """For each element the product of the others of its run, without dividing by zero."""
    if lengths.ndim > 1:
        run = jax.vmap(lambda g, d, n: _segment_prod_backward(g, d, n, axis - 1, initial))
        return run(grad, data, lengths)
    owner = jnp.searchsorted(jnp.cumsum(lengths), jnp.arange(data.shape[axis]), side="right")

    def of_run(values, reduce):
        found = scatter.segment_reduce(values, reduce, lengths=lengths, axis=axis, initial=1 if reduce == "prod" else 0)
        return jnp.take(found, owner, axis, mode="fill", fill_value=0)

    odd, is_nan = (data == 0) | jnp.isnan(data), jnp.isnan(data).astype(data.dtype)
    regular = of_run(jnp.where(odd, 1, data), "prod") * initial
    others_odd = of_run(odd.astype(data.dtype), "sum") - odd
    others_nan = of_run(is_nan, "sum") - is_nan
    product = jnp.where(others_odd > 0, 0, regular / jnp.where(odd, 1, data))
    product = jnp.where(others_nan > 0, jnp.nan, product)
    return product * jnp.take(grad, owner, axis, mode="fill", fill_value=0)
