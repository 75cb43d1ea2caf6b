"""Rematerialization from outside: layers are checkpointed, in a scan or one after another, without a change of the model."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax

from kpx.jax_internals import called_jaxpr, evaluated, is_scan, name_stack, scan_of

POLICIES = ("none", "dots", "offload", "full")
"""What is kept of each layer's forward pass: everything; its products by weights; those, in the host's memory; its inputs alone."""

_products = jax.checkpoint_policies
_KEPT = {
    "dots": _products.dots_with_no_batch_dims_saveable,
    "offload": _products.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": None,
}


def rematerialized(function: Callable, policy: str) -> Callable:
    """The same function, whose layers compute again in the backward pass what a policy does not keep.

    Layers are the rounds of a scan (scans inside scans are left to the outer one); and, where there is none, modules in a list,
    by the names that their operations were made under (`layers/0`). What has a `jax.checkpoint` of its own is left as it is.
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
        layers = listed_layers(closed.jaxpr)
        again = functools.partial(jax.checkpoint, policy=kept)
        results = evaluated(closed.jaxpr, closed.consts, leaves, checkpointed, layers, again)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return wrapped


_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}
_WHOLE = {"scan", "while", "checkpoint", "remat2"}  # where these are, layers are theirs


def listed_layers(jaxpr: Any) -> list[tuple[int, int]]:
    """The ranges of equations that are layers by their names: of modules in a list, where these have two products each or more.

    Of lists in lists the innermost such is taken; none where most products are in no such list, or in a loop.
    """
    names = [name_stack(e) for e in jaxpr.eqns]
    counts = [_products(e) for e in jaxpr.eqns]
    if any(e.primitive.name in _WHOLE for e in jaxpr.eqns):
        return []
    found: dict[str, dict[str, list[int]]] = {}  # of each list, of each of its modules, equations
    for number, name in enumerate(names):
        for match in re.finditer(r"(?:^|[/_])(\d+)(?=/|$)", name):
            path = name[: match.end(1)]
            found.setdefault(re.sub(r"\d+", "*", path), {}).setdefault(path, []).append(number)
    lists = []
    for modules in found.values():
        products = sum(counts[n] for numbers in modules.values() for n in numbers)
        ranges = sorted((numbers[0], numbers[-1] + 1) for numbers in modules.values())
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        if len(ranges) > 1 and apart and products >= max(2 * len(ranges), sum(counts) / 2):
            lists.append(ranges)
    return max(lists, key=len, default=[])


def _products(equation: Any) -> int:
    inner = called_jaxpr(equation)
    if inner is not None:
        return sum(map(_products, inner.jaxpr.eqns))
    return int(equation.primitive.name in _PRODUCTS)
