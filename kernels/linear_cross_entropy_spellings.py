"""What a language model's loss is recognised by: its last layer, and the softmax cross-entropy of the logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kpx.kernels.linear_cross_entropy import linear_cross_entropy_kernel
from kpx.kernels.patterns import builtin

_SIZE, _VOCABULARY = 16, 40

# By the weights' axis that is the vocabulary's: PyTorch's Linear has it first, Flax's Dense last.
_PRODUCTS: dict[int, Callable] = {
    0: lambda x, w, wide: jnp.einsum("...d,vd->...v", x, w, preferred_element_type=wide),
    1: lambda x, w, wide: jnp.einsum("...d,dv->...v", x, w, preferred_element_type=wide),
}


def _logits(axis: int, widened: str, flat: bool, capped: bool) -> Callable:
    """Widened to f32 by the product, right after it, or after the cap; and made rows after it, or before."""

    def logits(x, w, softcap):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = _PRODUCTS[axis](x, w, wide if widened == "by the product" else x.dtype)
        y = y.astype(wide) if widened == "after the product" else y
        y = jnp.tanh(y / softcap) * softcap if capped else y
        y = y.astype(wide) if widened == "after the cap" else y
        return y.reshape(-1, y.shape[-1]) if flat else y

    return logits


def _own(values, labels):
    return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]


def _log_softmax(logits, labels):
    """`jax.nn.log_softmax` and a gather: PyTorch's cross-entropy, less what it ignores. Results are `[..., 1]`."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits, -1), labels[..., None], -1)


def _log_softmax_of_one_hot(logits, labels):
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.sum(one_hot * jax.nn.log_softmax(logits, -1), -1)


def _optax(logits, labels):
    """As optax.softmax_cross_entropy_with_integer_labels until 2025."""
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    own = _own(logits, labels)
    return jnp.log(jnp.sum(jnp.exp(logits), -1)) - own


def _logsumexp(logits, labels):
    return jax.nn.logsumexp(logits, -1) - _own(logits, labels)


def _logsumexp_taken(logits, labels):
    """As optax.softmax_cross_entropy_with_integer_labels of 2025."""
    own = jnp.take_along_axis(logits, labels[..., None], -1).take(0, axis=-1)
    return jax.nn.logsumexp(logits, -1) - own


# Each with the sign of the loss in it, and spelled in further ways that its gradient alone tells apart.
_LOSSES: dict[str, tuple[Callable, int, list[Callable]]] = {
    "log_softmax": (_log_softmax, -1, []),
    "one_hot": (_log_softmax_of_one_hot, -1, []),
    "optax": (_optax, 1, []),
    "logsumexp": (_logsumexp, 1, [_logsumexp_taken]),
}


def _spelling(loss: Callable, logits: Callable, flat: bool) -> Callable:
    def search(x, w, labels, *, softcap=None):
        return loss(logits(x, w, softcap), labels.reshape(-1) if flat else labels)

    return search


def _replacement(axis: int, sign: int, name: str, is_flat: bool) -> Callable:
    def replace(x, w, labels, *, softcap=0.0):
        rows, flat = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
        loss = linear_cross_entropy_kernel(rows, w, flat, axis=axis, softcap=softcap)
        if sign < 0:  # the gradient is none where there is no label; and a one-hot array of such is all zeros
            least, nothing = (0, 0) if name == "one_hot" else (-w.shape[axis], jnp.nan)
            loss = jnp.where((flat >= least) & (flat < w.shape[axis]), loss, nothing)
        loss = loss.astype(jnp.promote_types(x.dtype, jnp.float32))
        kept = (1,) if name == "log_softmax" else ()
        return (loss if sign > 0 else -loss).reshape(*(flat.shape if is_flat else labels.shape), *kept)

    return replace


# Shapes of rows and labels, and letters of theirs and of the loss: rows; tokens of a batch; tokens that are made rows after
# the product, with labels that are rows, and with labels that are made rows too.
_FORMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, str, str]] = {
    "rows": ((6, _SIZE), (6,), "r.", "r", "r"),
    "tokens": ((2, 3, _SIZE), (2, 3), "bt.", "bt", "bt"),
    "flat": ((2, 3, _SIZE), (6,), "b..", "b", "b"),
    "flattened": ((2, 3, _SIZE), (2, 3), "b..", "b.", "b"),
}

for (_name, (_loss, _sign, _further)), _axis, _capped, _form in itertools.product(
    _LOSSES.items(), _PRODUCTS, (False, True), _FORMS
):
    _rows, _labels, _of_rows, _of_labels, _of_loss = _FORMS[_form]
    _flat = _form.startswith("flat")
    _widened = ("by the product", "after the product", *(["after the cap"] if _capped else []))
    _wanted = [_logits(_axis, _where, _flat, _capped) for _where in _widened]
    builtin(
        f"linear_cross_entropy.{_name}.{_axis}.{_form}{'.capped' if _capped else ''}",
        [tuple(_spelling(_loss, logits, _flat) for logits in _wanted)],
        _replacement(_axis, _sign, _name, _flat),
        [
            (_rows, jnp.bfloat16),
            ((_VOCABULARY, _SIZE) if _axis == 0 else (_SIZE, _VOCABULARY), jnp.bfloat16),
            (_labels, jnp.int32),
        ],
        differentiated=[tuple(_spelling(other, logits, _flat) for logits in _wanted) for other in _further],
        fixed_ranks=True,
        among=("log",),
        constant=(2,),
        alike=f"linear_cross_entropy.{_name}.{_axis}.{_capped}",
        parallel=(_of_rows, "**", _of_labels, _of_loss + "." * (_name == "log_softmax")),
        **({"softcap": 30.0} if _capped else {}),
    )
