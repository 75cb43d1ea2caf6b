"""A mixture of experts with its routing (Switch Transformers, arXiv 2101.03961; MegaBlocks, arXiv 2211.15841).

No expert has a capacity and no row is dropped: rows are sorted by their experts, and each is multiplied once with each of its
experts' matrices, by the grouped product's kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels import mixture_split
from kpx.kernels.grouped_matmul import grouped_matmul
from kpx.kernels.linear import ACTIVATIONS


def mixture_of_experts(x, logits, gate, up, down, *, top_k: int, activation: str = "silu", normalized: bool = True):
    """Each row by the gated layers of its `top_k` experts, weighed: the sum of `w * (activation(x @ gate) * (x @ up)) @ down`.

    Args:
        x: `[..., size]`, floating.
        logits: `[..., experts]`, the router's. Weights are their softmax, in f32 (f64 for f64).
        gate, up: `[experts, size, width]`, and `down`: `[experts, width, size]`, of the dtype of `x`.
        top_k: how many experts each row has: those with the largest logits, the first of equal ones.
        activation: see `linear`.
        normalized: whether the weights of a row's experts are divided by their sum.

    Returns:
        `[..., size]`, of the dtype of `x`.

    Raises:
        InputError: shapes or dtypes do not go together, or there are fewer experts than `top_k`.
    """
    _check(x, logits, (gate, up, down), top_k, activation)
    options = {"top_k": top_k, "activation": activation, "normalized": normalized}
    spread = mixture_split.around(x)
    if spread == mixture_split.PLANNED:
        return mixture_split.planned(x, logits, gate, up, down, top_k=top_k)
    if isinstance(spread, mixture_split.Spread):
        return mixture_split.split(_mixed, spread, x, logits, gate, up, down, **options)
    return _mixed(x, logits, gate, up, down, **options)


def _mixed(x, logits, gate, up, down, *, top_k, activation, normalized, parts=1, axis=None):
    """See `mixture_of_experts`; with an axis, of the rows and the experts of one of so many devices along it."""
    rows, experts = x.reshape(-1, x.shape[-1]), logits.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.reshape(-1, experts).astype(wide)), top_k)
    if normalized:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    routed = rows[order // top_k]

    def by_experts(routed, sizes):
        inner = ACTIVATIONS[activation](grouped_matmul(routed, gate, sizes).astype(wide))
        inner = (inner * grouped_matmul(routed, up, sizes)).astype(x.dtype)
        return grouped_matmul(inner, down, sizes)

    if axis is None:
        sizes = jnp.sum(jax.nn.one_hot(chosen.reshape(-1), experts, dtype=jnp.int32), 0, dtype=jnp.int32)
        found = by_experts(routed, sizes)
    else:
        found = mixture_split.exchanged(routed, chosen.reshape(-1)[order], experts, parts, axis, by_experts)
    back = found[jnp.argsort(order)].reshape(-1, top_k, x.shape[-1])  # as it was before it was sorted
    return jnp.sum(back * weights[..., None], 1).astype(x.dtype).reshape(x.shape)


def _check(x, logits, matrices, top_k: int, activation: str) -> None:
    gate, up, down = matrices
    shapes = (
        f"rows {list(x.shape)}, logits {list(logits.shape)}, matrices {', '.join(str(list(a.shape)) for a in matrices)}"
    )
    fits = all(a.ndim == 3 for a in matrices) and x.ndim > 0 and logits.ndim > 0 and gate.shape == up.shape
    if (
        not fits
        or down.shape != (gate.shape[0], gate.shape[2], gate.shape[1])
        or gate.shape[1] != x.shape[-1]
        or (logits.shape != (*x.shape[:-1], gate.shape[0]))
    ):
        raise InputError(
            f"mixture_of_experts was given {shapes}. They are `[..., size]`, `[..., experts]`, twice `[experts, size, width]`, "
            "and `[experts, width, size]`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or any(a.dtype != x.dtype for a in matrices):
        given = ", ".join(str(a.dtype) for a in matrices)
        raise InputError(
            f"mixture_of_experts was given rows of {x.dtype} and matrices of {given}. All are one floating dtype."
        )
    if not 1 <= top_k <= logits.shape[-1]:
        raise InputError(
            f"mixture_of_experts was given {logits.shape[-1]} experts and top_k={top_k}. It is from 1 to their number."
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"mixture_of_experts was given activation={activation!r}. There are {', '.join(ACTIVATIONS)}.")
