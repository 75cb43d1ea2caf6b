"""What layer and RMS normalization are recognised by in training steps: the ways in which models write them out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.norm import LARGEST, carried_kernel, fused_norm_kernel, norm_kernel, shifted
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


def _layer_by_shifted_var(x):
    """PyTorch's `x.var`, as its rule lowers it."""
    x = _wide(x)
    deviations = shifted(x, (x.ndim - 1,))
    deviations = deviations - jnp.mean(deviations, -1, keepdims=True)
    total = jnp.sum(jnp.square(jnp.abs(deviations)), -1, keepdims=True)
    return x - jnp.mean(x, -1, keepdims=True), total / np.asarray(x.shape[-1], x.dtype)


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
            *(_spelling(_layer_by_shifted_var, *end) for end in _ENDS[:2]),
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


# With what comes before and after, forward -----------------------------------------------------------


def _filled(table, index):
    return table.at[index].get(mode="fill", wrap_negative_indices=False)


def _before(given: str, x, rest: list, reading: Callable):
    """What is normalized: `x`, a sum, or a table's rows."""
    if "residual" in given:
        return x + rest.pop(0)
    if "index" in given:
        return reading(x, rest.pop(0))
    return x


def _quantized_by_row(bounded: bool, out: str):
    largest = LARGEST[out]

    def quantize(y, rest):
        y = _wide(y)
        scale = jnp.max(jnp.abs(y), -1, keepdims=True) / np.asarray(largest, y.dtype)
        return _narrowed(y / scale, out, bounded), scale

    return quantize


def _quantized_by(divided: Callable, out: str):
    def quantize(y, rest):
        return (_narrowed(divided(_wide(y), rest.pop(0)), out, True),)

    return quantize


def _narrowed(y, out: str, bounded: bool):
    bound = np.asarray(LARGEST[out], y.dtype)
    y = jnp.round(y) if out == "int8" else y
    return (jnp.clip(y, -bound, bound) if bounded else y).astype(out)


def _kept(y, rest):
    return (y,)


def _around(spelling: Callable, given: str, after: Callable, total: bool, rounded: bool, fill: bool):
    affine = [name for name in given.split() if name in ("weight", "bias")]

    def search(x, *arrays, eps):
        rest = list(arrays)
        x = _before(given, x, rest, _filled if fill else lambda table, index: table[index])
        y = spelling(x if rounded else _wide(x), *(rest.pop(0) for _ in affine), eps=eps)
        return _one_or_all((*after(y, rest), *([x] if total else [])))

    return search


def _one_or_all(results: tuple):
    first, *rest = results
    return results if rest else first


def _fused(x, *arrays, centred: bool, given: str, out: str, total: bool, fill: bool, eps):
    places = given.split()
    arrays = [a.reshape(-1) if n in ("weight", "bias") else a for n, a in zip(places, arrays, strict=True)]
    made = fused_norm_kernel(x, *arrays, eps=eps, centred=centred, given=given, out=out, total=total, fill=fill)
    return _one_or_all(made)


def _supports_fused(x, *arrays, given: str, eps) -> str | None:
    named = dict(zip(given.split(), arrays, strict=True))
    if any(math.prod(named[n].shape) != x.shape[-1] for n in ("weight", "bias") if n in named):
        return f"weights are not one for each of {x.shape[-1]}"
    if "residual" in named and named["residual"].shape != x.shape:
        return f"a residual of {named['residual'].shape} is not like {x.shape}"
    if "index" in named and x.ndim != 2:
        return f"rows of a table are taken, not of {x.shape}"
    if "scale" in named and math.prod(named["scale"].shape) != 1:
        return f"a scale of {named['scale'].shape} is not one number"
    return None


_OUT = {"int8": "i8", "float8_e4m3fn": "f8E4M3FN"}
_ROWS, _TABLE = ((6, 32), jnp.bfloat16), ((50, 32), jnp.bfloat16)
_EXAMPLES = {"residual": _ROWS, "index": ((6,), jnp.int32), "weight": ((32,), jnp.bfloat16), "bias": ((32,), jnp.bfloat16),
             "scale": ((), jnp.float32)}  # fmt: skip


def _register(
    name: str,
    norm: str,
    affine: str,
    before: str,
    after: str,
    ways: list[Callable],
    out: str,
    total: bool,
    fill: bool = False,
    **more,
):
    given = " ".join(w for w in (before, affine, after) if w)
    spelled = _SPELLINGS[norm][0]
    builtin(
        f"{name}.{norm}.{affine.replace(' ', '_')}",
        [
            tuple(_around(s, given, way, total, rounded, fill) for rounded in (True, False)[: 2 if out else 1])
            for s in spelled
            for way in ways
        ],
        functools.partial(_fused, centred=norm == "layer_norm", given=given, out=out, total=total, fill=fill),
        [_TABLE if before == "index" else _ROWS, *(_EXAMPLES[n] for n in given.split())],
        functools.partial(_supports_fused, given=given),
        among=("rsqrt", "sqrt"),
        inference_alone=True,  # what they join is used in backward passes too
        eps=1e-6,
        **more,
    )


for _name, _affine in (("rms_norm", "weight"), ("layer_norm", "weight"), ("layer_norm", "weight bias")):
    # On NVIDIA's GPUs XLA adds what flows around a norm as well: 0.7% of the bytes of a Llama, where AMD's are 5%.
    _register("add_norm", _name, _affine, "residual", "", [_kept], "", True, platforms=("rocm",))
    _register("embed_norm", _name, _affine, "index", "", [_kept], "", True)
    _register("embed_norm.filled", _name, _affine, "index", "", [_kept], "", True, fill=True)
    for _out, _type in _OUT.items():
        for _residual in ("residual", ""):  # where both are found, the larger
            _label, _total = f"{'add_' if _residual else ''}norm_{_type}", bool(_residual)
            _by_row = [_quantized_by_row(bounded, _out) for bounded in (False, True)]
            _register(f"{_label}_by_row", _name, _affine, _residual, "", _by_row, _out, _total, types=(_type,))
            _by_one = [_quantized_by(divided, _out) for divided in (lambda y, s: y / s,)]
            _register(f"{_label}", _name, _affine, _residual, "scale", _by_one, _out, _total, types=(_type,))
