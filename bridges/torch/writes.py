"""Rewrites of a captured graph before PyTorch makes it functional: there, some writes through views are wrong or refused.

- Written through windows (`x.unfold(...).mul_(2)`), PyTorch sets the elements beside the windows to zero.
- `fill_diagonal_` writes through strides, which PyTorch makes functional on no view.
- Dropout that drops nothing gives its operand itself, which may be written later; PyTorch would give a copy.
- Written through a part of a view whose elements share memory (`x.expand(3, 4)[0].fill_(1)`), PyTorch loses the write.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from kpx.bridges.torch.operators import aten
from kpx.errors import UnsupportedError

F = torch.nn.functional
_UNFOLDS = {"unfold", torch.Tensor.unfold, aten.unfold.default}
_FILLS = {"fill_diagonal_", torch.Tensor.fill_diagonal_, aten.fill_diagonal_.default}
_DROPOUTS = {
    F.dropout: ("input", "p", "training"),
    torch.dropout: ("input", "p", "train"),
    aten.dropout.default: ("input", "p", "train"),
}
_WRITES = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}
_WRITES |= {operator.iand, operator.ior, operator.setitem}

# What PyTorch says of writes that it cannot make functional.
_REFUSALS = (
    "is not possible to functionalize properly",
    "a tensor being mutated that has internal overlap",
    "operator whose output has alias annotations",
)


def correct_writes(module: torch.fx.GraphModule) -> dict[str, str]:
    """Rewrite a graph of Dynamo's or of torch.export's, in place; return what values are called now, by former name.

    Raises:
        UnsupportedError: a write cannot be made functional.
    """
    renamed: dict[str, str] = {}
    for body in module.children():  # of a checkpoint, a branch or a loop
        if isinstance(body, torch.fx.GraphModule):
            correct_writes(body)
    nodes = list(module.graph.nodes)
    for node in nodes:
        if node.target in _DROPOUTS:
            renamed |= _without_dropout(node)
        elif node.target in _FILLS:
            renamed |= _by_diagonal(node)
    for node in nodes:
        _check_overlap(node)
    if any(node.target in _UNFOLDS for node in nodes):
        windows = [w for node in module.graph.nodes for operand in _written(node) for w in _windows_under(operand)]
        for node in dict.fromkeys(windows):
            renamed |= {} if _overlap(node) else _by_strides(node)
    if renamed:
        module.recompile()
    return renamed


def refusal(error: Exception) -> UnsupportedError | None:
    """The error to raise for one of PyTorch's about a write that it cannot make functional; None for others."""
    text = str(error)
    if not any(part in text for part in _REFUSALS):
        return None
    return UnsupportedError(
        f"The model writes through a view in a way that PyTorch cannot make functional: {text.splitlines()[0]}\n"
        "Write the tensor that the view is of, by indexing, or write a copy of the view."
    )


def _value(node: Any) -> torch.Tensor | None:
    """The tensor that stood for a node at capture."""
    meta = node.meta if isinstance(node, torch.fx.Node) else {}
    value: Any = meta.get("example_value", meta.get("val"))
    return value if isinstance(value, torch.Tensor) and value.layout is torch.strided else None


def _storage(node: Any) -> int | None:
    """The memory that a node's tensor lies in."""
    value = _value(node)
    return None if value is None else value.untyped_storage()._cdata


def _replace(node: torch.fx.Node, value: torch.fx.Node) -> dict[str, str]:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    return {node.name: value.name}


