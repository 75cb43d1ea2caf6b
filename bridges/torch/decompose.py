"""Ops without a rule, decomposed where they stand.

`ExportedProgram.run_decompositions` traces a whole program twice more, which takes longer than exporting it. Most programs
have a handful of ops to decompose, and write nothing in place: those ops are traced alone, equal ones once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from kpx.bridges.torch.operators import aten


def _threshold_backward(grad: torch.Tensor, x: torch.Tensor, threshold: float) -> torch.Tensor:
    dtype = torch.result_type(grad, x)
    return torch.where(x <= threshold, 0, grad).to(dtype)


# Decompositions in place of PyTorch's own, which give another dtype than the op.
OWN: dict[Any, Callable] = {aten.threshold_backward.default: _threshold_backward}

_ALIASES = {aten.detach_.default: aten.detach.default}  # writes nothing

_COMPUTES = {  # composite ops that give an array of their own
    aten.batch_norm.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.group_norm.default, aten.layer_norm.default,
    aten.linear.default, aten.matmul.default,
}  # fmt: skip


def decompose_apart(
    program: torch.export.ExportedProgram, table: Mapping[Any, Callable], known: Callable[[Any], bool]
) -> bool:
    """Decomposes the ops that are not known, in place; False, and nothing is changed, where the whole must be traced anew.

    That is where an op writes what others may see, holds a graph, or has sizes that are symbols.

    Args:
        table: decompositions by op.
        known: whether an op may stay.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    if any(node.op == "get_attr" for node in program.graph.nodes) or not all(map(_is_plain, nodes)):
        return False
    without_effect = {node: _pure(node) for node in nodes}
    traced: dict[Any, Any] = {}
    for node, op in without_effect.items():
        if op is None:
            return False
        if not known(op):
            key = _key(node, op)
            if key not in traced:
                traced[key] = _traced(node, op, table, known)
            if traced[key] is None:
                return False
    for node, op in without_effect.items():
        if op is not node.target and op not in _ALIASES.values():
            written, later = node.args[0], set(_after(node))
            written.replace_all_uses_with(node, delete_user_cb=later.__contains__)
            program.graph_signature.replace_all_uses(written.name, node.name)
        node.target = op
        if not known(op):
            _replace(program, node, traced[_key(node, op)])
    return True


def _is_plain(node: torch.fx.Node) -> bool:
    """Return whether a node computes values of fixed sizes from others, and does nothing else."""
    op, values = node.target, pytree.tree_leaves(node.meta.get("val"))
    if any(
        isinstance(v, torch.Tensor) and not all(isinstance(n, int) for n in (*v.shape, *v.stride())) for v in values
    ):
        return False
    return isinstance(op, torch._ops.OpOverload) or op is operator.getitem


def _pure(node: torch.fx.Node) -> Any:
    """The op that gives what a node gives, and writes nothing; None where it writes what others may see."""
    op = node.target
    if op is operator.getitem or not op._schema.is_mutable:
        return op
    if op in _ALIASES:
        return _ALIASES[op]
    arguments = op._schema.arguments
    writes = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    if not op._opname.endswith("_") or not writes[0] or any(writes[1:]) or not _is_fresh(node.args[0]):
        return None
    packet = getattr(getattr(torch.ops, op.namespace), op._opname.removesuffix("_"), None)
    pure = getattr(packet, op._overloadname, None)
    if pure is None or [a.name for a in pure._schema.arguments] != [a.name for a in arguments]:
        return None
    return pure if _gives_the_same_kind(pure, node) else None


def _is_fresh(node: Any) -> bool:
    """Return whether a node is an array that nothing shares memory with: no input, no view, nor is a view of it taken."""
    if node.op != "call_function" or _shares_memory(node):
        return False
    return all(user.op == "call_function" and not _shares_memory(user, but=node) for user in node.users)


def _shares_memory(node: torch.fx.Node, but: torch.fx.Node | None = None) -> bool:
    """Return whether what a node gives may lie where what it was given does; not counting writes into a node that is named."""
    op = node.target
    if op is operator.getitem:
        return True
    returned = [r.alias_info for r in op._schema.returns]
    if op._schema.is_mutable and but is not None and node.args[0] is but:
        return False
    # A composite op, as `reshape`, need not say that it may give a view.
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return (composite and op not in _COMPUTES) or any(info is not None for info in returned)


def _gives_the_same_kind(pure: Any, node: torch.fx.Node) -> bool:
    """Return whether an op gives an array like that which a node writes: written in place, a sum takes the type of what it is
    added to."""
    args, kwargs = _arguments(node)
    written = args[0]
    if not isinstance(written, FakeTensor):
        return False
    with written.fake_mode:
        given = pure(*args, **kwargs)
    return (given.dtype, given.shape, given.stride()) == (written.dtype, written.shape, written.stride())


def _after(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _arguments(node: torch.fx.Node) -> tuple[tuple, dict[str, Any]]:
    """A node's arguments, values by their stand-ins without data."""
    return torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])


def _key(node: torch.fx.Node, op: Any) -> Any:
    """What decides how a node is decomposed."""
    leaves, structure = pytree.tree_flatten(_arguments(node))
    described = [
        (v.dtype, v.shape, v.stride(), v.storage_offset()) if isinstance(v, torch.Tensor) else (type(v), v)
        for v in leaves
    ]
    return op, repr(described), repr(structure)


def _traced(
    node: torch.fx.Node, op: Any, table: Mapping[Any, Callable], known: Callable[[Any], bool]
) -> torch.fx.GraphModule | None:
    """The decomposition of a node's op as a graph of its values; None where it is not made of known ops that write nothing."""
    leaves, structure = pytree.tree_flatten(_arguments(node))
    values = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def function(*given):
        filled = list(leaves)
        for i, value in zip(values, given, strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return op(*args, **kwargs)

    tensors = [leaves[i] for i in values]
    mode = next((v.fake_mode for v in tensors if isinstance(v, FakeTensor)), None)
    if mode is None:
        return None
    try:
        with mode:
            made = make_fx(dispatch_functionalize(function), decomposition_table=dict(table))(*tensors)
    except Exception:  # of dozens of types: an op with effects, as a check of errors, cannot be traced alone
        return None
    made.graph.eliminate_dead_code()
    inner = [n for n in made.graph.nodes if n.op not in ("placeholder", "output")]
    return (
        made
        if all(n.op == "call_function" and known(n.target) and _is_plain(n) and _pure(n) is n.target for n in inner)
        else None
    )


def _replace(program: torch.export.ExportedProgram, node: torch.fx.Node, made: torch.fx.GraphModule) -> None:
    """Puts a decomposition in a node's place, under the node's place in the model."""
    given = iter([n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, torch.fx.Node)])
    graph, env = program.graph, {}
    result: Any = None
    with graph.inserting_before(node):
        for inner in made.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(given)
            elif inner.op == "output":
                result = torch.fx.node.map_arg(inner.args[0], env.__getitem__)
            else:
                copied = graph.node_copy(inner, env.__getitem__)
                copied.meta = {**node.meta, "val": inner.meta.get("val")}
                env[inner] = copied
    if isinstance(result, torch.fx.Node):
        program.graph_signature.replace_all_uses(node.name, result.name)
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # of several results, each is taken by a node of its own
            program.graph_signature.replace_all_uses(user.name, result[user.args[1]].name)
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
