"""Which bridge takes a model. A framework is imported only if the user has imported it."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

# Framework module -> bridge module. Bridges outside the project are entry points of `kpx.bridges`, named
# after the framework's module.
_BRIDGES = {"torch": "kpx.bridges.torch", "flax": "kpx.bridges.flax"}


def find(model: Any) -> ModuleType | None:
    """The bridge module that accepts a model, or None.

    A bridge has `accepts(model)`, `resolve_target(given, may_be_absent=False)`, `optimize(model, example_inputs,
    example_kwargs, target, config)` and `compile(model, args, kwargs, target, config)`; and, to be validated, `reference(model,
    inputs)`; to be calibrated, `weights_and_function(model)`.
    """
    outside = {e.name: e.value for e in entry_points(group="kpx.bridges")}
    for framework, path in (outside | _BRIDGES).items():
        if framework in sys.modules:
            bridge = importlib.import_module(path)
            if bridge.accepts(model):
                return bridge
    return None
