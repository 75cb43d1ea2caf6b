"""PyTorch's operators by name: `aten`, `prims` and `hop`, as `torch.ops` has them.

PyTorch's versions differ in their operators. One that this PyTorch lacks is an `Absent` here, which no graph holds: a rule for
it is left out, and a set of operators that names it is a set of the others.
"""

from __future__ import annotations

from typing import Any

import torch

from kpx.errors import UnsupportedError


class Absent:
    """An operator, or an overload of one, that this PyTorch lacks."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, overload: str) -> Absent:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return Absent(f"{self.name}.{overload}")

    def __call__(self, *args, **kwargs):
        """Raise an error.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"PyTorch {torch.__version__} has no operator `{self.name}`. Use another version of it.")

    def __repr__(self) -> str:
        return f"<{self.name}, which PyTorch {torch.__version__} lacks>"


class _Operator:
    """An operator whose overloads are attributes."""

    def __init__(self, packet: Any):
        self._packet = packet

    def __getattr__(self, overload: str) -> Any:
        if overload.startswith("__"):
            raise AttributeError(overload)
        found = getattr(self._packet, overload, None)
        if found is None:
            found = Absent(f"{self._packet}.{overload}")
        setattr(self, overload, found)
        return found

    def __call__(self, *args, **kwargs):
        return self._packet(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._packet)


class _Namespace:
    """The operators of one library, as attributes."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and not hasattr(getattr(torch.ops, self._name), name):
            raise AttributeError(name)
        operator = getattr(getattr(torch.ops, self._name), name, None)
        if operator is None:
            operator = Absent(f"{self._name}.{name}")
        elif isinstance(operator, torch._ops.OpOverloadPacket):
            operator = _Operator(operator)
        setattr(self, name, operator)
        return operator


aten = _Namespace("aten")
prims = _Namespace("prims")
hop = _Namespace("higher_order")
