"""A PyTorch module as an exported, functional graph of ops that kpx keeps whole."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table

from kpx.bridges.torch import aten as _aten  # noqa: F401  (registers the rules)
from kpx.bridges.torch.decompose import OWN, decompose_apart
from kpx.bridges.torch.internals import without_python_kernels
from kpx.bridges.torch.interpret import is_known
from kpx.bridges.torch.operators import aten
from kpx.bridges.torch.registry import RULES
from kpx.bridges.torch.writes import correct_writes, refusal
from kpx.errors import CaptureError

# Decompositions that would write again what a rule or PyTorch says better.
_NOT_DECOMPOSED: set = set()


def capture(
    model: torch.nn.Module, args: Sequence, kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """Exports a model for the shapes of its example inputs.

    In-place ops become functional ones; ops with a lowering rule stay whole, others are decomposed
    towards core ATen.

    Args:
        dynamic_shapes: as in `torch.export.export`; the sizes it names stay symbolic.

    Raises:
        CaptureError: the model's Python depends on values of its tensors, or export refused it.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), _lazy_code(), without_python_kernels(kept_whole()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
            return decomposed(program)
    except Exception as error:  # torch.export raises dozens of types, RuntimeError among them
        if (refused := refusal(error)) is not None:
            raise refused from error
        raise CaptureError(_explained(model, error)) from error


@functools.cache
def kept_whole() -> tuple:
    """Return the operators with a rule that PyTorch would decompose before it asks `decompositions`."""
    autograd, dropout = torch._C.DispatchKey.Autograd, aten.dropout.default
    ops = [op for op in RULES if isinstance(op, torch._ops.OpOverload) and op is not dropout]
    return tuple(op for op in ops if autograd in op.py_kernels)


def _lazy_code() -> contextlib.AbstractContextManager:
    """PyTorch writes a graph's Python code only when it is called, where it can be told so."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return contextlib.nullcontext()
    return _use_lazy_graph_module(True)


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """An exported program without in-place ops, and with rules for as many of its ops as there are."""
    table = _decompositions()
    for former, name in correct_writes(program.graph_module).items():
        program.graph_signature.replace_all_uses(former, name)
    return program if decompose_apart(program, table, is_known) else program.run_decompositions(table)


def _decompositions() -> dict:
    """Export's own decompositions, PyTorch's others beside them, less the ops that have a rule."""
    table = torch.export.default_decompositions()
    for op, decomposition in decomposition_table.items():
        if op not in _NOT_DECOMPOSED and isinstance(op, torch._ops.OpOverload) and op not in table:
            table[op] = decomposition
    table.update(OWN)
    for op in RULES:
        if isinstance(op, torch._ops.OpOverload):
            table.pop(op, None)
    return table


def _explained(model: torch.nn.Module, error: Exception) -> str:
    name = type(model).__name__
    line = _models_own_line(error)
    where = f"\n  at {line}" if line else ""
    text = str(error)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__ or ".item()" in text:
        return (
            f"`{name}` decides in Python by the value of a tensor, which a compiled graph cannot do:{where}\n"
            "Rewrite it with `torch.where` or `torch.cond`, or compile the parts before and after it apart."
        )
    if "not a known type" in text and "output" in text:
        return (
            f"`{name}` returns an object that PyTorch cannot flatten: {text.split('. ')[0]}.\n"
            "Register it with `torch.utils._pytree.register_pytree_node`, or have the model return tensors "
            "(for a cache: pass `use_cache=False`)."
        )
    return (
        f"torch.export could not capture `{name}`:{where}\n  {type(error).__name__}: {text.strip()[:2000]}\n"
        "See torch.export's documentation for what a model may do, or compile a part of it."
    )


def _models_own_line(error: BaseException) -> str | None:
    """The innermost line of the traceback that is not PyTorch's or ours."""
    ours = pathlib.Path(__file__).resolve().parents[1]
    torchs = pathlib.Path(torch.__file__).resolve().parent
    cause: BaseException | None = error
    while cause is not None:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            path = pathlib.Path(frame.filename)
            if path.suffix == ".py" and torchs not in path.parents and ours not in path.parents:
                return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
        cause = cause.__cause__ or cause.__context__
    return None