def _written(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The operands that a node may write; rather too many than too few."""
    target, name = node.target, getattr(node.target, "__name__", str(node.target))
    if isinstance(target, torch._ops.OpOverload):
        writes = target._schema.is_mutable
    elif node.op == "call_function" and target in _WRITES:
        writes = True
    else:
        # `inplace` may be given by position; `keepdim` may, too, and then the result has memory of its own.
        is_operand = any(a is True for a in node.args) and _storage(node) in (None, _storage(_operand(node)))
        in_place = node.kwargs.get("inplace") or is_operand or "out" in node.kwargs
        writes = bool(in_place) or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        writes = writes or name == "__setitem__"
    if writes:
        yield from node.all_input_nodes


def _targets(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the operands that a node writes, where it writes any."""
    if not any(True for _ in _written(node)):
        return []
    return [a for a in (node.args[0] if node.args else None, node.kwargs.get("out")) if isinstance(a, torch.fx.Node)]


def _check_overlap(node: torch.fx.Node) -> None:
    """Refuse a write to a view of a view whose elements share memory: PyTorch makes it functional, and loses it."""
    for written in _targets(node):
        storage, above = _storage(written), _operand(written)
        while storage is not None and above is not None and _storage(above) == storage:
            if (value := _value(above)) is not None and _shares_elements(value):
                raise UnsupportedError(
                    f"The model writes through a view of a view whose elements share memory (`{above.name}`), which PyTorch "
                    "cannot make functional. Write the tensor that the views are of, or a copy of the view."
                )
            above = _operand(above)


def _operand(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the first argument of a node, which a view is of."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, torch.fx.Node) else None


def _shares_elements(value: torch.Tensor) -> bool:
    """Return whether several elements may lie at one place in memory."""
    numbers = (*value.shape, *value.stride())
    if not all(isinstance(n, int) for n in numbers) or not value.numel():
        return False
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _without_dropout(node: torch.fx.Node) -> dict[str, str]:
    names = _DROPOUTS[node.target]
    arguments = {"p": 0.5, names[2]: True} | dict(zip(names, node.args, strict=False)) | node.kwargs
    drops = arguments[names[2]] and arguments["p"] != 0
    if drops or not isinstance(arguments["input"], torch.fx.Node):
        return {}
    return _replace(node, arguments["input"])


def _by_diagonal(node: torch.fx.Node) -> dict[str, str]:
    """Writes through views of diagonals, which PyTorch makes functional on any view."""
    arguments = dict(zip(("self", "fill_value", "wrap"), node.args, strict=False)) | node.kwargs
    operand, value = arguments["self"], _value(arguments["self"])
    if value is None or value.ndim < 2 or (arguments.get("wrap") and value.shape[0] > value.shape[1]):
        return {}
    with node.graph.inserting_before(node):
        view = operand
        shape = value
        for dim in [1] + [-1] * (value.ndim - 2):
            view = node.graph.call_function(aten.diagonal.default, (view, 0, 0, dim))
            shape = view.meta["val"] = torch.diagonal(shape, 0, 0, dim)
        fill = aten.fill_.Scalar if not isinstance(arguments["fill_value"], torch.fx.Node) else aten.fill_.Tensor
        view = node.graph.call_function(fill, (view, arguments["fill_value"]))
        view.meta["val"] = shape
    return _replace(node, operand)


def _windows_under(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The `unfold`s that a node is a view of, so that writing it writes through them."""
    storage = _storage(node)
    above: Any = node
    while isinstance(above, torch.fx.Node) and (_value(above) is None or _storage(above) == storage):
        if above.target in _UNFOLDS:
            yield above
        above = above.args[0] if above.args else None


def _overlap(node: torch.fx.Node) -> bool:
    """Return whether windows overlap: PyTorch itself refuses to make writes through them functional."""
    arguments = dict(zip(("self", "dimension", "size", "step"), node.args, strict=False)) | node.kwargs
    size, step = arguments["size"], arguments["step"]
    return isinstance(size, int) and isinstance(step, int) and step < size


def _by_strides(node: torch.fx.Node) -> dict[str, str]:
    """Windows by strides: written, they leave the elements beside them as they are."""
    value = _value(node)
    assert value is not None  # it has a storage
    numbers = (*value.shape, *value.stride())
    if not all(isinstance(n, int) for n in numbers):
        raise UnsupportedError(
            "The model writes through windows (`unfold`) of a tensor whose sizes are symbolic. Write the tensor by "
            "indexing, or compile for fixed sizes."
        )
    with node.graph.inserting_before(node):
        strided = node.graph.call_function(
            aten.as_strided.default, (node.args[0], list(value.shape), list(value.stride()))
        )
    strided.meta = dict(node.meta)
    return _replace(node, strided)
