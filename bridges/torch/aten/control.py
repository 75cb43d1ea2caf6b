"""PyTorch's higher-order ops: branches and loops over graphs of their own.

A graph among an op's operands arrives as a function of arrays, `graph(*arrays, key=None) -> tuple` (see
`kpx.bridges.torch.interpret`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch.aten.scan import associative_scan
from kpx.bridges.torch.operators import hop
from kpx.bridges.torch.registry import lowers
from kpx.errors import UnsupportedError


def _draws(*args, **kwargs) -> bool:
    """Return whether a graph among an op's operands draws random numbers; a predicate on nodes."""
    from kpx.bridges.torch.interpret import graph_of, is_random

    graphs = (graph_of(a) for a in args if isinstance(a, torch.fx.Node))
    return any(is_random(g) for g in graphs if g is not None)


def _array(value: Any) -> Any:
    """A number as the 0-d array that a loop carries; None, and arrays, as they are."""
    return value if value is None or isinstance(value, jax.Array) else jnp.asarray(value)


def _arrays(values) -> tuple:
    return tuple(map(_array, values))


def _fold(key, step):
    return None if key is None else jax.random.fold_in(key, step)


@lowers(hop.cond, random=_draws)
def cond(predicate, true_graph, false_graph, operands=(), *, key):
    """One of two graphs; where the predicate is known as the program is traced, that one alone."""
    if isinstance(predicate, (bool, int, np.bool_)):
        return (true_graph if predicate else false_graph)(*operands, key=key)
    operands = tuple(operands)
    branches = [lambda *a, g=g: _arrays(g(*a, key=key)) for g in (true_graph, false_graph)]
    return jax.lax.cond(predicate.reshape(()) != 0, *branches, *_arrays(operands))


@lowers(hop.while_loop, random=_draws)
def while_loop(condition, body, carried, additional=(), *, key):
    def holds(state):
        (value,) = condition(*state[1], *additional, key=_fold(key, 2 * state[0]))
        return jnp.reshape(jnp.asarray(value), ()) != 0

    def step(state):
        return state[0] + 1, _arrays(body(*state[1], *additional, key=_fold(key, 2 * state[0] + 1)))

    return jax.lax.while_loop(holds, step, (jnp.zeros((), jnp.uint32), _arrays(carried)))[1]


@lowers(hop.scan, random=_draws)
def scan(graph, init, xs, additional=(), *, key):
    """Carry and results of a graph applied along dimension 0: the last carry, then the results, stacked."""
    init, xs = _arrays(init), _arrays(xs)

    def step(state, x):
        results = _arrays(graph(*state[1], *x, *additional, key=_fold(key, state[0])))
        return (state[0] + 1, results[: len(init)]), results[len(init) :]

    (_, carry), stacked = jax.lax.scan(step, (jnp.zeros((), jnp.uint32), init), xs)
    return (*carry, *stacked)


@lowers(hop.map_impl, random=_draws)
def map_(graph, xs, others=(), *, key):
    return scan(lambda *values, key: graph(*values, key=key), (), xs, others, key=key)


@lowers(hop.associative_scan, random=_draws)
def associative_scan_(graph, xs, additional=(), *, key):
    """Partial results of an associative graph along dimension 0, which takes two elements of each array."""
    if key is not None:
        raise UnsupportedError("An `associative_scan` whose function draws random numbers has no defined result.")

    def combine(a, b):
        return jax.vmap(lambda a, b: graph(*a, *b, *additional))(a, b)

    return associative_scan(combine, xs)


@lowers(hop.invoke_subgraph, random=_draws)
def invoke_subgraph(graph, identifier, *operands, key):
    """A region that a model shares (`torch.compiler.nested_compile_region`)."""
    return graph(*operands, key=key)


@lowers(hop.wrap_with_set_grad_enabled, random=_draws)
def with_grad_mode(enabled, graph, *operands, key):
    """`torch.no_grad()` in an exported model: a program computes no gradient."""
    return graph(*operands, key=key)
