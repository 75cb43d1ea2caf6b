"""What layer and RMS normalization are recognised by in training steps: the ways in which models write them out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kpx.kernels.norm import carried_kernel, norm_kernel
from kpx.kernels.patterns import builtin


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _by_rsqrt(x, mean_square, eps):
    return x * jax.lax.rsqrt(mean_square + eps)


def _by_sqrt(x, mean_square, eps):
    return x / jnp.sqrt(mean_square + eps)


# What is done with a weight and a bias: in f32, rounded before either, or joined with the scale first (Flax).


def _in_f32(x, centred, mean_square, scaled, eps, w, b):
    y = scaled(centred, mean_square, eps) * _wide(w)
    return (y if b is None else y + _wide(b)).astype(x.dtype)


def _rounded_first(x, centred, mean_square, scaled, eps, w, b):
    y = scaled(centred, mean_square, eps).astype(x.dtype) * w
    return y if b is None else y + b


def _joined(x, centred, mean_square, scaled, eps, w, b):
    y = centred * (jax.lax.rsqrt(mean_square + eps) * _wide(w))
    return (y if b is None else y + _wide(b)).astype(x.dtype)


def _rms(square):
    def statistics(x):
        x = _wide(x)
        return x, jnp.mean(square(x), -1, keepdims=True)

    return statistics


def _layer(square):
    def statistics(x):
        x = _wide(x)
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred, jnp.mean(square(centred), -1, keepdims=True)

    return statistics


def _layer_by_var(x):
    x = _wide(x)
    return x - jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)


def _layer_by_squares(x):
    """Flax's fast variance."""
    x = _wide(x)
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(jnp.square(x), -1, keepdims=True) - jnp.square(mean))
    return x - mean, variance


def _spelling(statistics: Callable, end: Callable, scaled: Callable) -> Callable:
    def search(x, w, b=None, *, eps):
        return end(x, *statistics(x), scaled, eps, w, b)

    return search


def _supports(x, *parameters, eps) -> str | None:
    sizes = [math.prod(p.shape) for p in parameters]
    return None if {*sizes} == {x.shape[-1]} else f"weights of {sizes} are not one for each of {x.shape[-1]}"


def _replacement(kernel: Callable, centred: bool, affine: str) -> Callable:
    def replace(x, *parameters, eps):
        return kernel(x, *(p.reshape(-1) for p in parameters), eps=eps, centred=centred, affine=affine)

    return replace


# By name: spellings; and those that are alike forward, and told apart by their gradients.
_ENDS = (
    (_in_f32, _by_rsqrt),
    (_in_f32, _by_sqrt),
    (_rounded_first, _by_rsqrt),
    (_rounded_first, _by_sqrt),
    (_joined, _by_rsqrt),
)
_SPELLINGS: dict[str, tuple[list[Callable], list[Callable]]] = {
    "rms_norm": (
        [_spelling(_rms(jnp.square), *end) for end in _ENDS],
        [_spelling(_rms(lambda x: x * x), *end) for end in _ENDS],
    ),
    "layer_norm": (
        [
            *(_spelling(_layer(jnp.square), *end) for end in _ENDS),
            _spelling(_layer_by_squares, _joined, _by_rsqrt),
            *(_spelling(_layer_by_var, *end) for end in _ENDS[:2]),
        ],
        [_spelling(_layer(lambda x: x * x), *end) for end in _ENDS],
    ),
}

# On NVIDIA's GPUs XLA's fusions of a root mean square, with the sums around it, move no more memory than the kernels and
# those sums: by the bytes of a compiled step of Llama.
# Over a mesh rows are split; each device's gradients by weight and bias are parts of a sum.
for (_name, _affine), (_shape, _letters) in itertools.product(
    (("rms_norm", "w"), ("layer_norm", "w"), ("layer_norm", "wb")), (((6, 32), "r."), ((4, 6, 32), "bt."))
):
    _replaced = functools.partial(_replacement, centred=_name == "layer_norm", affine=_affine)
    _searches, _differentiated = _SPELLINGS[_name]
    builtin(
        f"{_name}.{_affine}.{len(_shape)}",
        _searches,
        _replaced(norm_kernel),
        [(_shape, jnp.bfloat16), *[((32,), jnp.bfloat16)] * len(_affine)],
        _supports,
        differentiated=[(search,) for search in _differentiated],
        stacked=tuple(range(1, len(_affine) + 1)),
        carries=_replaced(carried_kernel),
        with_gradient_alone=True,
        fixed_ranks=True,
        among=("rsqrt", "sqrt"),
        platforms=("cuda", "rocm", "cpu") if _name == "layer_norm" else ("rocm", "cpu"),
        alike=f"{_name}.{_affine}",
        parallel=(_letters, *["*"] * len(_affine), _letters),
        eps=1e-6,
    )
