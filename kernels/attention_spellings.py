"""What attention is recognised by: the ways in which models write it out, in JAX and in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.attention import attention
from kpx.kernels.patterns import builtin

# Products of queries and keys, and of weights and values, by the place of the heads.
_LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "heads_first": (
        lambda q, k: jnp.matmul(q, jnp.swapaxes(k, -1, -2)),
        jnp.matmul,
    ),
    "heads_third": (
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
        lambda p, v: jnp.einsum("bhqk,bkhd->bqhd", p, v),
    ),
}

_SCALED: dict[str, tuple[Callable, ...]] = {
    "multiplied": (
        lambda q, k, dot, scale: dot(q, k) * scale,
        lambda q, k, dot, scale: dot(q * scale, k),
        lambda q, k, dot, scale: dot(q, k * scale),
    ),
    "divided": (
        lambda q, k, dot, scale: dot(q, k) / scale,
        lambda q, k, dot, scale: dot(q / scale, k),
    ),
    "unscaled": (lambda q, k, dot, scale: dot(q, k),),
}


def _visible(scores):
    """Where a query's position is not before a key's."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
    return row >= column


_MASKED: dict[str, tuple[Callable, ...]] = {
    "full": (lambda scores, low: scores,),
    "causal": (
        lambda scores, low: jnp.where(_visible(scores), scores, jnp.asarray(low, scores.dtype)),
        lambda scores, low: jnp.where(np.tri(*scores.shape[-2:], dtype=bool), scores, jnp.asarray(low, scores.dtype)),
        lambda scores, low: scores + jnp.where(_visible(scores), 0, jnp.asarray(low, scores.dtype)),
    ),
}

# Where scores are widened for the softmax: never, before they are masked, or after.
_WIDENED = ("never", "before", "after")


def _wide(array):
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _spelling(layout: str, scaled: Callable, masked: Callable, widened: str) -> Callable:
    dot, combine = _LAYOUTS[layout]

    def search(q, k, v, **given):
        scores = scaled(q, k, dot, given.get("scale"))
        scores = masked(_wide(scores) if widened == "before" else scores, given.get("low"))
        weights = jax.nn.softmax(_wide(scores) if widened == "after" else scores, axis=-1)
        return combine(weights.astype(q.dtype), v)

    return search


def _replacement(layout: str, scaled: str, masked: str) -> Callable:
    def replace(q, k, v, *, scale=1.0, low=None):
        arrays = [jnp.swapaxes(a, 1, 2) for a in (q, k, v)] if layout == "heads_third" else [q, k, v]
        out = attention(*arrays, causal=masked == "causal", scale=1 / scale if scaled == "divided" else scale)
        return jnp.swapaxes(out, 1, 2) if layout == "heads_third" else out

    return replace


def _supports(q, k, v, *, scale: float = 1.0, low: float = -np.inf) -> str | None:
    return None if low < -1e4 else f"what is hidden gets {low:g}, which is not out of sight"


for _layout, _scale, _mask in itertools.product(_LAYOUTS, _SCALED, _MASKED):
    _shape = (2, 4, 8, 16) if _layout == "heads_first" else (2, 8, 4, 16)
    _numbers = {} if _scale == "unscaled" else {"scale": 4.0 if _scale == "divided" else 0.25}
    _numbers |= {"low": -np.inf} if _mask == "causal" else {}
    builtin(
        f"attention.{_mask}.{_scale}.{_layout}",
        [
            tuple(_spelling(_layout, _scaled, _masked, _widened) for _widened in _WIDENED)
            for _scaled, _masked in itertools.product(_SCALED[_scale], _MASKED[_mask])
        ],
        _replacement(_layout, _scale, _mask),
        [(_shape, jnp.bfloat16)] * 3,
        _supports,
        fixed_ranks=True,
        **_numbers,
    )


def _library(causal: bool) -> Callable:
    return lambda q, k, v, *, scale: jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="xla"
    )


for _causal in (False, True):
    builtin(
        f"attention.{'causal' if _causal else 'full'}.library",
        [_library(_causal)],
        _replacement("heads_third", "multiplied", "causal" if _causal else "full"),
        [((2, 8, 4, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16)],
        _supports,
        fixed_ranks=True,
        scale=0.25,
    )
