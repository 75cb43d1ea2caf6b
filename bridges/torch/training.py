"""An optimized `torch.nn.Module` that trains: forward and backward passes run as compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from kpx.bridges.torch.dynamo import compile_with
from kpx.bridges.torch.module import OptimizedModule
from kpx.config import Config
from kpx.errors import GraphBreakWarning, InputError
from kpx.hardware.target import Target
from kpx.runtime.compiled import Compiled


class TrainableModule(OptimizedModule):
    """A model whose outputs carry gradients: `loss.backward()` fills the `.grad` of the model's own parameters.

    PyTorch's Dynamo captures the model and AOTAutograd differentiates it, so that dropout, BatchNorm's statistics,
    frozen and tied parameters, `torch.utils.checkpoint` and autocast mean what they mean in eager PyTorch. Where the
    model's Python cannot be captured whole, the parts before and after are compiled apart, with a
    `GraphBreakWarning` that says where.
    """

    def __init__(self, model: torch.nn.Module, target: Target, config: Config):
        super().__init__(model, target, config)
        settings = dataclasses.replace(config, prepare=False)
        backend = functools.partial(compile_with, target=target, config=settings)
        # Dynamo gives up, silently, on code that it compiled eight times, and models of one class share their code.
        takes_isolation = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # from torch 2.12 on
        own: dict[str, Any] = {"isolate_recompiles": True} if takes_isolation else {}
        self.__dict__["_compiled"] = torch.compile(model, backend=backend, **own)  # type: ignore[call-overload]

    def __reduce__(self):
        return TrainableModule, (self._model, self._target, self._config)

    def forward(self, *args, **kwargs):
        """The model's outputs, in the model's own structure.

        Raises:
            UnsupportedError: the model uses ops that have no lowering rule.
        """
        before = _breaks()
        result = self._compiled(*args, **kwargs)
        if len(after := _breaks()) > len(before):
            for reason in after - before:
                warnings.warn(_broken(self._model, reason), GraphBreakWarning, stacklevel=2)
        return result

    def free_originals(self) -> int:
        """Not for a model that trains: its weights are its own."""
        raise InputError("A model optimized with `training=True` runs on its own weights: there are no copies to free.")

    def compile_for(self, args: Sequence, kwargs: Mapping[str, Any]) -> Compiled:
        """Not for a model that trains: it is compiled as it is called, forward and backward."""
        raise InputError(
            "With `training=True` a model is compiled at its first call, when it is known what needs a gradient. "
            "Leave `example_inputs` and `example_kwargs` out, and call it."
        )


def _breaks() -> set[str]:
    """The reasons for graph breaks that Dynamo has met in this process (its counters' names differ by version)."""
    return {*counters["graph_break"], *counters["unimplemented"]}


def _broken(model: torch.nn.Module, reason: str) -> str:
    return (
        f"`{type(model).__name__}` could not be captured whole, and is compiled in parts. The break, in Dynamo's "
        f"words:\n{reason.strip()[:1500]}\nEverything is still computed; rewriting that line makes it faster."
    )
