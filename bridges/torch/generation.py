"""Hugging Face's `generate()` with each decoding step compiled by kpx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kpx.errors import InputError


def compile_config(backend: Callable) -> Any:
    """What `generate()` takes as `compile_config`: our backend, on the CPU too, one program for all steps."""
    from transformers import CompileConfig

    config = CompileConfig(backend=backend, fullgraph=False, dynamic=False, mode=None)
    config._compile_all_devices = True
    return config


def generate(model: torch.nn.Module, config: Any, *args, **kwargs) -> Any:
    """`model.generate(...)` over a static KV cache: a step is compiled at its first token and run for all others.

    The prompt itself, whose length differs from call to call, is read by PyTorch.

    Raises:
        InputError: a cache that grows was asked for.
    """
    asked = kwargs.setdefault("cache_implementation", "static")
    if asked != "static":
        raise InputError(
            f"`cache_implementation={asked!r}` was given. A compiled step needs a cache of fixed size: use 'static', "
            "or call `generate` of the model itself."
        )
    return model.generate(*args, compile_config=config, **kwargs)
