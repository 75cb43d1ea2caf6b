"""Kernels of attention against plain attention in f64."""

from __future__ import annotations

import functools

import jax
import numpy as np

from kpx.kernels.attention import attention_kernel
from tests.reference import assert_closer


def both(function, *arrays):
    """A function's result, and its gradients for a cotangent, the last of the arrays."""
    out, pull = jax.vjp(function, *arrays[:-1])
    return [out, *pull(arrays[-1])]


def check(kernel, arrays, *, relative=2e-6, hidden=None, added=None, fixed=None, variable=None, **given):
    """Results and gradients of a kernel are no farther from f64 than those of plain attention; gives the kernel's.

    Args:
        arrays: queries, keys, values and the result's cotangent.
        hidden: bools, False where a key is hidden. `added`: numbers instead, which are differentiated too.
        fixed: further arrays by name, as the kernel takes them; and `variable`, which are differentiated.
    """
    *arrays, cotangent = arrays
    fixed, variable = dict(fixed or {}), dict(variable or {})
    fixed |= {} if hidden is None else {"mask": hidden}
    variable |= {} if added is None else {"mask": added}
    given = {"scale": arrays[0].shape[-1] ** -0.5, "causal": False, "given": " ".join([*fixed, *variable]), **given}
    inputs = [*arrays, *variable.values(), cotangent]

    def called(function):
        def results(q, k, v, *rest):
            return function(q, k, v, *fixed.values(), *rest, **given)

        return jax.jit(functools.partial(both, results))

    plain = called(attention_kernel.decomposition)
    ours, theirs = called(kernel)(*inputs), plain(*inputs)
    with jax.enable_x64(True):
        exact = plain(*(np.asarray(a).astype(np.float64) for a in inputs))
    for made, other, reference in zip(ours, theirs, exact, strict=True):
        assert_closer(made, other, reference, relative=relative)
    return ours


def arrays_of(shape, dtype=np.float32, seed=0):
    """Queries, keys, values and a cotangent, of batch, heads, heads of keys, length, keys, size, and of values if other."""
    batch, heads, kv_heads, length, kv_length, size, value_size = (*shape, shape[5])[:7]
    rng = np.random.default_rng(seed)
    shapes = ((heads, length, size), (kv_heads, kv_length, size), (kv_heads, kv_length, value_size),
              (heads, length, value_size))  # fmt: skip
    return [rng.standard_normal((batch, *s)).astype(dtype) for s in shapes]


def banded(length, kv_length=None):
    """A mask of blocks: what is near, and the first 32 keys for everyone."""
    row, column = np.arange(length)[:, None], np.arange(kv_length or length)
    return (abs(row - column) < 24) | (column < 32) & (row > 0)


def further(batch, heads, length, kv_length, seed=0):
    """Arrays that attention may be given, by name."""
    rng = np.random.default_rng(seed)
    return {
        "sinks": rng.standard_normal(heads).astype(np.float32),
        "slopes": (2.0 ** -rng.uniform(1, 6, heads)).astype(np.float32),
        "kv_lengths": rng.integers(0, kv_length + 1, batch).astype(np.int32),
        "offset": rng.integers(0, kv_length, batch).astype(np.int32),
        "segments": np.sort(rng.integers(0, 4, (batch, length)), 1).astype(np.int32),
        "kv_segments": np.sort(rng.integers(0, 4, (batch, kv_length)), 1).astype(np.int32),
    }
