"""Linear layers with what follows them: a bias, an activation, a residual; and gated ones (GLU, arXiv 2002.05202)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kpx.errors import InputError
from kpx.kernels.registry import kernel

ACTIVATIONS: dict[str, Callable] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def product(x, weight, transposed: bool):
    """`[..., size]` by `[size, width]`, or `[width, size]` where transposed; in f32 (f64 for f64)."""
    dimensions = (((x.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


@kernel("kpx.linear", version=1)
def linear_kernel(x, weight, *arrays, activation, transposed, given=""):
    """`residual + activation(x @ weight + bias)`; `given` names the arrays after the weight."""
    further = dict(zip(given.split(), arrays, strict=True))
    y = product(x, weight, transposed)
    if "bias" in further:
        y = y + further["bias"].astype(y.dtype)
    y = ACTIVATIONS[activation](y)
    if "residual" in further:
        y = y + further["residual"].astype(y.dtype)
    return y.astype(x.dtype)


@kernel("kpx.gated_linear", version=1)
def gated_kernel(x, gate, up, *, activation, transposed):
    """`activation(x @ gate) * (x @ up)`."""
    y = ACTIVATIONS[activation](product(x, gate, transposed)) * product(x, up, transposed)
    return y.astype(x.dtype)


# What implementations have in common -------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is computed, and where; `given` names the arrays after the weight."""

    platform: str
    activation: str
    transposed: bool
    given: str = ""


def differentiable(run: Callable) -> tuple[Callable, Callable]:
    """Linear and gated layers, as kernels are called, whose gradients are XLA's products of what a kernel saves.

    Args:
        run: `(rows, weights, further, settings, save)` gives the result `[rows, width]`, and with `save` what is activated:
            the product with its bias; of gated layers (two weights) both products. `further` are arrays by name.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def computed(x, weights, further, settings: Settings):
        return run(x, weights, _named(further, settings), settings, False)[0]

    def forward(x, weights, further, settings: Settings):
        out, before = run(x, weights, _named(further, settings), settings, True)
        return out, (x, weights, further, tuple(before))

    computed.defvjp(forward, _backward)

    def linear(x, weight, *further, platform: str, activation, transposed, given=""):
        settings = Settings(platform, str(activation), bool(transposed), given)
        names = given.split()
        arrays = (a.reshape(-1, a.shape[-1]) if n == "residual" else a for n, a in zip(names, further, strict=True))
        return _as_rows(functools.partial(computed, weights=(weight,), further=tuple(arrays), settings=settings), x)

    def gated(x, gate, up, *, platform: str, activation, transposed):
        settings = Settings(platform, str(activation), bool(transposed))
        return _as_rows(functools.partial(computed, weights=(gate, up), further=(), settings=settings), x)

    return linear, gated


def _as_rows(function: Callable, x):
    return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _named(further, settings: Settings) -> dict[str, Any]:
    return dict(zip(settings.given.split(), further, strict=True))


def _backward(settings: Settings, saved, cotangent):
    x, weights, further, before = saved
    activation = ACTIVATIONS[settings.activation]
    wide = [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (*before, cotangent)]

    def activated(first, *rest):
        return activation(first) * rest[0] if rest else activation(first)

    by_products = jax.vjp(activated, *wide[:-1])[1](wide[-1])
    by_x, by_weights = 0, []
    for weight, gradient in zip(weights, by_products, strict=True):
        narrow = gradient.astype(x.dtype)
        by_x = by_x + product(narrow, weight, not settings.transposed)
        left, right = (narrow, x) if settings.transposed else (x, narrow)
        dimensions = (((0,), (0,)), ((), ()))
        by_weight = jax.lax.dot_general(left, right, dimensions, preferred_element_type=gradient.dtype)
        by_weights.append(by_weight.astype(weight.dtype))
    by_further = {"bias": by_products[0].sum(0), "residual": cotangent}
    found = tuple(by_further[name].astype(a.dtype) for name, a in _named(further, settings).items())
    return by_x.astype(x.dtype), tuple(by_weights), found


def linear(x, weight, bias=None, *, activation: str = "none", residual=None):
    """`residual + activation(x @ weight + bias)`, in f32 until the end.

    Args:
        x: `[..., size]`, floating.
        weight: `[size, width]`, of the dtype of `x`.
        bias: `[width]` or None.
        activation: `none`, `relu`, `silu`, `sigmoid`, `gelu` or `gelu_tanh`.
        residual: `[..., width]` or None.

    Returns:
        `[..., width]`, of the dtype of `x`.

    Raises:
        InputError: shapes, dtypes or the activation are not those.
    """
    _check("linear", x, {"weight": weight}, activation)
    width = weight.shape[1]
    given = {"bias": (bias, (width,)), "residual": (residual, (*x.shape[:-1], width))}
    for name, (array, shape) in given.items():
        if array is not None and (array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating)):
            raise InputError(
                f"linear was given a {name} {array.dtype}{list(array.shape)}. Here it is floating {list(shape)}."
            )
    arrays = {name: array for name, (array, _) in given.items() if array is not None}
    return linear_kernel(x, weight, *arrays.values(), activation=activation, transposed=False, given=" ".join(arrays))


def gated_linear(x, gate, up, *, activation: str = "silu"):
    """`activation(x @ gate) * (x @ up)`, in f32 until the end: SwiGLU by default (arXiv 2002.05202).

    Args:
        x: `[..., size]`, floating.
        gate, up: `[size, width]`, of the dtype of `x`.
        activation: see `linear`.

    Returns:
        `[..., width]`, of the dtype of `x`.

    Raises:
        InputError: shapes, dtypes or the activation are not those.
    """
    _check("gated_linear", x, {"gate": gate, "up": up}, activation)
    return gated_kernel(x, gate, up, activation=activation, transposed=False)


def _check(what: str, x: Any, weights: dict[str, Any], activation: str) -> None:
    shapes = {tuple(w.shape) for w in weights.values()}
    named = ", ".join(f"{name} {list(w.shape)}" for name, w in weights.items())
    if len(shapes) > 1 or x.ndim < 1 or any(len(s) != 2 or s[0] != x.shape[-1] for s in shapes):
        raise InputError(
            f"{what} was given inputs {list(x.shape)} and {named}. They are `[..., size]` and `[size, width]`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or any(w.dtype != x.dtype for w in weights.values()):
        given = ", ".join(str(w.dtype) for w in weights.values())
        raise InputError(f"{what} was given inputs of {x.dtype} and weights of {given}. All are one floating dtype.")
    if activation not in ACTIVATIONS:
        raise InputError(f"{what} was given activation={activation!r}. There are {', '.join(ACTIVATIONS)}.")
