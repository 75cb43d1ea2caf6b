"""Rematerialization from outside: the layers of a scan are checkpointed, without a change of the model."""

from __future__ import annotations

from collections.abc import Callable

import jax

from kpx.jax_internals import evaluated, is_scan, scan_of

POLICIES = ("none", "dots", "offload", "full")
"""What is kept of each layer's forward pass: everything; its products by weights; those, in the host's memory; its inputs alone."""

_products = jax.checkpoint_policies
_KEPT = {
    "dots": _products.dots_with_no_batch_dims_saveable,
    "offload": _products.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": None,
}


def rematerialized(function: Callable, policy: str) -> Callable:
    """The same function, whose scans compute again in the backward pass what a policy does not keep.

    Scans inside scans are left to the outer one; what has a `jax.checkpoint` of its own is left as it is.
    """
    if policy == "none":
        return function
    kept = _KEPT[policy]

    def checkpointed(equation, values):
        if not is_scan(equation):
            return None
        return scan_of(equation, values, lambda body: jax.checkpoint(body, policy=kept, prevent_cse=False))

    def wrapped(*arguments):
        leaves, tree = jax.tree.flatten(arguments)
        closed, shape = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(tree, flat)), return_shape=True)(
            *leaves
        )
        results = evaluated(closed.jaxpr, closed.consts, leaves, checkpointed)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return wrapped
