"""What linear layers with an epilogue, and gated ones, are recognised by: the ways in which models write them out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kpx.kernels.linear import gated_kernel, linear_kernel, product
from kpx.kernels.patterns import builtin


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _silu_by_powers(x):
    return x / (1 + jnp.exp(-x))


def _gelu_by_erf(x):
    half, one = np.asarray(0.5, x.dtype), np.asarray(1, x.dtype)
    return half * x * (one + jax.lax.erf(x * np.asarray(math.sqrt(0.5), x.dtype)))


def _gelu_tanh(cube: Callable):
    def gelu(x):
        inner = np.asarray(math.sqrt(2 / math.pi), x.dtype) * (x + np.asarray(0.044715, x.dtype) * cube(x))
        return np.asarray(0.5, x.dtype) * x * (np.asarray(1, x.dtype) + jnp.tanh(inner))

    return gelu


_ACTIVATIONS: dict[str, tuple[Callable, ...]] = {
    "relu": (lambda x: jnp.maximum(x, 0),),
    "silu": (jax.nn.silu, _silu_by_powers),
    "sigmoid": (jax.nn.sigmoid,),
    "gelu": (_gelu_by_erf, functools.partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": (
        _gelu_tanh(lambda x: x**3),
        _gelu_tanh(lambda x: x * x * x),
        functools.partial(jax.nn.gelu, approximate=True),
    ),
}


def _gelu_tanh_half_first(x):
    """The same from left to right: what flows back is summed in another order."""
    half = np.asarray(0.5, x.dtype) * x
    inner = np.asarray(math.sqrt(2 / math.pi), x.dtype) * (x + np.asarray(0.044715, x.dtype) * x**3)
    return half * (np.asarray(1, x.dtype) + jnp.tanh(inner))


# Those that only their gradients tell from others.
_DIFFERENTIATED: dict[str, tuple[Callable, ...]] = {"gelu_tanh": (_gelu_tanh_half_first,)}

# Where numbers are wide: nowhere, in the activation alone, or from the product to the end.


def _direct(x, weight, transposed):
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1 if transposed else 0,)), ((), ())))


def _rounded(x, weight, transposed):
    return product(x, weight, transposed).astype(x.dtype)


@dataclass(frozen=True)
class Form:
    """Where a spelling's numbers are wide.

    Attributes:
        multiply: how products are written.
        bias: what becomes of a bias, and of a residual.
        rounded: whether the product with its bias is rounded to the inputs' dtype before it is activated.
        activated: `(activation, y)`, in `y`'s dtype or in f32.
    """

    multiply: Callable
    bias: Callable
    rounded: bool
    activated: Callable


def _same(y):
    return y


def _in_dtype(activation, y):
    return activation(y)


def _in_f32(activation, y):
    return activation(_wide(y)).astype(y.dtype)


# Products of bf16 and their gradients are lowered in two ways: by PyTorch's rules in f32 and rounded, with a bias before that;
# in JAX as they are. Both activate in either dtype; or all is in f32 until the end.
_FORMS = (
    *(
        Form(multiply, _same, False, activated)
        for multiply in (_direct, _rounded)
        for activated in (_in_dtype, _in_f32)
    ),
    Form(product, _wide, False, _in_dtype),
    *(Form(product, _wide, True, activated) for activated in (_in_dtype, _in_f32)),
)


def _gated(form: Form, activation: Callable, transposed: bool):
    def search(x, gate, up):
        activated = form.activated(activation, form.multiply(x, gate, transposed))
        return (activated * form.multiply(x, up, transposed)).astype(x.dtype)

    return search


def _linear(form: Form, activation: Callable, transposed: bool, given: tuple[str, ...]):
    def search(x, weight, *arrays):
        further = dict(zip(given, arrays, strict=True))
        y = form.multiply(x, weight, transposed)
        if "bias" in further:
            y = y + form.bias(further["bias"])
        y = form.activated(activation, y.astype(x.dtype) if form.rounded else y)
        if "residual" in further:
            y = y + further["residual"].astype(y.dtype)
        return y.astype(x.dtype)

    return search


def _supports(x, weight, *rest, transposed: bool, products: int, given: tuple[str, ...]) -> str | None:
    if x.ndim < 2 or any(w.ndim != 2 for w in (weight, *rest[: products - 1])):
        return f"rows by a matrix alone are taken, not {x.shape} by {weight.shape}"
    shapes = {
        "bias": (weight.shape[0 if transposed else 1],),
        "residual": (*x.shape[:-1], weight.shape[0 if transposed else 1]),
    }
    for name, array in zip(given, rest[products - 1 :], strict=True):
        if array.shape not in (shapes[name], (1, *shapes[name]) if name == "bias" else None):  # a slice of a stack
            return f"a {name} of {array.shape} is not one of {shapes[name]}"
    return None


def _layer(x, weight, *arrays, activation: str, transposed: bool, given: tuple[str, ...]):
    arrays = tuple(a.reshape(-1) if name == "bias" else a for name, a in zip(given, arrays, strict=True))
    return linear_kernel(x, weight, *arrays, activation=activation, transposed=transposed, given=" ".join(given))


_ROWS, _SIZE, _WIDTH = 6, 16, 24

for (_name, _spelled), _transposed in itertools.product(_ACTIVATIONS.items(), (False, True)):
    _weight = ((_WIDTH, _SIZE) if _transposed else (_SIZE, _WIDTH), jnp.bfloat16)
    _rows = ((_ROWS, _SIZE), jnp.bfloat16)
    _attributes = {"activation": _name, "transposed": _transposed}
    builtin(
        f"gated_linear.{_name}.{int(_transposed)}",
        [tuple(_gated(form, a, _transposed) for form in _FORMS if not form.rounded) for a in _spelled],
        functools.partial(gated_kernel, **_attributes),
        [_rows, _weight, _weight],
        functools.partial(_supports, transposed=_transposed, products=2, given=()),
        differentiated=[
            tuple(_gated(form, a, _transposed) for form in _FORMS if not form.rounded)
            for a in _DIFFERENTIATED.get(_name, ())
        ],
    )
    for _given in ((), ("bias",), ("bias", "residual")):
        if _name == "sigmoid":
            continue  # alone it is a gate's, of another product's result
        _further = {"bias": ((_WIDTH,), jnp.bfloat16), "residual": ((_ROWS, _WIDTH), jnp.bfloat16)}
        builtin(
            f"linear.{_name}.{'.'.join((*_given, str(int(_transposed))))}",
            [tuple(_linear(form, a, _transposed, _given) for form in _FORMS) for a in _spelled],
            functools.partial(_layer, **_attributes, given=_given),
            [_rows, _weight, *(_further[name] for name in _given)],
            functools.partial(_supports, transposed=_transposed, products=1, given=_given),
            differentiated=[
                tuple(_linear(form, a, _transposed, _given) for form in _FORMS) for a in _DIFFERENTIATED.get(_name, ())
            ],
        )
