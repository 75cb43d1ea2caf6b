"""Changes of the classes of a model's modules, which Dynamo does not guard.

Dynamo guards a module's own attributes and the type of the module, and takes the methods of that type as they were. A method
that is replaced, or a class attribute that begins to shadow a base's, is seen here by CPython's version tag of each class.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import types
from collections.abc import Iterable
from typing import Any

import torch

_VERSION_TAG = 384  # bytes from the start of a PyTypeObject of a 64-bit CPython to tp_version_tag
_METHODS = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property, functools.partialmethod)


class ClassWatch:
    """The methods and the names of attributes of the classes of a model's modules, as they were."""

    def __init__(self, model: torch.nn.Module):
        """Record the classes of a model and of its submodules."""
        self._classes = list({type(module): None for module in model.modules()})
        self._tags = [_tag(cls) for cls in self._classes] if has_version_tags() else []
        self._contents = _contents(self._classes)
        self._versions = self._current()

    def changed(self) -> bool:
        """Return whether a method was replaced, or an attribute of a class added or deleted."""
        versions = self._current()
        if versions == self._versions and 0 not in versions:
            return False
        if _contents(self._classes) != self._contents:
            return True
        # Something else has changed: a counter, say.
        for cls in self._classes:
            _ = cls.forward  # type: ignore[attr-defined]  # an attribute that is looked up gives the class a new tag
        self._versions = self._current()
        return False

    def _current(self) -> list[int]:
        return list(map(_value, self._tags))


_value = operator.attrgetter("value")


def _contents(classes: Iterable[type]) -> dict[type, dict[str, Any]]:
    bases = {base: None for cls in classes for base in cls.__mro__}
    return {
        base: {name: value if isinstance(value, _METHODS) else None for name, value in vars(base).items()}
        for base in bases
    }


def _tag(cls: type) -> ctypes.c_uint:
    return ctypes.c_uint.from_address(id(cls) + _VERSION_TAG)


@functools.cache
def has_version_tags() -> bool:
    """Return whether this interpreter has a version tag where CPython has it; where it has none, nothing is watched."""
    size: int = type.__basicsize__  # type: ignore[assignment]
    if size < _VERSION_TAG + ctypes.sizeof(ctypes.c_uint):
        return False

    class Base:
        value = 1

    class Derived(Base):
        pass

    _ = Derived().value  # an attribute that is looked up gives the class a tag
    before = _tag(Derived).value
    steady = _tag(Derived).value
    Base.value = 2
    _ = Derived().value
    return before == steady != 0 and _tag(Derived).value != before
