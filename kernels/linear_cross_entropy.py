"""Softmax cross-entropy over a linear layer without the logits (arXiv 2411.09009, 2410.10989), on every target.

The loss of a language model reads `[tokens, vocabulary]` logits once and keeps them for the gradient: gigabytes. Here the
vocabulary is taken in chunks, of which a running maximum, total and the label's logit are kept; the gradient computes each
chunk's logits again. Plain JAX, in products as large as XLA wants them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kpx.errors import InputError
from kpx.kernels.registry import kernel

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
    if chunk is None:
        chunk = _chunk(rows.shape[0], vocabulary)
    loss = _loss(rows, weight, bias, labels.reshape(-1), _Cut(vocabulary, min(chunk, vocabulary), 0, softcap))
    return jnp.where((labels >= 0) & (labels < vocabulary), loss.reshape(labels.shape), 0)


def _chunk(rows: int, vocabulary: int) -> int:
    """Columns at a time: what divides the vocabulary where that is near, so that none is computed twice."""
    most = max(_LEAST_CHUNK, _CHUNK_BYTES // 4 // max(1, rows) // 128 * 128)
    return min(vocabulary, next((n for n in range(most, most // 2, -1) if vocabulary % n == 0), most))


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


@dataclass(frozen=True)
class _Cut:
    """How the vocabulary is taken: so many columns at a time, of weights that have it first (`axis` 0) or last (1)."""

    vocabulary: int
    chunk: int
    axis: int
    softcap: float | None

    @property
    def begins(self):
        """Where chunks begin. The last is moved back where it would end outside, and computes columns again (`done`)."""
        return jnp.arange(-(-self.vocabulary // self.chunk), dtype=jnp.int32) * self.chunk

    def columns(self, begin):
        """A chunk's columns, and which were in the chunk before."""
        columns = jnp.minimum(begin, self.vocabulary - self.chunk) + jnp.arange(self.chunk, dtype=jnp.int32)
        return columns, columns < begin

    def of(self, array, begin, axis: int):
        """A chunk of an array that has the vocabulary along an axis."""
        return jax.lax.dynamic_slice_in_dim(array, jnp.minimum(begin, self.vocabulary - self.chunk), self.chunk, axis)

    def put(self, array, begin, part, axis: int):
        """An array with a chunk written, less the columns that were before."""
        if self.vocabulary % self.chunk:
            _, done = self.columns(begin)
            part = jnp.where(
                jnp.expand_dims(done, tuple({0, 1} - {axis})[: array.ndim - 1]), self.of(array, begin, axis), part
            )
        start = jnp.minimum(begin, self.vocabulary - self.chunk)
        return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x, weight, bias, labels, cut: _Cut):
    """The logarithm of the sum of powers, less the label's logit where there is one."""
    return _forward(x, weight, bias, labels, cut)[0]


def _dot(left, right, contracted: tuple[int, int], dtype):
    return jax.lax.dot_general(
        left, right, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=dtype
    )


