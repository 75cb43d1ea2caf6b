"""An exported PyTorch graph as a pure JAX function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.export.graph_signature import InputKind, OutputKind

from kpx.bridges.torch import aten as _aten  # noqa: F401  (registers the rules)
from kpx.bridges.torch.dtypes import to_jax
from kpx.bridges.torch.registry import RULES
from kpx.errors import KpxError, UnsupportedError

_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}

# Ops that check what export has already fixed: sizes, dtypes, devices.
_CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
_PYTHON = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod}


def module_path(node: torch.fx.Node) -> str:
    """Where in the model a node comes from: `encoder.layer.0.attention`, or '' at the top."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].removeprefix("L['self'].") if stack else ""


def check_supported(program: torch.export.ExportedProgram) -> None:
    """Raises `UnsupportedError` with every op that has no rule, and the module paths using it."""
    missing: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target not in RULES.keys() | _CHECKS | _PYTHON:
            path = module_path(node) or "the model itself"
            paths = missing.setdefault(str(node.target), [])
            if path not in paths:
                paths.append(path)
    if missing:
        lines = [f"  {op}: used by {_listed(paths)}" for op, paths in sorted(missing.items())]
        hint = (
            "\nThe model is in training mode: `model.eval()` may remove some of them."
            if any(word in op for op in missing for word in ("dropout", "bernoulli", "batch_norm", "rand"))
            else ""
        )
        raise UnsupportedError(
            f"The model uses {len(missing)} op(s) that kpx has no lowering rule for:\n"
            + "\n".join(lines)
            + hint
            + "\nAdd a rule with `@kpx.bridges.torch.lowers(op)` over a JAX function, or replace the op."
        )


def _listed(paths: list[str], most: int = 5) -> str:
    shown = ", ".join(paths[:most])
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"


def weight_names(program: torch.export.ExportedProgram) -> list[tuple[str, str]]:
    """(placeholder, attribute path) of every parameter, buffer and lifted constant, in order."""
    specs = program.graph_signature.input_specs
    return [(s.arg.name, s.target or s.arg.name) for s in specs if s.kind in _WEIGHTS]


def check_pure(program: torch.export.ExportedProgram) -> None:
    """Raises `UnsupportedError` where the model writes to a buffer or to an input."""
    changed = [
        f"  {s.target} ({s.kind.name.replace('_', ' ').lower()})"
        for s in program.graph_signature.output_specs
        if s.kind not in (OutputKind.USER_OUTPUT,)
    ]
    if changed:
        raise UnsupportedError(
            "The model changes state as it runs, which kpx does not support yet:\n"
            + "\n".join(changed)
            + "\nIn evaluation mode most models change none: call `model.eval()`, and pass `use_cache=False`"
            " where it has a cache."
        )


def as_jax_function(program: torch.export.ExportedProgram) -> Callable[[list, list], list]:
    """`fn(weights, inputs) -> outputs` that computes what the exported graph does.

    `weights` follows `weight_names`, `inputs` the flat user inputs (tensors only), `outputs` the flat
    user outputs; an output that is not a tensor is returned as the Python value it is.

    Raises:
        UnsupportedError: an op has no rule, or the model changes state.
    """
    check_supported(program)
    check_pure(program)
    graph = program.graph
    weights = [name for name, _ in weight_names(program)]
    tensor_inputs = [
        s.arg.name
        for s in program.graph_signature.input_specs
        if s.kind == InputKind.USER_INPUT and isinstance(s.arg, torch.export.graph_signature.TensorArgument)
    ]
    last_use = _last_uses(graph)

    def fn(weight_arrays: list, input_arrays: list) -> list:
        env: dict[torch.fx.Node, Any] = {}
        given = dict(zip(weights, weight_arrays, strict=True)) | dict(zip(tensor_inputs, input_arrays, strict=True))
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = given.get(node.name)
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = _call(node, args, kwargs)
            elif node.op == "output":
                return list(torch.fx.node.map_arg(node.args[0], env.__getitem__))
            for dead in last_use.get(node, ()):
                del env[dead]
        raise KpxError("The exported graph has no output node; please report this model.")

    return fn


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
        return node.target(*args, **kwargs)  # type: ignore[operator]
    with jax.named_scope(module_path(node).replace(".", "/") or "model"):
        try:
            result = RULES[node.target](*args, **_without_defaults(node, kwargs))
        except UnsupportedError:
            raise
        except (TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise UnsupportedError(
                f"The lowering rule of `{node.target}` does not take this case, in "
                f"`{module_path(node) or 'the model itself'}`: {error}\n"
                f"  inputs: {_described(args)}"
            ) from error
    _check(node, result)
    return result


def _without_defaults(node: torch.fx.Node, kwargs: dict) -> dict:
    """Device, layout and pinning mean nothing inside a compiled program."""
    return {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}


def _described(args) -> str:
    return ", ".join(f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a) for a in args)


def _check(node: torch.fx.Node, result: Any) -> None:
    """A rule that gives another shape or dtype than PyTorch is a bug here, never a wrong number."""
    expected = node.meta.get("val")
    pairs = zip(expected, result, strict=False) if isinstance(expected, (list, tuple)) else [(expected, result)]
    for e, r in pairs:
        if not isinstance(e, torch.Tensor):
            continue
        shape, dtype = tuple(int(n) for n in e.shape), to_jax(e.dtype)
        if not isinstance(r, (jax.Array, np.ndarray)) or r.shape != shape or r.dtype != dtype:
            got = f"{r.dtype}{list(r.shape)}" if hasattr(r, "shape") else repr(r)
            raise UnsupportedError(
                f"The lowering rule of `{node.target}` gave {got} where PyTorch gives "
                f"{jnp.dtype(dtype).name}{list(shape)}, in `{module_path(node) or 'the model itself'}`. "
                "Please report it; nothing was computed."
            )
