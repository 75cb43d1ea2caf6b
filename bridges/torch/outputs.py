"""What a captured graph gives, and how it lies in memory: views are left to PyTorch, so that nothing is copied for them.

A training graph saves weights, transposed weights and transposed activations for its backward pass. As outputs of an XLA
program each would be a copy. Here a program gives only what it computes, and PyTorch takes the views; the program that
reads them folds the transposition into what it does with them.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch._functorch import config as functorch_config
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.multiprocessing.reductions import StorageWeakRef

from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import bound_sizes
from kpx.bridges.torch.tensors import dense_order

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
    view: _View | None = None  # in the memory of a value that outputs share

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
        self._captured = [n.meta.get("val") for n in placeholders]
        self._outputs: list[_Output] = []
        self._layouts: dict[int, Layout] = {}
        self._root_layouts: dict[int, Layout] = {}  # of computed values whose memory outputs share
        roots = _shared_roots(module.graph, nodes[:shown])
        computed: list[Any] = []
        orders: dict[Any, tuple[int, ...] | None] = {}
        for position, node in enumerate(nodes):
            if position < shown and (root := roots.get(node)) is not None:
                if root not in computed:
                    computed.append(root)
                orders[root] = None
                self._outputs.append(_Output(False, computed.index(root), [], view=_View.of(node.meta["val"])))
                if (layout := Layout.of(root.meta["val"])) is not None:
                    self._root_layouts[computed.index(root)] = layout
                continue
            base, steps = _unwound(node, placeholders, position < shown) if not backward else (node, [])
            if isinstance(base, torch.fx.Node) and base in placeholders and not backward:
                self._outputs.append(_Output(True, placeholders.index(base), steps))
                continue
            if base not in computed or not isinstance(base, torch.fx.Node):
                computed.append(base)
            order = orders.setdefault(base, None if backward else _order(base))
            back = None if order is None else _inverse(order)
            self._outputs.append(_Output(False, computed.index(base), steps, back))
            value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
            if position < shown and (layout := Layout.of(value)) is not None:
                self._layouts[position] = layout
        self.graph = _giving(module, computed, orders)
        self._is_plain = not (self._layouts or self._root_layouts or any(o.view for o in self._outputs))

    def take(self, inputs: Sequence[Any], computed: Sequence[Any]) -> list[Any]:
        """The graph's outputs."""
        if self._is_plain:
            return [o.take(inputs, computed) for o in self._outputs]
        sizes = bound_sizes(zip(self._captured, inputs, strict=True))
        computed = list(computed)
        for i, layout in self._root_layouts.items():
            computed[i] = layout.resolve(sizes).place(computed[i])
        results = [o.take(inputs, computed) for o in self._outputs]
        for i, output in enumerate(self._outputs):
            if output.view is not None:
                results[i] = output.view.take(results[i], sizes)
        for i, layout in self._layouts.items():
            results[i] = layout.resolve(sizes).place(results[i])
        return results


def _shown(count: int, backward: bool) -> int:
    """How many outputs users see, or become views of inputs: the first ones. The others are saved for the backward pass."""
    if backward:
        return 0
    context = TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    return count if metadata is None else metadata.num_forward_returns


def _shared_roots(graph: torch.fx.Graph, outputs: list[Any]) -> dict[torch.fx.Node, torch.fx.Node]:
    """Map outputs that share memory with each other to the node that made this memory.

    Memory of an input is left out: AOTAutograd makes those views itself.
    """
    by_storage: dict[StorageWeakRef, set[torch.fx.Node]] = {}
    for node in outputs:
        if (storage := _storage(node)) is not None and not free_unbacked_symbols(node.meta["val"]):
            by_storage.setdefault(storage, set()).add(node)
    roots: dict[torch.fx.Node, torch.fx.Node] = {}
    seen: set[StorageWeakRef] = set()
    for node in graph.nodes:
        storage = _storage(node)
        if storage is None or storage in seen:
            continue
        seen.add(storage)
        nodes = by_storage.get(storage, set())
        makes_all = node.op == "call_function" and node.target is not operator.getitem
        if len(nodes) > 1 and makes_all and _is_zero(node.meta["val"].storage_offset()):
            roots |= dict.fromkeys(nodes, node)
    return roots


def _storage(node: Any) -> StorageWeakRef | None:
    """Return the memory of a node's captured value."""
    value: Any = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return StorageWeakRef(value.untyped_storage())
    return None


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
    # What users see of computed values has the strides that PyTorch says: see `Layout`.
    return (node, []) if shown or not _replays(base, steps) else (base, steps)


