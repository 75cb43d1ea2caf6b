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


def check(kernel, arrays, *, relative=2e-6, hidden=None, added=None, **given):
    """Results and gradients of a kernel are no farther from f64 than those of plain attention; gives the kernel's.

    Args:
        arrays: queries, keys, values and the result's cotangent.
        hidden: bools, False where a key is hidden. `added`: numbers instead, which are differentiated too.
    """
    *arrays, cotangent = arrays
    given = {"scale": arrays[0].shape[-1] ** -0.5, "causal": False, **given}
    masks = [] if hidden is None else [hidden]
    inputs = [*arrays, *([] if added is None else [added]), cotangent]

    def called(function):
        return jax.jit(functools.partial(both, lambda *arrays: function(*arrays, *masks, **given)))

    plain = called(attention_kernel.decomposition)
    ours, theirs = called(kernel)(*inputs), plain(*inputs)
    with jax.enable_x64(True):
        exact = plain(*(np.asarray(a).astype(np.float64) for a in inputs))
    for made, other, reference in zip(ours, theirs, exact, strict=True):
        assert_closer(made, other, reference, relative=relative)
    return ours
