"""`as_strided` of a view, as `as_strided` of the tensor that the view is of.

The memory that `as_strided` reaches may lie outside of the view at hand (a row, say), and within the tensor that it is a
view of. A compiled program has no memory to reach into, so the graph must name that tensor.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from kpx.bridges.torch.operators import aten

# Ops whose results are the operand's memory, unchanged; whether a `view` copied is seen by its storage.
_VIEWS = {
    aten.alias.default, aten.as_strided.default, aten.chunk.default, aten.detach.default, aten.diagonal.default,
    aten.expand.default, aten.permute.default, aten.reshape.default, aten.select.int, aten.slice.Tensor,
    aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.t.default, aten.transpose.int, aten.unbind.int, aten.unfold.default, aten.unsqueeze.default,
    aten.view.default, aten._unsafe_view.default, operator.getitem,
}  # fmt: skip


def rebase(graph: torch.fx.Graph) -> None:
    """Applies each `as_strided` of a graph, in place, to the tensor whose memory its operand is part of."""
    for op in (aten.as_strided.default, aten.as_strided_copy.default):
        for node in graph.find_nodes(op="call_function", target=op):
            _rebase(node)


def _rebase(node: torch.fx.Node) -> None:
    operand = node.args[0]
    value = _tensor(operand)
    if value is None:
        return
    base = source = operand
    while source.op == "call_function" and source.target in _VIEWS and isinstance(source.args[0], torch.fx.Node):
        source = source.args[0]
        if _lies_in(value, _tensor(source)):
            base = source
    if base is operand:
        return
    arguments = dict(zip(("size", "stride", "storage_offset"), node.args[1:], strict=False)) | node.kwargs
    offset = arguments.get("storage_offset")
    offset = value.storage_offset() if offset is None else offset
    if isinstance(offset, (int, torch.fx.Node)):  # a symbolic offset that no node computes cannot be written
        node.args, node.kwargs = (base, arguments["size"], arguments["stride"], offset), {}


def _tensor(node: Any) -> torch.Tensor | None:
    value: Any = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def _lies_in(view: torch.Tensor, base: torch.Tensor | None) -> bool:
    """Return whether a view's memory was its base's at capture: a `view` may have copied."""
    if base is None or base.dtype != view.dtype:
        return False
    return view.untyped_storage()._cdata == base.untyped_storage()._cdata
