"""How a partitioned module's values lie on its mesh, as Shardy propagates it from the shardings that are stated."""

from __future__ import annotations

import math
import re
from typing import Any, TypeAlias

from kpx.ir import module as m
from kpx.ir.module import Value, ir

Axes: TypeAlias = tuple[str, ...]
Sharding: TypeAlias = tuple[Axes, ...]
"""For each dimension of an array, the axes of the mesh that it is split over."""

_NUMBER = "kpx.number"


def drop_open(module: ir.Module) -> None:
    """Takes off, in place, constraints that leave every dimension open: JAX puts one on each value of a `shard_map` that is manual
    along some axes alone, where no pattern would be found between them."""
    for op in [op for op in m.walk(module.operation) if op.operation.name == "sdy.sharding_constraint"]:
        if not re.search(r"\{\}|[\"}]", str(op.operation.attributes["sharding"]).replace("{?}", "")):
            op.operation.results[0].replace_all_uses_with(op.operation.operands[0])
            op.operation.erase()


def constrained_to(op: Any) -> Sharding | None:
    """Where a constraint brings a value; None where it leaves that open, or tells it by parts of axes or another mesh."""
    attribute = op.operation.attributes["sharding"]
    return None if "?" in str(attribute) else _parsed(attribute)[0]


class Shardings:
    """What Shardy's propagation gives, on a copy of a module: XLA partitions by the same.

    Attributes:
        mesh: sizes of the mesh's axes, by name.
    """

    def __init__(self, module: ir.Module):
        self.mesh = m.mesh_axes(module)
        self._of_ops: dict[int, list[Sharding | None]] = {}
        self._of_arguments: list[Sharding | None] = []
        self._numbers: dict[Value, int] = {}
        if self.mesh:
            self._propagate(module)

    def of(self, value: Value) -> Sharding | None:
        """A value's sharding; None where it has none that is told by whole axes, is an argument of a loop's body, or is one
        device's already (in a `shard_map`)."""
        op = m.producer(value)
        if op is not None and not self.mesh_around(op):
            return None
        if op is not None and op.operation.name == "sdy.sharding_constraint":  # which propagation takes off
            return constrained_to(op)
        if op is not None:
            known = self._of_ops.get(self._numbers.get(op.results[0], -1))
            found = known[list(op.results).index(value)] if known else None
        else:
            number = ir.BlockArgument(value).arg_number
            is_main = ir.BlockArgument(value).owner.owner.operation.name == "func.func"
            found = self._of_arguments[number] if is_main and number < len(self._of_arguments) else None
        return found if found is not None and len(found) == m.rank(value) else None

    def mesh_around(self, op: Any) -> dict[str, int]:
        """The axes that an operation's values may be split over: all but those of manual computations around it."""
        manual = _manual_axes(op)
        return {a: n for a, n in self.mesh.items() if a not in manual}

    def groups_around(self, op: Any) -> tuple[dict[str, int], int] | None:
        """`mesh_around`, and how many groups of so many devices there are; None where a group's are not numbered one after another."""
        mesh = self.mesh_around(op)
        if [*self.mesh][len(self.mesh) - len(mesh) :] != [*mesh]:
            return None
        return mesh, math.prod(self.mesh.values()) // math.prod(mesh.values())

    def _propagate(self, module: ir.Module) -> None:
        integer = ir.IntegerType.get_signless(64, module.context)
        ops = [op for op in m.walk(m.main(module)) if len(op.results)]
        for number, op in enumerate(ops):
            op.attributes[_NUMBER] = ir.IntegerAttr.get(integer, number)
            self._numbers[op.results[0]] = number
        copied = m.copy(module)
        for op in ops:
            del op.attributes[_NUMBER]
        m.run_passes(copied, "sdy-propagation-pipeline")
        main = m.main(copied)
        for op in m.walk(main):
            if _NUMBER in op.attributes and "sdy.sharding" in op.attributes:
                self._of_ops[op.attributes[_NUMBER].value] = _parsed(op.attributes["sdy.sharding"])
        for argument in main.arg_attrs or ():
            stated = m.dictionary(argument)
            self._of_arguments += _parsed(stated["sdy.sharding"])[:1] if "sdy.sharding" in stated else [None]


def _manual_axes(op: Any) -> set[str]:
    found: set[str] = set()
    parent = op.operation.parent
    while parent is not None and parent.operation.name not in ("func.func", "builtin.module"):
        if parent.operation.name == "sdy.manual_computation":
            found.update(re.findall(r'"([^"]+)"', str(parent.operation.attributes["manual_axes"])))
        parent = parent.operation.parent
    return found


def _parsed(attribute: Any) -> list[Sharding | None]:
    """Each value's sharding of an attribute; None for one by parts of axes, or over another mesh."""
    return [
        _dimensions(dims) if mesh == m.MESH else None
        for mesh, dims in re.findall(r"<@([\w.]+), \[(.*?)\](?:, [^<>]*)?>", str(attribute))
    ]


def _dimensions(text: str) -> Sharding | None:
    if ":(" in text:  # a part of an axis
        return None
    return tuple(tuple(re.findall(r'"([^"]+)"', dim)) for dim in re.findall(r"\{([^}]*)\}", text))
