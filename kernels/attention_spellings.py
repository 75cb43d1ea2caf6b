"""What attention is recognised by: the ways in which models write it out, in JAX and in PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.attention import attention, attention_kernel
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


# Of each inner tuple, one skeleton.
_MASKED: dict[str, tuple[tuple[Callable, ...], ...]] = {
    "full": ((lambda scores, low: scores,),),
    "causal": (
        (
            lambda scores, low: jnp.where(_visible(scores), scores, jnp.asarray(low, scores.dtype)),
            lambda scores, low: jnp.where(
                np.tri(*scores.shape[-2:], dtype=bool), scores, jnp.asarray(low, scores.dtype)
            ),
        ),
        (lambda scores, low: scores + jnp.where(_visible(scores), 0, jnp.asarray(low, scores.dtype)),),
    ),
}


def _by_hand(scores, axis):
    powers = jnp.exp(scores - jnp.max(scores, axis, keepdims=True))
    return powers / jnp.sum(powers, axis, keepdims=True)


def _by_hand_stopped(scores, axis):
    powers = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis, keepdims=True)))
    return powers / jnp.sum(powers, axis, keepdims=True)


# Alike as they are, and told apart by their gradients.
_LIBRARYS: tuple[Callable, ...] = (jax.nn.softmax,)
_HANDMADE: tuple[Callable, ...] = (_by_hand, _by_hand_stopped)

# Where scores are widened for the softmax: never, before they are masked, or after.
_WIDENED = ("never", "before", "after")


def _wide(array):
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _spelling(layout: str, scaled: Callable, masked: Callable, widened: str, softmax: Callable) -> Callable:
    dot, combine = _LAYOUTS[layout]

    def search(q, k, v, **given):
        scores = scaled(q, k, dot, given.get("scale"))
        scores = masked(_wide(scores) if widened == "before" else scores, given.get("low"))
        weights = softmax(_wide(scores) if widened == "after" else scores, -1)
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


def _groups(layout: str, scale: str, mask: str, softmaxes: tuple[Callable, ...]) -> list[tuple[Callable, ...]]:
    return [
        tuple(
            _spelling(layout, scaled, masked, widened, softmax)
            for masked, widened in itertools.product(alike, _WIDENED)
        )
        for scaled, alike, softmax in itertools.product(_SCALED[scale], _MASKED[mask], softmaxes)
    ]


def _register(scale: str, mask: str) -> None:
    numbers = {} if scale == "unscaled" else {"scale": 4.0 if scale == "divided" else 0.25}
    numbers |= {"low": -np.inf} if mask == "causal" else {}
    for layout in _LAYOUTS:
        shape = (2, 4, 8, 16) if layout == "heads_first" else (2, 8, 4, 16)
        builtin(
            f"attention.{mask}.{scale}.{layout}",
            _groups(layout, scale, mask, _LIBRARYS),
            _replacement(layout, scale, mask),
            [(shape, jnp.bfloat16)] * 3,
            _supports,
            fixed_ranks=True,
            among=("exponential",),
            differentiated=_groups(layout, scale, mask, _HANDMADE),
            parallel=("bh..",) * 4 if layout == "heads_first" else ("b.h.",) * 4,
            **numbers,
        )


for _scale, _mask in itertools.product(_SCALED, _MASKED):
    _register(_scale, _mask)


def _library(causal: bool) -> Callable:
    return lambda q, k, v, *, scale: jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="xla"
    )


for _causal in (False, True):
    builtin(
        f"attention.{'causal' if _causal else 'full'}.jax_nn",
        [_library(_causal)],
        _replacement("heads_third", "multiplied", "causal" if _causal else "full"),
        [((2, 8, 4, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16)],
        _supports,
        fixed_ranks=True,
        among=("exponential",),
        parallel=("b.h.",) * 4,
        scale=0.25,
    )


# Written out, with a mask that is added: what transformers calls eager attention, capped or not.


def _eager(scaled: Callable, capped: bool, widened: str, softmax: Callable) -> Callable:
    dot, combine = _LAYOUTS["heads_first"]

    def search(q, k, v, mask, *, scale, softcap=None):
        scores = scaled(q, k, dot, scale)
        if capped:
            scores = jnp.tanh(scores / softcap) * softcap
        scores = (_wide(scores) if widened == "before" else scores) + mask
        weights = softmax(_wide(scores) if widened == "after" else scores, -1)
        return combine(weights.astype(q.dtype), v)

    return search


def _eager_kernel(scaled: str) -> Callable:
    def replace(q, k, v, mask, *, scale, softcap=0.0, visible=""):
        factor = 1 / scale if scaled == "divided" else scale
        further = {"softcap": softcap} if softcap else {}
        return attention_kernel(q, k, v, mask, scale=factor, causal=False, visible=visible, **further)

    return replace


for _scale, _capped in itertools.product(("multiplied", "divided"), (False, True)):
    builtin(
        f"attention.added{'_capped' if _capped else ''}.{_scale}",
        [
            tuple(_eager(scaled, _capped, widened, jax.nn.softmax) for widened in _WIDENED)
            for scaled in _SCALED[_scale][:1]
        ],
        _eager_kernel(_scale),
        [*[((2, 4, 8, 16), jnp.bfloat16)] * 3, ((2, 1, 8, 8), jnp.bfloat16)],
        fixed_ranks=True,
        among=("exponential",),
        constant=(3,),
        mask=3,
        parallel=("bh..",) * 5,
        **({"scale": 0.25} if _scale == "multiplied" else {"scale": 4.0}),
        **({"softcap": 20.0} if _capped else {}),
    )


# The composite's own decomposition, which it becomes when it is differentiated.

_GROUPED = [((2, 4, 8, 16), jnp.bfloat16), ((2, 2, 8, 16), jnp.bfloat16), ((2, 2, 8, 16), jnp.bfloat16)]


def _kpxs(function: Callable, causal: bool, by_batch: bool) -> Callable:
    def called(q, k, v, *mask, scale=1.0, **known):
        masks = [a[:, None, None] for a in mask] if by_batch else mask
        return function(q, k, v, *masks, scale=scale, causal=causal, **known)

    return called


for (_name, _causal, _by_batch, _masks), _numbers in itertools.product(
    (
        ("full", False, False, []),
        ("causal", True, False, []),
        ("masked", False, False, [((2, 1, 8, 8), jnp.bool_)]),
        ("masked_by_batch", False, True, [((2, 8), jnp.bool_)]),
        ("biased", False, False, [((2, 1, 8, 8), jnp.bfloat16)]),
        ("biased_by_batch", False, True, [((2, 8), jnp.bfloat16)]),
    ),
    ({"scale": 0.25}, {}),  # a scale of 1 is no op
):
    builtin(
        f"attention.{_name}.kpx{'' if _numbers else '.unscaled'}",
        [_kpxs(attention_kernel.decomposition, _causal, _by_batch)],
        _kpxs(attention_kernel, _causal, _by_batch),
        [*_GROUPED, *_masks],
        fixed_ranks=True,
        among=("exponential",),
        constant=(3,) if _masks else (),
        mask=3 if _masks and not _by_batch else None,
        parallel=("bh..",) * 3 + (("b." if _by_batch else "bh..",) if _masks else ()) + ("bh..",),
        alike=f"attention.{_name.removesuffix('_by_batch')}.kpx.{len(_numbers)}",
        **_numbers,
    )
