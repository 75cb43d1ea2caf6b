"""ATen's losses and labels whose values PyTorch checks, and those that its decompositions compute otherwise."""

from __future__ import annotations

import jax.numpy as jnp

from kpx.bridges.torch import checks
from kpx.bridges.torch.aten.common import sum_dtype
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import lowers

_MEAN, _SUM = 1, 2
_LEAST_LOG = -100.0  # of binary cross entropy, as PyTorch clamps it


def _reduced(loss, reduction):
    return jnp.mean(loss) if reduction == _MEAN else jnp.sum(loss) if reduction == _SUM else loss


@lowers(aten.one_hot.default)
def one_hot(labels, num_classes=-1):
    if num_classes < 0:
        raise NotImplementedError("without the number of classes, the result's shape depends on values")
    checks.holds(jnp.all(labels >= 0), "Class values must be non-negative.", "RuntimeError")
    checks.holds(jnp.all(labels < num_classes), "Class values must be smaller than num_classes.", "RuntimeError")
    return (labels[..., None] == jnp.arange(num_classes, dtype=labels.dtype)).astype(jnp.int64)


@lowers(aten.binary_cross_entropy.default)
def binary_cross_entropy(x, target, weight=None, reduction=_MEAN):
    message = "all elements of input should be between 0 and 1"
    checks.holds(jnp.all((x >= 0) & (x <= 1)), message, "RuntimeError")
    wide = x.astype(sum_dtype(x.dtype))
    target, least = target.astype(wide.dtype), jnp.asarray(_LEAST_LOG, wide.dtype)
    loss = (target - 1) * jnp.maximum(jnp.log1p(-wide), least) - target * jnp.maximum(jnp.log(wide), least)
    if weight is not None:
        loss = loss * weight.astype(wide.dtype)
    return _reduced(loss, reduction).astype(x.dtype)


@lowers(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(x, target, reduction):
    """A row's labels end at its first -1; what follows counts for nothing."""
    checks.in_range(target, -1, x.shape[-1] if x.ndim else 1, max(x.ndim - 1, 0))
    rows, labels = jnp.atleast_2d(x), jnp.atleast_2d(target)
    classes = rows.shape[-1]
    counts = jnp.cumsum(labels < 0, -1) == 0
    ours = counts[..., None] & (labels[..., None] == jnp.arange(classes))
    is_target = jnp.any(ours, -2)
    wide = rows.astype(sum_dtype(x.dtype))
    own = jnp.take_along_axis(wide, jnp.maximum(labels, 0), -1)
    margins = jnp.maximum(1 - own[..., :, None] + wide[..., None, :], 0)
    loss = jnp.sum(jnp.where(counts[..., None] & ~is_target[..., None, :], margins, 0), (-2, -1)) / classes
    loss = _reduced(loss if x.ndim > 1 else loss[0], reduction)
    return loss.astype(x.dtype), is_target.astype(x.dtype).reshape(target.shape)
