"""Front ends: how models of other frameworks become JAX functions. A bridge is imported when it is first named."""

import importlib
from typing import Any

_BRIDGES = ("flax", "stablehlo", "torch")


def __getattr__(name: str) -> Any:
    if name in _BRIDGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; bridges are {', '.join(_BRIDGES)}")