def _replays(base: torch.fx.Node, steps: list[torch.fx.Node]) -> bool:
    """Return whether view ops apply to a value as it lies, of known sizes."""
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


def tangent_layouts(graph: torch.fx.GraphModule | None) -> contextlib.AbstractContextManager:
    """How AOTAutograd lays out gradients of a graph's outputs while it is compiled.

    It copies a gradient into the strides of its output, and so spoils it where those let elements share memory: windows of
    `unfold`, for example. Such a graph takes row-major (or channels_last) gradients; so does a graph that is not known.
    """
    setting = "guess_tangent_strides_as_outputs"
    if not hasattr(functorch_config, setting):
        return contextlib.nullcontext()
    if graph is not None and not any(map(_may_overlap, graph.graph.output_node().all_input_nodes)):
        return contextlib.nullcontext()
    return functorch_config.patch({setting: False})


def _may_overlap(node: torch.fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return False  # symbolic sizes: AOTAutograd keeps no strides
    return torch._debug_has_internal_overlap(value) != 0


@dataclass(frozen=True)
class Layout:
    """How eager PyTorch lays out a tensor that is not row-major from the start of its memory.

    AOTAutograd makes views of inputs with the strides and offsets that it finds on outputs, and users look at them.
    """

    size: tuple
    strides: tuple
    offset: Any

    @classmethod
    def of(cls, value: Any) -> Layout | None:
        """That of a captured value; None where it is row-major, or no dense tensor."""
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        if _is_zero(value.storage_offset()) and _is_row_major(value):
            return None
        if free_unbacked_symbols(value):  # sizes that the values of other tensors decide
            return None
        return cls(tuple(value.shape), tuple(value.stride()), value.storage_offset())

    def resolve(self, sizes: dict[Any, int]) -> Layout:
        """The same in numbers, given what symbols stand for."""
        size, strides = ([_number(n, sizes) for n in numbers] for numbers in (self.size, self.strides))
        return Layout(tuple(size), tuple(strides), _number(self.offset, sizes))

    @functools.cached_property
    def order(self) -> tuple[int, ...] | None:
        """The order of the dimensions in memory, where elements lie there without gaps and not in their own order."""
        order = tuple(sorted(range(len(self.size)), key=lambda d: (-self.strides[d], d)))
        wanted = 1
        for d in reversed(order):
            if self.size[d] != 1 and self.strides[d] != wanted:
                return None
            wanted *= self.size[d]
        return None if list(order) == sorted(order) else order

    def stored(self, array: jax.Array) -> jax.Array:
        """An array as it is to be computed: with its dimensions in the order of memory."""
        return array if self.order is None else jnp.transpose(array, self.order)

    def viewed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that lies like this, given what `stored` gave."""
        return self.place(tensor if self.order is None else tensor.permute(_inverse(self.order)))

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's values, with these strides at this offset: a copy only where the tensor lies in another way."""
        differs = any(a != b and n > 1 for a, b, n in zip(tensor.stride(), self.strides, self.size, strict=True))
        if self.offset or (differs and tensor.numel()):
            return _placed(tensor, self.offset, *self.strides)
        if tensor.stride() != self.strides:  # of dimensions that have one element, or of no elements
            return tensor.as_strided(self.size, self.strides, 0)
        return tensor


@dataclass(frozen=True)
class _View:
    """A view of a computed value's memory: of another shape, another dtype, conjugated or negated."""

    layout: Layout
    dtype: torch.dtype
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, value: torch.Tensor) -> _View:
        """Return what a captured value is of its own memory."""
        layout = Layout(tuple(value.shape), tuple(value.stride()), value.storage_offset())
        return cls(layout, value.dtype, value.is_conj(), value.is_neg())

    def take(self, base: torch.Tensor, sizes: dict[Any, int]) -> torch.Tensor:
        """Return the view of the tensor that has the memory."""
        layout = self.layout.resolve(sizes)
        if base.dtype is self.dtype:
            view = base.as_strided(layout.size, layout.strides, layout.offset)
        else:  # the real part of a complex tensor, for example
            view = torch.empty(0, dtype=self.dtype)
            view.set_(base.untyped_storage(), layout.offset, layout.size, layout.strides)
        view = view.conj() if self.is_conj else view
        return view._neg_view() if self.is_neg else view


def _is_zero(number: Any) -> bool:
    return isinstance(number, int) and number == 0


def _is_row_major(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is known to be row-major, without asking what a symbolic size is."""
    wanted: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not _same(stride, wanted):
            return False
        wanted = size * wanted
    return True


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _expression(a) == _expression(b)


def _expression(number: Any) -> Any:
    return number.node.expr if isinstance(number, torch.SymInt) else number


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
