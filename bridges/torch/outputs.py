"""What a captured graph gives, and how it lies in memory: views are left to PyTorch, so that nothing is copied for them.

A training graph saves weights, transposed weights and transposed activations for its backward pass. As outputs of an XLA
program each would be a copy. Here a program gives only what it computes, and PyTorch takes the views; the program that
reads them folds the transposition into what it does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import TracingContext

from kpx.bridges.torch.tensors import dense_order

aten = torch.ops.aten
_VIEWS = {
    aten.t.default, aten.permute.default, aten.transpose.int, aten.view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default, aten.expand.default,
    aten._unsafe_view.default,
}  # fmt: skip


@dataclass(frozen=True)
class _Output:
    """One output: an input (`is_input`) or a computed value, by position, then view ops."""

    is_input: bool
    source: int
    steps: list[torch.fx.Node]
    order: tuple[int, ...] | None = None  # of the dimensions of a value that was computed in another order

    def take(self, inputs: Sequence[Any], computed: Sequence[Any]) -> Any:
        value = inputs[self.source] if self.is_input else computed[self.source]
        if self.order is not None:
            value = value.permute(self.order)
        for node in self.steps:
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return value


class Outputs:
    """How a graph's outputs come from its inputs and from fewer computed values.

    Attributes:
        graph: the same graph, giving only what is to be computed.
    """

    def __init__(self, module: torch.fx.GraphModule, backward: bool):
        """Plans for a graph. A backward pass gives gradients: row-major ones, as PyTorch accumulates them."""
        nodes = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        shown = _shown(len(nodes), backward)
        self._symbols = [_symbol(n.meta.get("val")) for n in placeholders]
        self._outputs: list[_Output] = []
        self._layouts: dict[int, tuple] = {}
        computed: list[Any] = []
        orders: dict[Any, tuple[int, ...] | None] = {}
        for position, node in enumerate(nodes):
            base, steps = _unwound(node, placeholders, position < shown) if not backward else (node, [])
            if isinstance(base, torch.fx.Node) and base in placeholders and not backward:
                self._outputs.append(_Output(True, placeholders.index(base), steps))
                continue
            if base not in computed or not isinstance(base, torch.fx.Node):
                computed.append(base)
            order = orders.setdefault(base, None if backward or position < shown else _order(base))
            back = None if order is None else _inverse(order)
            self._outputs.append(_Output(False, computed.index(base), steps, back))
            if position < shown and (layout := _layout(node)) is not None:
                self._layouts[position] = layout
        self.graph = _giving(module, computed, orders)

    def take(self, inputs: Sequence[Any], computed: Sequence[Any]) -> list[Any]:
        """The graph's outputs."""
        results = [o.take(inputs, computed) for o in self._outputs]
        if self._layouts:
            sizes = {s: a for s, a in zip(self._symbols, inputs, strict=True) if s is not None}
            for i, layout in self._layouts.items():
                results[i] = _placed(results[i], *(_number(n, sizes) for n in layout))
        return results


def _shown(count: int, backward: bool) -> int:
    """How many outputs users see, or become views of inputs: the first ones. The others are saved for the backward pass."""
    if backward:
        return 0
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return count if metadata is None else metadata.num_forward_returns


def _unwound(node: Any, placeholders: list[torch.fx.Node], shown: bool) -> tuple[Any, list[torch.fx.Node]]:
    """The value that an output is a view of, and the view ops; the output itself where that must not be taken apart."""
    base, steps = node, []
    while isinstance(base, torch.fx.Node) and base.target in _VIEWS and len(base.all_input_nodes) == 1:
        steps.insert(0, base)
        base = base.all_input_nodes[0]
    if not isinstance(base, torch.fx.Node) or not isinstance(base.meta.get("val"), torch.Tensor):
        return node, []
    if base in placeholders:
        return base, steps
    # What users see of computed values has the strides that PyTorch says: see `_layout`.
    return (node, []) if shown or not _replays(base, steps) else (base, steps)


def _replays(base: torch.fx.Node, steps: list[torch.fx.Node]) -> bool:
    """Whether view ops apply to a value as it lies, of known sizes."""
    shape, order = base.meta["val"].shape, _order(base)
    if not all(isinstance(n, int) for n in shape):
        return False
    value = torch.empty(shape, device="meta")
    if order is not None:
        value = value.permute(order).contiguous().permute(_inverse(order))
    try:
        for node in steps:
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _order(base: Any) -> tuple[int, ...] | None:
    """The order of dimensions in which PyTorch would keep a value densely, where that is not its own order.

    A value of transposed ones is computed as those lie, and what reads it turns it back.
    """
    value: Any = base.meta.get("val") if isinstance(base, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return None
    order = dense_order(value)
    return None if order is None else tuple(order)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _giving(module: torch.fx.GraphModule, computed: list[Any], orders: dict) -> torch.fx.Graph:
    """A copy of a graph that gives other values of it, with their dimensions in these orders."""
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    given = [torch.fx.node.map_arg(value, copies.__getitem__) for value in computed]
    for i, value in enumerate(computed):
        if orders[value] is not None:
            given[i] = graph.call_function(aten.permute.default, (given[i], list(orders[value])))
    graph.output(tuple(given))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _is_check(node))
    return torch.fx.GraphModule(module, graph).graph


def _is_check(node: torch.fx.Node) -> bool:
    return "assert" in str(node.target) or "check_errors" in str(node.target) or "with_effects" in str(node.target)


# Strides ---------------------------------------------------------------------------------------


def _layout(node: Any) -> tuple | None:
    """`(offset, *strides)` of an output that is not row-major from the start of its memory.

    AOTAutograd makes views of inputs with the strides and offsets that it finds on outputs.
    """
    value: Any = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor) or (_is_zero(value.storage_offset()) and _is_row_major(value)):
        return None
    return value.storage_offset(), *value.stride()


def _is_zero(number: Any) -> bool:
    return isinstance(number, int) and number == 0


def _is_row_major(tensor: torch.Tensor) -> bool:
    """Whether a tensor is known to be row-major, without asking what a symbolic size is."""
    wanted: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not _same(stride, wanted) and not (isinstance(size, int) and size == 1):
            return False
        wanted = size * wanted
    return True


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _expression(a) == _expression(b)


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else number


def _symbol(value: Any) -> Any:
    expression = _expression(value) if isinstance(value, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


def _number(number: Any, sizes: dict[Any, int]) -> int:
    return int(_expression(number).subs(sizes)) if isinstance(number, torch.SymInt) else number


def _placed(tensor: torch.Tensor, offset: int, *stride: int) -> torch.Tensor:
    """A tensor's values with given strides, at an offset in memory of their own."""
    size = tensor.shape
    length = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if tensor.numel() else offset
    whole = placed = tensor.new_empty(length).as_strided(size, stride, offset)
    for dim, s in enumerate(stride):  # along an expanded dimension all values are one
        if s == 0 and size[dim] > 1:
            tensor, placed = tensor.narrow(dim, 0, 1), placed.narrow(dim, 0, 1)
    placed.copy_(tensor)
    return whole
