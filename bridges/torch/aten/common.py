"""What several families of rules share: axes, sizes, accumulation dtypes, gradients of rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def axis(x, dim: int) -> int:
    """A dimension counted from the front; 0 for a 0-d array."""
    return dim % max(x.ndim, 1)


def axes(x, dim) -> tuple[int, ...]:
    """Dimensions counted from the front; all of them for None or an empty list."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return tuple(range(x.ndim))
    dims = [dim] if isinstance(dim, int) else dim
    return tuple(d % max(x.ndim, 1) for d in dims) if x.ndim else ()


def sizes(value, n: int) -> list[int]:
    """An int, or a list of one, for each of n dimensions."""
    value = [value] if isinstance(value, int) else list(value)
    return value * n if len(value) == 1 else value


def sum_dtype(dtype):
    """What products and sums are accumulated in: f32 for 16-bit floats, as PyTorch does."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def is_float(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_complex(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def is_integer(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def lowest(dtype):
    """The smallest value of a real dtype: minus infinity, the smallest integer, or False."""
    if dtype == jnp.bool_:
        return jnp.asarray(False)
    return jnp.asarray(-jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min, dtype)


def highest(dtype):
    """The largest value of a real dtype."""
    if dtype == jnp.bool_:
        return jnp.asarray(True)
    return jnp.asarray(jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max, dtype)


def pullback(function, *primals):
    """`cotangent -> cotangents of the primals` of a rule: how the backward ops of PyTorch get theirs.

    PyTorch's gradient of a complex value is the conjugate of JAX's cotangent.
    """
    _, vjp = jax.vjp(function, *primals)

    def back(cotangent):
        return tuple(jnp.conj(g) for g in vjp(jnp.conj(cotangent)))

    return back
