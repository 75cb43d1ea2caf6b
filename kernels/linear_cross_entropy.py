"""Softmax cross-entropy over a linear layer without the logits (arXiv 2411.09009, 2410.10989), on every target.

The loss of a language model reads `[tokens, vocabulary]` logits once and keeps them for the gradient: gigabytes. Here the
vocabulary is taken in chunks, of which a running maximum, total and the label's logit are kept; the gradient computes each
chunk's logits again. Plain JAX, in products as large as XLA wants them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kpx.errors import InputError

_CHUNK_BYTES = 1 << 28  # of f32 logits at a time
_LEAST_CHUNK = 1024  # columns: products stay large


def linear_cross_entropy(x, weight, labels, *, bias=None, softcap: float | None = None, chunk: int | None = None):
    """`-log_softmax(x @ weight.T + bias)[labels]`, a loss for each row.

    Args:
        x: `[..., size]`, floating.
        weight: `[vocabulary, size]`, of the dtype of `x` (a PyTorch Linear's).
        labels: `[...]`, integers in `[0, vocabulary)`; any other has loss 0 and no gradient (-100, say).
        bias: `[vocabulary]` or None.
        softcap: logits become `softcap * tanh(logits / softcap)` first.
        chunk: how many columns of the vocabulary are computed at a time; by default so many that their f32 logits take a
            quarter of a GiB, and about 1024 at least.

    Returns:
        `[...]`, f32 (f64 for f64 inputs). Products are of the inputs' dtype, and sums in f32.

    Raises:
        InputError: shapes or dtypes do not go together.
    """
    _check(x, weight, labels, bias, softcap, chunk)
    vocabulary, size = weight.shape
    rows = x.reshape(-1, size)
    if bias is None:
        bias = jnp.zeros(vocabulary, weight.dtype)
    if chunk is None:
        chunk = _chunk(rows.shape[0], vocabulary)
    loss = _loss(rows, weight, bias, labels.reshape(-1), min(chunk, vocabulary), softcap)
    return loss.reshape(labels.shape)


def _chunk(rows: int, vocabulary: int) -> int:
    """Columns at a time: what divides the vocabulary where that is near, since a last chunk that is not whole would have
    the weights copied."""
    most = max(_LEAST_CHUNK, _CHUNK_BYTES // 4 // max(1, rows) // 128 * 128)
    return next((n for n in range(most, most // 2, -1) if vocabulary % n == 0), most)


def _check(x, weight, labels, bias, softcap, chunk) -> None:
    shapes = f"inputs {x.shape}, weights {weight.shape}, labels {labels.shape}"
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1] or labels.shape != x.shape[:-1]:
        raise InputError(
            f"linear_cross_entropy was given {shapes}. Inputs are `[..., size]`, weights `[vocabulary, size]`, labels `[...]`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != weight.dtype:
        raise InputError(
            f"linear_cross_entropy was given inputs of {x.dtype} and weights of {weight.dtype}. Both are one floating dtype."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"linear_cross_entropy was given labels of {labels.dtype}. They are integers.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"linear_cross_entropy was given a bias {bias.shape} and {shapes}. A bias is `[vocabulary]`.")
    if softcap is not None and not softcap > 0:
        raise InputError(f"linear_cross_entropy was given softcap={softcap}. It is more than 0, or None.")
    if chunk is not None and chunk < 1:
        raise InputError(f"linear_cross_entropy was given chunk={chunk}. It is 1 or more.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(x, weight, bias, labels, chunk: int, softcap: float | None):
    return _forward(x, weight, bias, labels, chunk, softcap)[0]


def _chunks(weight, bias, chunk: int):
    """Weights and biases as `[chunks, chunk, ...]`, and the first column of each; the last ends in what is added."""
    vocabulary = weight.shape[0]
    count = -(-vocabulary // chunk)
    if extra := count * chunk - vocabulary:
        weight, bias = jnp.pad(weight, ((0, extra), (0, 0))), jnp.pad(bias, (0, extra))
    return weight.reshape(count, chunk, -1), bias.reshape(count, chunk), jnp.arange(count, dtype=jnp.int32) * chunk


def _logits(x, weight, bias, begin, vocabulary: int, softcap):
    """A chunk's logits, -inf beyond the vocabulary; and their derivative by those before the cap."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=wide) + bias.astype(wide)
    slope = None
    if softcap is not None:
        capped = jnp.tanh(logits / softcap)
        logits, slope = capped * softcap, 1 - capped * capped
    inside = begin + jnp.arange(weight.shape[0], dtype=jnp.int32) < vocabulary
    return jnp.where(inside, logits, -jnp.inf), slope


def _forward(x, weight, bias, labels, chunk, softcap):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, vocabulary = x.shape[0], weight.shape[0]

    def step(state, part):
        top, total, own = state
        weight, bias, begin = part
        logits, _ = _logits(x, weight, bias, begin, vocabulary, softcap)
        highest = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - highest) + jnp.exp(logits - highest[:, None]).sum(-1)
        own += jnp.where(_is_label(labels, begin, chunk), logits, 0).sum(-1)
        return (highest, total, own), None

    start = jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide), jnp.zeros(rows, wide)
    (top, total, own), _ = jax.lax.scan(step, start, _chunks(weight, bias, chunk))
    log_total = top + jnp.log(total)
    counted = (labels >= 0) & (labels < vocabulary)
    return jnp.where(counted, log_total - own, 0), (x, weight, bias, labels, log_total)


def _is_label(labels, begin, chunk: int):
    return labels[:, None] == begin + jnp.arange(chunk, dtype=labels.dtype)


def _backward(chunk, softcap, saved, cotangent):
    x, weight, bias, labels, log_total = saved
    vocabulary, size = weight.shape
    cotangent = jnp.where((labels >= 0) & (labels < vocabulary), cotangent, 0)

    def step(by_x, part):
        weight, bias, begin = part
        logits, slope = _logits(x, weight, bias, begin, vocabulary, softcap)
        by_logits = (jnp.exp(logits - log_total[:, None]) - _is_label(labels, begin, chunk)) * cotangent[:, None]
        if slope is not None:
            by_logits = by_logits * slope
        by_bias = by_logits.sum(0)
        by_logits = by_logits.astype(x.dtype)
        wide = by_x.dtype
        by_x += jax.lax.dot_general(by_logits, weight, (((1,), (0,)), ((), ())), preferred_element_type=wide)
        by_weight = jax.lax.dot_general(by_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=wide)
        return by_x, (by_weight.astype(weight.dtype), by_bias.astype(bias.dtype))

    start = jnp.zeros(x.shape, log_total.dtype)
    by_x, (by_weight, by_bias) = jax.lax.scan(step, start, _chunks(weight, bias, chunk))
    by_weight, by_bias = by_weight.reshape(-1, size)[:vocabulary], by_bias.reshape(-1)[:vocabulary]
    return by_x.astype(x.dtype), by_weight, by_bias, None


_loss.defvjp(_forward, _backward)
