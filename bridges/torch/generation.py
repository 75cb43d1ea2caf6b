"""Hugging Face's `generate()` with the prompt and each decoding step compiled by kpx."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpx.bridges.torch.shapes import ShapeHistory
from kpx.errors import InputError

_WHOLE_PROMPT = 1 << 30  # tokens; transformers compiles a prompt that it reads in pieces, and this is one piece
_CACHE_STEP = 64  # tokens: caches grow by so many, so that few lengths of prompt need a step of their own
_PROGRAMS = 64  # that one model may have: a prompt's length and a cache's each make one


def compile_config(backend: Callable) -> Any:
    """What `generate()` takes as `compile_config`: our backend, on the CPU too, one program for all steps."""
    from transformers import CompileConfig

    config = CompileConfig(backend=backend, fullgraph=False, dynamic=False, mode=None)
    config._compile_all_devices = True
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # from torch 2.12 on
        config.isolate_recompiles = True  # type: ignore[attr-defined]
    return config


def generate(model: torch.nn.Module, config: Any, history: ShapeHistory, *args, **kwargs) -> Any:
    """`model.generate(...)` over a static KV cache: the prompt is one program, all decoding steps another.

    Args:
        cache_precision: (of `kwargs`) `"int8"` keeps keys and values so; None, as the model has them.

    Raises:
        InputError: a cache that grows was asked for, or one in a precision that there is none in.
    """
    precision = kwargs.pop("cache_precision", None)
    if precision not in (None, "int8"):
        raise InputError(
            f"`cache_precision={precision!r}` was given. A cache is kept in 'int8', or as the model has it: None."
        )
    asked = kwargs.setdefault("cache_implementation", "static")
    if asked != "static":
        raise InputError(
            f"`cache_implementation={asked!r}` was given. A compiled step needs a cache of fixed size: use 'static', "
            "or call `generate` of the model itself."
        )
    kwargs.setdefault("prefill_chunk_size", _WHOLE_PROMPT)
    prompt = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
    if prompt is not None:
        history.note([tuple(prompt.shape)])
    with _steady_caches(model, precision), torch._dynamo.config.patch(recompile_limit=_PROGRAMS):
        return model.generate(*args, compile_config=config, **kwargs)


@contextlib.contextmanager
def _steady_caches(model: Any, precision: str | None) -> Iterator[None]:
    """Static caches whose lengths repeat, whose layers have one program for all steps, and keep tokens in a precision.

    transformers counts the tokens of a sliding window in Python, and every count is a program of its own. A layer that
    keeps all tokens gives the same: the mask hides what has left the window.
    """
    if not hasattr(model, "_prepare_static_cache"):  # before transformers 5
        if precision is not None:
            raise InputError("A cache in int8 needs transformers 5 or later.")
        yield
        return
    prepare = model._prepare_static_cache

    def prepared(*args, max_cache_len: int, **kwargs):
        length = -(-max_cache_len // _CACHE_STEP) * _CACHE_STEP
        cache = prepare(*args, max_cache_len=length, **kwargs)
        layers = getattr(cache, "self_attention_cache", cache).layers
        _unroll_windows(layers, model._previous_max_cache_length)
        if precision is not None:
            _shrink(layers)
        return cache

    model._prepare_static_cache = prepared
    try:
        yield
    finally:
        del model._prepare_static_cache


def _unroll_windows(layers: list, length: int) -> None:
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    for i, layer in enumerate(layers):
        if type(layer) is StaticSlidingWindowLayer:
            layers[i] = StaticLayer(max_cache_len=length)
            if layer.is_initialized:
                layers[i].lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])


def _shrink(layers: list) -> None:
    """Has new layers that keep all tokens keep them in int8."""
    from transformers.cache_utils import StaticLayer

    from kpx.bridges.torch.small_cache import Int8Layer

    for i, layer in enumerate(layers):
        if type(layer) is StaticLayer:
            layers[i] = Int8Layer(max_cache_len=layer.max_cache_len)
            if layer.is_initialized:
                layers[i].lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
