"""What attention is recognised by: the ways in which models write it out, in JAX and in PyTorch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.attention import attention_kernel
from kpx.kernels.patterns import builtin
from kpx.kernels.visible import shown

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
    "full": ((lambda scores, low, mask: scores,),),
    "causal": (
        (
            lambda scores, low, mask: jnp.where(_visible(scores), scores, jnp.asarray(low, scores.dtype)),
            lambda scores, low, mask: jnp.where(
                np.tri(*scores.shape[-2:], dtype=bool), scores, jnp.asarray(low, scores.dtype)
            ),
        ),
        (lambda scores, low, mask: scores + jnp.where(_visible(scores), 0, jnp.asarray(low, scores.dtype)),),
    ),
    "hidden": ((lambda scores, low, mask: jnp.where(mask, scores, jnp.asarray(low, scores.dtype)),),),
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


def _spelling(
    layout: str, scaled: Callable, masked: Callable, widened: str, softmax: Callable, by_batch: bool
) -> Callable:
    dot, combine = _LAYOUTS[layout]

    def search(q, k, v, *mask, **given):
        hidden = _for_all(mask[0], by_batch) if mask else None
        scores = scaled(q, k, dot, given.get("scale"))
        scores = masked(_wide(scores) if widened == "before" else scores, given.get("low"), hidden)
        weights = softmax(_wide(scores) if widened == "after" else scores, -1)
        return combine(weights.astype(q.dtype), v)

    return search


def _known(visible: str) -> dict[str, str]:
    """The attribute of a mask that is known."""
    return {"visible": visible} if visible else {}


def _for_all(mask, by_batch: bool):
    """A mask with four dimensions, of one with two: a batch's keys, or positions alone."""
    return mask[:, None, None] if by_batch else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def _as_written(out, mask, low: float, visible: str):
    """Attention's result as a softmax that is written out has it: NaN, not zeros, where every score of a row is -inf.

    Args:
        out: `[batch, heads, length, size]`, of the kernel.
        mask: of bools, or added.
        low: the score of what bools hide; a finite one hides nothing from a softmax.
        visible: what is known of the mask (see `visible.describe`).
    """
    if mask.dtype == bool and low > -np.inf:
        return out
    if visible and shown(visible, (out.shape[-2], mask.shape[-1])).any(-1).all():
        return out
    seen = jnp.any(mask if mask.dtype == bool else mask > -np.inf, -1, keepdims=True)
    # A product: the gradient is NaN where the one that is written out is.
    return out * jnp.where(seen, np.asarray(1, out.dtype), np.asarray(np.nan, out.dtype))


def _replacement(layout: str, scaled: str, masked: str, by_batch: bool = False) -> Callable:
    def replace(q, k, v, *mask, scale=1.0, low=-np.inf, visible=""):
        arrays = [jnp.swapaxes(a, 1, 2) for a in (q, k, v)] if layout == "heads_third" else [q, k, v]
        factor = 1 / scale if scaled == "divided" else scale
        further = _known(visible) | ({"low": low} if mask and mask[0].dtype == bool else {})
        masks = [_for_all(a, by_batch) for a in mask]
        out = attention_kernel(*arrays, *masks, scale=factor, causal=masked == "causal", **further)
        out = _as_written(out, masks[0], low, visible) if masks else out
        return jnp.swapaxes(out, 1, 2) if layout == "heads_third" else out

    return replace


def _supports(q, k, v, *mask, scale: float = 1.0, low: float = -np.inf) -> str | None:
    return None if low < -1e4 else f"what is hidden gets {low:g}, which is not out of sight"


def _groups(
    layout: str, scale: str, mask: str, softmaxes: tuple[Callable, ...], by_batch: bool
) -> list[tuple[Callable, ...]]:
    return [
        tuple(
            _spelling(layout, scaled, masked, widened, softmax, by_batch)
            for masked, widened in itertools.product(alike, _WIDENED)
        )
        for scaled, alike, softmax in itertools.product(_SCALED[scale], _MASKED[mask], softmaxes)
    ]