def _logits(x, weight, bias, begin, cut: _Cut):
    """A chunk's logits, -inf where they were in the chunk before; and their derivative by those before the cap."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = _dot(x, cut.of(weight, begin, cut.axis), (1, 1 - cut.axis), wide)
    if bias is not None:
        logits = logits + cut.of(bias, begin, 0).astype(wide)
    slope = None
    if cut.softcap is not None:
        capped = jnp.tanh(logits / cut.softcap)
        logits, slope = capped * cut.softcap, 1 - capped * capped
    if cut.vocabulary % cut.chunk:
        logits = jnp.where(cut.columns(begin)[1], -jnp.inf, logits)
    return logits, slope


def _forward(x, weight, bias, labels, cut: _Cut):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = x.shape[0]

    def step(state, begin):
        top, total, own = state
        logits, _ = _logits(x, weight, bias, begin, cut)
        highest = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - highest) + jnp.exp(logits - highest[:, None]).sum(-1)
        own += jnp.where(_is_label(labels, begin, cut), logits, 0).sum(-1)
        return (highest, total, own), None

    start = jnp.full(rows, -jnp.inf, wide), jnp.zeros(rows, wide), jnp.zeros(rows, wide)
    (top, total, own), _ = jax.lax.scan(step, start, cut.begins)
    log_total = top + jnp.log(total)
    return log_total - own, (x, weight, bias, labels, log_total)


def _is_label(labels, begin, cut: _Cut):
    columns, done = cut.columns(begin)
    return (labels[:, None] == columns.astype(labels.dtype)) & ~done


def _backward(cut: _Cut, saved, cotangent):
    x, weight, bias, labels, log_total = saved

    def step(state, begin):
        by_x, by_weight, by_bias = state
        logits, slope = _logits(x, weight, bias, begin, cut)
        by_logits = (jnp.exp(logits - log_total[:, None]) - _is_label(labels, begin, cut)) * cotangent[:, None]
        if slope is not None:
            by_logits = by_logits * slope
        if by_bias is not None:
            by_bias = cut.put(by_bias, begin, by_logits.sum(0).astype(by_bias.dtype), 0)
        by_logits = by_logits.astype(x.dtype)
        by_x += _dot(by_logits, cut.of(weight, begin, cut.axis), (1, cut.axis), by_x.dtype)
        operands = (by_logits, x) if cut.axis == 0 else (x, by_logits)
        part = _dot(*operands, (0, 0), by_x.dtype).astype(weight.dtype)
        return (by_x, cut.put(by_weight, begin, part, cut.axis), by_bias), None

    start = jnp.zeros(x.shape, log_total.dtype), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias)
    (by_x, by_weight, by_bias), _ = jax.lax.scan(step, start, cut.begins)
    return by_x.astype(x.dtype), by_weight, by_bias, None


_loss.defvjp(_forward, _backward)


# In place of logits that a model writes out -----------------------------------------------------------


@kernel("kpx.linear_cross_entropy", version=1)
def linear_cross_entropy_kernel(x, weight, labels, *, axis, softcap=0.0):
    """The loss of rows `[rows, size]`, as models write it: labels from the end are negative, and others give NaN."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = _dot(x, weight, (1, 1 - axis), wide)
    if softcap:
        logits = jnp.tanh(logits / np.asarray(softcap, wide)) * np.asarray(softcap, wide)
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    log_total = jnp.log(jnp.sum(jnp.exp(logits - top), -1)) + top[:, 0]
    return log_total - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]


def _supports(x, weight, labels, *, axis, softcap=0.0) -> str | None:
    if x.dtype != weight.dtype or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bf16, f16 or f32 alone, not {x.dtype} and {weight.dtype}"
    return None


def _large(least: int, x, weight, labels, *, where, axis, softcap=0.0) -> str | None:
    if (taken := 4 * x.shape[0] * weight.shape[axis]) < least:
        return f"logits of {taken >> 20} MiB stay: from {least >> 20} MiB on they are better computed twice than kept"
    return None


def chunked(x, weight, labels, *, axis, softcap=0.0):
    """Logits in chunks, and again for the gradient; never all."""
    vocabulary = weight.shape[axis]
    labels = jnp.where(labels < 0, labels + vocabulary, labels)
    cut = _Cut(vocabulary, _chunk(x.shape[0], vocabulary), int(axis), float(softcap) or None)
    loss = _loss(x, weight, None, labels, cut)
    return loss + jnp.where(
        (labels >= 0) & (labels < vocabulary), 0, jnp.nan
    )  # whose gradient is of the rest of the sum


# GPUs write and read f32 logits in more time than it takes to compute them twice; TPUs the other way round (by kpx's model
# of a compiled step), so that there memory alone is the reason.
for _platform, _least in (("cuda", 1 << 28), ("rocm", 1 << 28), ("tpu", 1 << 31)):
    linear_cross_entropy_kernel.on(_platform, supports=_supports, prefers=functools.partial(_large, _least))(chunked)
