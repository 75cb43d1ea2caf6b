"""Rewrites on PyTorch's joint graph, forward and backward together, before AOTAutograd cuts it in two.

Here alone it can be seen that a value which the backward pass computes again is one that the forward pass has. All
that one of the two halves can see is rewritten on its StableHLO instead.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from kpx.bridges.torch.operators import aten

_GETITEM = operator.getitem
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default)
_SAME_VALUE = (aten.detach.default, aten.alias.default, aten.clone.default)


def partition(joint: torch.fx.GraphModule, inputs: Sequence, **kwargs) -> tuple:
    """AOTAutograd's `partition_fn`: the min-cut of PyTorch, after the rewrites."""
    for node in joint.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        _reuse_dropped(node)
    for node in joint.graph.find_nodes(op="call_function", target=aten.clone.default):
        _without_copy(node)
    for node in joint.graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        node.target = aten.view.default
    for node in joint.graph.find_nodes(op="call_function", target=aten.transpose.int):
        _permute(node)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    # A view costs nothing here: what it is of is kept, as it lies.
    with functorch_config.patch(recompute_views=True):
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)


def _without_copy(node: torch.fx.Node) -> None:
    """A copy that PyTorch makes for a stack of products is the value itself: ours read heads as they lie.

    The value is then kept for the backward pass as it lies, too.
    """
    source = node.args[0]
    if isinstance(source, torch.fx.Node) and source.op == "call_function" and _feeds_products_alone(node):
        node.replace_all_uses_with(source)


def _permute(node: torch.fx.Node) -> None:
    """Of the ops that swap dimensions, the cut knows this one as a view."""
    order = list(range(node.meta["val"].ndim))
    if not order:
        return
    first, second = node.args[1:3]
    order[first], order[second] = order[second], order[first]  # type: ignore[index]
    node.target, node.args = aten.permute.default, (node.args[0], order)


def _feeds_products_alone(node: torch.fx.Node) -> bool:
    return bool(node.users) and all(
        user.target is aten.bmm.default or (user.target in _RESHAPES and _feeds_products_alone(user))
        for user in node.users
    )


def _reuse_dropped(node: torch.fx.Node) -> None:
    """`(gradient * (mask * scale)) * p` is `gradient * dropout(p)`, which the forward pass has.

    It is the gradient of a softmax before a dropout, as in attention. The mask is then not kept for the backward pass.
    """
    for gradient, p in (node.args[:2], reversed(node.args[:2])):
        masked = _source(gradient)
        if not _is(masked, aten.mul.Tensor) or not isinstance(p, torch.fx.Node):
            continue
        for upstream, factor in (masked.args[:2], reversed(masked.args[:2])):
            dropout = _dropout_of_mask(factor)
            if dropout is None or _source(dropout.args[0]) is not _source(p):
                continue
            dropped = next((user for user in dropout.users if user.args[1] == 0), None)
            if dropped is not None and isinstance(upstream, torch.fx.Node) and _alike(upstream, dropped, node):
                node.args = (upstream, dropped)
                return


def _dropout_of_mask(factor) -> torch.fx.Node | None:
    """The `native_dropout` whose mask, times its scale, a value is."""
    if not _is(factor, aten.mul.Tensor):
        return None
    copied, scale = factor.args[:2]
    if not _is(copied, aten._to_copy.default) or not _is(mask := _source(copied.args[0]), _GETITEM):
        return None
    dropout, index = mask.args
    if index != 1 or not _is(dropout, aten.native_dropout.default) or not isinstance(scale, float):
        return None
    p, train = dropout.args[1:3]
    return dropout if train is not False and p < 1 and abs(scale * (1 - p) - 1) < 1e-9 else None


def _alike(*nodes: torch.fx.Node) -> bool:
    """Return whether values have one shape and dtype, so that nothing is promoted or broadcast."""
    values = [node.meta.get("val") for node in nodes]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return False
    return len({(tuple(v.shape), v.dtype) for v in values}) == 1


def _is(value, target) -> bool:
    return isinstance(value, torch.fx.Node) and value.target is target


def _source(value):
    """A value before ops that keep its numbers."""
    while isinstance(value, torch.fx.Node) and value.target in _SAME_VALUE:
        value = value.args[0]
    return value