def _example(dtype: Any, by_batch: bool) -> list[tuple[tuple[int, ...], Any]]:
    return [((2, 8) if by_batch else (2, 1, 8, 8), dtype)]


def _register(scale: str, mask: str, by_batch: bool) -> None:
    numbers = {} if scale == "unscaled" else {"scale": 4.0 if scale == "divided" else 0.25}
    numbers |= {} if mask == "full" else {"low": -np.inf}
    hidden = mask == "hidden"
    for layout in _LAYOUTS:
        shape = (2, 4, 8, 16) if layout == "heads_first" else (2, 8, 4, 16)
        letters = "bhs." if layout == "heads_first" else "bsh."
        builtin(
            f"attention.{mask}{'_by_batch' if by_batch else ''}.{scale}.{layout}",
            _groups(layout, scale, mask, _LIBRARYS, by_batch),
            _replacement(layout, scale, mask, by_batch),
            [*[(shape, jnp.bfloat16)] * 3, *(_example(jnp.bool_, by_batch) if hidden else [])],
            _supports,
            fixed_ranks=True,
            among=("exponential",),
            shared=(1, 2),
            differentiated=_groups(layout, scale, mask, _HANDMADE, by_batch),
            constant=(3,) if hidden else (),
            mask=3 if hidden and not by_batch else None,
            parallel=(*[letters] * 3, *([_letters(by_batch)] if hidden else []), letters),
            alike=f"attention.hidden.{scale}.{layout}" if hidden else "",
            **numbers,
        )


def _letters(by_batch: bool) -> str:
    return "b." if by_batch else "bh.."


for _scale, (_mask, _by_batch) in itertools.product(
    _SCALED, [("full", False), ("causal", False), ("hidden", False), ("hidden", True)]
):
    _register(_scale, _mask, _by_batch)


_NN = [((2, 8, 4, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16), ((2, 8, 2, 16), jnp.bfloat16)]
_NN_LOW = -0.7 * float(np.finfo(np.float32).max)  # the score of what JAX's own hides


def _library(kind: str, by_batch: bool) -> Callable:
    def search(q, k, v, *array, scale):
        given = {"masked": "mask", "biased": "bias"}.get(kind)
        further = {given: _for_all(array[0], by_batch)} if given else {}
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=kind == "causal", implementation="xla", **further
        )

    return search


for (_kind, _mask), _by_batch in itertools.product(
    {"full": None, "causal": None, "masked": jnp.bool_, "biased": jnp.bfloat16}.items(), (False, True)
):
    if _by_batch and _mask is None:
        continue
    builtin(
        f"attention.{_kind}{'_by_batch' if _by_batch else ''}.jax_nn",
        [_library(_kind, _by_batch)],
        functools.partial(
            _replacement("heads_third", "multiplied", "causal" if _kind == "causal" else "full", _by_batch), low=_NN_LOW
        ),
        [*_NN, *(_example(_mask, _by_batch) if _mask else [])],
        fixed_ranks=True,
        among=("exponential",),
        shared=(1, 2),
        constant=(3,) if _mask else (),
        mask=3 if _mask and not _by_batch else None,
        parallel=("bsh.",) * 3 + ((_letters(_by_batch),) if _mask else ()) + ("bsh.",),
        alike=f"attention.{_kind}.jax_nn",
        scale=0.25,
    )


# Written out, with a mask that is added: what transformers calls eager attention, capped or not.


def _eager(scaled: Callable, capped: bool, widened: str, softmax: Callable) -> Callable:
    dot, combine = _LAYOUTS["heads_first"]

    def search(q, k, v, mask, *, scale=1.0, softcap=None):
        scores = scaled(q, k, dot, scale)
        if capped:
            scores = jnp.tanh(scores / softcap) * softcap
        scores = (_wide(scores) if widened == "before" else scores) + mask
        weights = softmax(_wide(scores) if widened == "after" else scores, -1)
        return combine(weights.astype(q.dtype), v)

    return search


