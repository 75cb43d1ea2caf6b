"""A functional ATen graph as a pure JAX function."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kpx.bridges.torch import aten as _aten  # noqa: F401  (registers the rules)
from kpx.bridges.torch import checks
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.operators import aten, hop
from kpx.bridges.torch.rebase import rebase
from kpx.bridges.torch.registry import CURRENT, RANDOM, SIZES, bound_sizes, rule_of
from kpx.bridges.torch.scalars import in_range
from kpx.errors import KpxError, UnsupportedError

# Ops that check what capturing has already fixed: sizes, dtypes, devices.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# Arithmetic on sizes, done while tracing.
_PYTHON = {
    *(f for f in vars(operator).values() if callable(f)),
    *(f for f in vars(math).values() if callable(f)),
    torch.sym_float,
    torch.sym_int,
    torch.sym_ite,
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_sum,
}

# The same on a value that is only known as the program runs (`x.max().item()`).
_ON_VALUES = {
    torch.sym_float: lambda x: x.astype(jnp.float64),
    torch.sym_int: lambda x: jnp.trunc(x).astype(jnp.int64),
    torch.sym_ite: jnp.where,
    torch.sym_max: jnp.maximum,
    torch.sym_min: jnp.minimum,
    torch.sym_not: jnp.logical_not,
    operator.not_: jnp.logical_not,
}


def module_path(node: torch.fx.Node) -> str:
    """Where in the model a node comes from: `encoder.layer.0.attention`, or '' at the top."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].removeprefix("L['self']").removeprefix(".") if stack else ""


def _place(node: torch.fx.Node) -> str:
    return f"`{module_path(node) or 'the model itself'}`"


def graph_of(node: torch.fx.Node) -> torch.fx.Graph | None:
    """The graph of a branch or a loop's body that a node reads; None for any other node."""
    if node.op != "get_attr":
        return None
    held: Any = getattr(node.graph.owning_module, str(node.target), None)
    return held.graph if isinstance(held, torch.fx.GraphModule) else None


def _graphs(graph: torch.fx.Graph) -> list[torch.fx.Graph]:
    """A graph and those of its branches and loop bodies."""
    inner = [g for node in graph.nodes if (g := graph_of(node)) is not None]
    return [graph, *(nested for g in inner for nested in _graphs(g))]


def check_supported(graph: torch.fx.Graph) -> None:
    """Raises `UnsupportedError` with every op that has no rule, and the module paths using it."""
    missing: dict[str, list[str]] = {}
    for node in (n for g in _graphs(graph) for n in g.nodes):
        if node.op == "call_function" and not is_known(op := _op_of(node)):
            path = module_path(node) or "the model itself"
            paths = missing.setdefault(str(op), [])
            if path not in paths:
                paths.append(path)
    if missing:
        lines = [f"  {op}: used by {_listed(paths)}" for op, paths in sorted(missing.items())]
        raise UnsupportedError(
            f"The model uses {len(missing)} op(s) that kpx has no lowering rule for:\n"
            + "\n".join(lines)
            + "\nAdd a rule with `@kpx.bridges.torch.lowers(op)` over a JAX function, or replace the op."
        )


def unsupported_nodes(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the nodes of a graph that have no rule, or hold a branch or loop body with an op that has none."""
    owner = graph.owning_module
    missing: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and not is_known(_op_of(node)):
            missing.add(node)
        if node.op == "get_attr":
            body: Any = getattr(owner, str(node.target), None)
            if isinstance(body, torch.fx.GraphModule) and unsupported_nodes(body.graph):
                missing |= set(node.users)
    return missing


def _op_of(node: torch.fx.Node) -> Any:
    """A node's op; of an op with effects (a check of errors), the op inside."""
    return node.args[1] if node.target is hop.with_effects else node.target


def is_known(target: Any) -> bool:
    """Return whether an op has a rule, or needs none."""
    return target in _CHECKS or target in _PYTHON or rule_of(target) is not None


def _listed(paths: list[str], most: int = 5) -> str:
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"


def is_random(graph: torch.fx.Graph) -> bool:
    """Return whether a graph draws random numbers, so that it needs a key."""
    return any(_draws(node) for g in _graphs(graph) for node in g.nodes)


def _draws(node: torch.fx.Node) -> bool:
    return node.target in RANDOM and RANDOM[node.target](*node.args, **node.kwargs)


def as_jax_function(graph: torch.fx.Graph) -> Callable[..., list]:
    """`fn(values, key=None) -> outputs` that computes what a functional graph does.

    `values` follows the graph's placeholders: arrays, and Python numbers for sizes. An output that is not a
    tensor is given as the Python value it is. Random ops draw from `key`, each from a part of its own.

    Raises:
        UnsupportedError: an op has no rule.
    """
    check_supported(graph)
    rebase(graph)
    last_use = _last_uses(graph)
    owner = graph.owning_module

    drawing = [node for node in graph.nodes if _draws(node)]
    placeholders = graph.find_nodes(op="placeholder")

    def fn(values: Sequence, key: Any = None) -> list:
        sizes = bound_sizes((n.meta.get("val"), v) for n, v in zip(placeholders, values, strict=False))
        token = SIZES.set({**SIZES.get(), **sizes})  # a branch's sizes are also those of the graph around it
        try:
            return run(values, key)
        finally:
            SIZES.reset(token)

    def run(values: Sequence, key: Any) -> list:
        env: dict[torch.fx.Node, Any] = {}
        left = list(reversed(values))
        keys = dict(zip(drawing, _keys(key, len(drawing)), strict=True))
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = left.pop()
            elif node.op == "get_attr":
                env[node] = _attribute(owner, str(node.target))
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                if node.target in RANDOM:
                    kwargs = kwargs | {"key": keys.get(node)}
                env[node] = _call(node, args, kwargs)
            elif node.op == "output":
                results = torch.fx.node.map_arg(node.args[0], env.__getitem__)
                return list(results) if isinstance(results, (list, tuple)) else [results]
            for dead in last_use.get(node, ()):
                del env[dead]
        raise KpxError("The captured graph has no output node; please report this model.")

    return fn


def _keys(key: Any, count: int) -> list:
    """A key for each op that draws, all made at once."""
    if not count:
        return []
    made = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))
    return [made[i] for i in range(count)]


def _attribute(owner: Any, name: str) -> Any:
    """A branch as a function of its operands; a constant tensor as an array."""
    held = operator.attrgetter(name)(owner)
    if isinstance(held, torch.fx.GraphModule):
        inner = as_jax_function(held.graph)

        def branch(*values, key=None):
            with checks.collecting(None):  # what is found inside a branch cannot leave it
                return tuple(inner(values, key))

        return branch
    return _constant(held) if isinstance(held, torch.Tensor) else held


def _constant(tensor: torch.Tensor) -> jax.Array:
    """A tensor that the graph holds, of any dtype: NumPy has no bfloat16 of its own."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    values = dense.reshape(-1).view(torch.uint8).numpy().view(to_jax(dense.dtype))
    return jnp.asarray(values.reshape(dense.shape))


def _last_uses(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Which values die after a node, so that tracing holds no more than it needs."""
    seen: set[torch.fx.Node] = set()
    dying: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                dying.setdefault(node, []).append(used)
    return dying


def _call(node: torch.fx.Node, args: tuple, kwargs: dict) -> Any:
    if node.target in _CHECKS:
        return None
    if node.target in _PYTHON:
        on_value = any(isinstance(a, jax.Array) for a in args)
        function = _ON_VALUES.get(node.target, node.target) if on_value else node.target
        return function(*args, **kwargs)  # type: ignore[operator]
    if node.target is hop.with_effects:
        # The token keeps effects in order; ours are checks, which have none.
        result = _run_rule(node, args[1], args[2:], kwargs)
        return (args[0], *(result if isinstance(result, tuple) else (result,)))
    result = _run_rule(node, node.target, args, kwargs)
    _check(node, result)
    return result


def _run_rule(node: torch.fx.Node, op: Any, args: tuple, kwargs: dict) -> Any:
    rule = rule_of(op)
    assert rule is not None  # `check_supported` has looked
    with jax.named_scope(module_path(node).replace(".", "/") or "model"):
        checks.at(f"`{op}` in {_place(node)}")
        token = CURRENT.set(node)
        try:
            args, kwargs = in_range(op, node.meta.get("val"), args, kwargs)
            return rule(*args, **_without_defaults(kwargs))
        except KpxError as error:
            message = f"`{op}` in {_place(node)}: {error}"
            raise UnsupportedError(message, (*getattr(error, "nodes", ()), node)) from error
        except (TypeError, ValueError, IndexError, OverflowError, NotImplementedError) as error:
            raise UnsupportedError(
                f"The lowering rule of `{op}` does not take this case, in {_place(node)}: {error}\n"
                f"  inputs: {_described(args)}",
                (node,),
            ) from error
        finally:
            CURRENT.reset(token)


def _without_defaults(kwargs: dict) -> dict:
    """Device, layout and pinning mean nothing inside a compiled program."""
    return {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}


def _described(args) -> str:
    return ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a) for a in args)


def _check(node: torch.fx.Node, result: Any) -> None:
    """A rule that gives another shape or dtype than PyTorch is a bug here, never a wrong number."""
    expected = node.meta.get("val")
    pairs = zip(expected, result, strict=False) if isinstance(expected, (list, tuple)) else [(expected, result)]
    for e, r in pairs:
        if not isinstance(e, torch.Tensor) or _agrees(e, r):
            continue
        got = f"{r.dtype}{list(r.shape)}" if hasattr(r, "shape") else repr(r)
        raise UnsupportedError(
            f"The lowering rule of `{node.target}` gave {got} where PyTorch gives "
            f"{jnp.dtype(to_jax(e.dtype)).name}{list(e.shape)}, in {_place(node)}. "
            "Please report it; nothing was computed.",
            (node,),
        )


def _agrees(expected: torch.Tensor, result: Any) -> bool:
    """Return whether an array has a tensor's dtype and shape, as far as its sizes are known."""
    if not isinstance(result, (jax.Array, np.ndarray)) or result.dtype != to_jax(expected.dtype):
        return False
    if result.ndim != expected.ndim:
        return False
    return all(n == int(e) for n, e in zip(result.shape, expected.shape, strict=True) if isinstance(e, int))