def _eager_kernel(scaled: str) -> Callable:
    def replace(q, k, v, mask, *, scale=1.0, softcap=0.0, visible=""):
        factor = 1 / scale if scaled == "divided" else scale
        further = _known(visible) | ({"softcap": softcap} if softcap else {})
        out = attention_kernel(q, k, v, mask, scale=factor, causal=False, **further)
        return _as_written(out, mask, -np.inf, visible)

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
        shared=(1, 2),
        constant=(3,),
        mask=3,
        parallel=("bh..",) * 5,
        **({"scale": 0.25} if _scale == "multiplied" else {"scale": 4.0}),
        **({"softcap": 20.0} if _capped else {}),
    )


# With a sink for each head (gpt-oss): one more score, whose weight is dropped.


def _with_sinks(widened: str, lowered: bool) -> Callable:
    dot, combine = _LAYOUTS["heads_first"]

    def search(q, k, v, sinks, *mask, scale):
        scores = dot(q, k) * scale
        for added in mask:
            scores = (_wide(scores) if widened == "before" else scores) + added
        sink = jnp.broadcast_to(sinks.reshape(1, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink.astype(scores.dtype)], -1)
        if lowered:
            scores = scores - jnp.max(scores, -1, keepdims=True)
        weights = jax.nn.softmax(_wide(scores) if widened == "after" else scores, -1)[..., :-1]
        return combine(weights.astype(q.dtype), v)

    return search


def _sinks_kernel(q, k, v, sinks, *mask, scale, visible=""):
    given = "sinks mask" if mask else "sinks"
    return attention_kernel(q, k, v, sinks, *mask, scale=scale, causal=False, given=given, **_known(visible))


for _added in (False, True):
    builtin(
        f"attention.sinks{'_added' if _added else ''}",
        [tuple(_with_sinks(widened, lowered) for widened in _WIDENED) for lowered in (True, False)],
        _sinks_kernel,
        [
            *[((2, 4, 8, 16), jnp.bfloat16)] * 3,
            ((4,), jnp.bfloat16),
            *(_example(jnp.bfloat16, False) if _added else []),
        ],
        fixed_ranks=True,
        among=("exponential",),
        shared=(1, 2),
        constant=(4,) if _added else (),
        mask=4 if _added else None,
        scale=0.25,
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
        shared=(1, 2),
        constant=(3,) if _masks else (),
        mask=3 if _masks and not _by_batch else None,
        parallel=("bhs.",) * 3 + (("b." if _by_batch else "bh..",) if _masks else ()) + ("bhs.",),
        alike=f"attention.{_name.removesuffix('_by_batch')}.kpx.{len(_numbers)}",
        **_numbers,
    )


# A bias that is learned: its gradient is wanted too, and is a sum over what it is repeated for.


def _is_repeated(q, k, v, bias, *, scale: float = 1.0) -> str | None:
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return None if 2 * np.prod(bias.shape) <= scores else "the gradient by the bias is as large as the scores"


for _numbers in ({"scale": 0.25}, {}):
    builtin(
        f"attention.learned_bias.kpx{'' if _numbers else '.unscaled'}",
        [_kpxs(attention_kernel.decomposition, False, False)],
        _kpxs(attention_kernel, False, False),
        [*_GROUPED, ((1, 4, 8, 8), jnp.bfloat16)],
        _is_repeated,
        fixed_ranks=True,
        among=("exponential",),
        shared=(1, 2),
        with_gradient_alone=True,
        **_numbers,
    )
for _scale in ("multiplied", "divided", "unscaled"):
    builtin(
        f"attention.learned_bias.{_scale}",
        [
            tuple(_eager(scaled, False, widened, jax.nn.softmax) for widened in _WIDENED)
            for scaled in _SCALED[_scale][:1]
        ],
        _eager_kernel(_scale),
        [*[((2, 4, 8, 16), jnp.bfloat16)] * 3, ((1, 4, 8, 8), jnp.bfloat16)],
        _is_repeated,
        fixed_ranks=True,
        among=("exponential",),
        shared=(1, 2),
        with_gradient_alone=True,
        **({"scale": 0.25} if _scale == "multiplied" else {"scale": 4.0} if _scale == "divided" else {}),
    )
