"""Calling a module through Dynamo: its Python is guarded, its graphs are compiled by kpx."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpx.bridges.torch import internals
from kpx.bridges.torch.classes import ClassWatch
from kpx.bridges.torch.graphs import Settings
from kpx.bridges.torch.shapes import ShapeHistory
from kpx.errors import CaptureError, GraphBreakWarning, KpxError, RecompileWarning
from kpx.runtime import fork
from kpx.runtime.memory import give_back_freed

_MOST_CAPTURES = 64  # of one frame, before Dynamo runs what is new in eager PyTorch
_QUIET_CAPTURES = 8


def _call(self, args, kwargs):
    return self(*args, **kwargs)


def _call_impl(self, args, kwargs):
    return self._call_impl(*args, **kwargs)


def _forward(self, args, kwargs):
    return self.forward(*args, **kwargs)


class Engine:
    """A module's call, captured by Dynamo with its guards and compiled by kpx.

    Whatever the module's Python reads (modes, attributes, hooks, submodules, global state) is guarded: where it has changed,
    the module is captured again.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings, frame: str = "call", dynamic: bool | None = None):
        """Prepare to capture; nothing is captured before the first call.

        Args:
            frame: "call", "call_impl" (of a module whose own call leads here) or "forward" (without hooks).
            dynamic: capture sizes as symbols from the first call on.
        """
        self.model, self.settings = model, settings
        self._frame = internals.own_code({"call": _call, "call_impl": _call_impl, "forward": _forward}[frame])
        self._dynamic = dynamic
        self._compiled: Any = None
        self._reason: str | None = None  # why the last capture was not the first
        self._classes: ClassWatch  # of the model's modules, when they were captured
        self._global_hooks: tuple = ()  # when the capture began: Dynamo does not guard that there are none
        self._history = settings.history or ShapeHistory(settings.label.strip("`"))
        self._lock = threading.RLock()  # for models that write their own state

    def __call__(self, *args, **kwargs):
        """Return the model's outputs, in the model's own structure.

        Raises:
            CaptureError: with `fullgraph=True`, the model cannot be captured whole.
            UnsupportedError: with `fullgraph=True`, an operator has no lowering rule.
            ForkError: this process was forked from one that had used JAX.
        """
        if internals.is_tracing_elsewhere():
            return self._frame(self.model, args, kwargs)
        fork.check()
        if self._compiled is None or self._global_hooks != internals.global_hooks() or self._classes.changed():
            with self._lock:
                self._start()
        if self.settings.runs and not self.settings.writes_state:
            return self._guarded(args, kwargs)
        with self._lock:
            return self._guarded(args, kwargs)

    def reset(self) -> None:
        """Drop every captured graph and compiled program."""
        with self._lock:
            self._compiled = None
            self._frame = internals.own_code(self._frame)
            self.settings.clear()

    def _start(self) -> None:
        hooks = internals.global_hooks()
        if self._compiled is not None:
            if self._global_hooks == hooks and not self._classes.changed():
                return
            self.reset()
        self._global_hooks, self._classes = hooks, ClassWatch(self.model)
        from kpx.bridges.torch.dynamo import compile_with

        own = weakref.ref(self)

        def recompiled(reason: str) -> None:
            if (engine := own()) is not None:
                engine._reason = reason

        context = internals.dynamo_context(
            functools.partial(compile_with, settings=self.settings),
            fullgraph=self.settings.fullgraph, dynamic=self._dynamic, recompile_limit=_MOST_CAPTURES,
            on_recompile=recompiled,
        )  # fmt: skip
        self._compiled = context(self._frame)
        self._capture_errors = internals.capture_errors()
        self._breaks = internals.graph_breaks()

    def _guarded(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        settings = self.settings
        breaks, runs, compilations, captures = (
            len(self._breaks), settings.runs, settings.compilations, settings.captures
        )  # fmt: skip
        try:
            result = self._compiled(self.model, args, kwargs)
        except self._capture_errors as error:
            inner = internals.backend_error(error)
            if inner is not None:  # ours, in its own words
                raise inner from None if isinstance(inner, KpxError) else error
            if self.settings.fullgraph:
                raise CaptureError(_refused(self.settings.label, error)) from error
            if runs != self.settings.runs:  # a part of the model has run: running it again would write twice
                raise CaptureError(_failed(self.settings.label, error)) from error
            # The model itself raises PyTorch's own error, or computes what Dynamo could not.
            result = self._frame(self.model, args, kwargs)
            warnings.warn(_failed(self.settings.label, error), GraphBreakWarning, stacklevel=3)
        if len(self._breaks) > breaks:
            warnings.warn(_broken(self.settings.label, self._breaks[breaks:]), GraphBreakWarning, stacklevel=3)
        if settings.captures != captures:
            self._classes = ClassWatch(self.model)  # of modules that are new, too
            self._note_capture(settings.captures)
        if settings.compilations != compilations:
            leaves = pytree.tree_leaves((args, kwargs))
            self._history.note([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)])
            give_back_freed()
        return result

    def _note_capture(self, captures: int) -> None:
        """Warn of a model that is captured again and again, and say what changed last."""
        if self._reason is None:
            return
        last = captures >= _MOST_CAPTURES - 1
        if captures % _QUIET_CAPTURES and not last:
            return
        warnings.warn(
            f"{self.settings.label} was captured {captures} times, because of what changes between calls. The last change: "
            f"{self._reason.strip()}. "
            + ("What changes from now on runs in eager PyTorch." if last else "Keep it the same, or make it a tensor."),
            RecompileWarning,
            stacklevel=4,
        )


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restore the parameters, buffers, gradients and random state that calls inside this context write."""
    tensors = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    before = [(t, t._version, t.grad) for t in tensors]
    copies = {id(t): t.detach().clone() for t in model.buffers()}
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for tensor, version, grad in before:
                if tensor._version != version and id(tensor) in copies:
                    tensor.copy_(copies[id(tensor)])
                tensor.grad = grad


def _broken(label: str, reasons: list[Any]) -> str:
    lines = []
    for reason in reasons:
        where = reason.user_stack[-1] if reason.user_stack else None
        at = f"{where.filename}:{where.lineno}, in {where.name}: {where.line}\n    " if where is not None else ""
        lines.append(f"  {at}{reason.reason.strip().splitlines()[0]}")
    return (
        f"{label} could not be captured whole. Eager PyTorch runs what lies between the compiled parts:\n"
        + "\n".join(dict.fromkeys(lines))
        + "\nEverything is computed; rewriting that line makes it faster. `fullgraph=True` refuses such models."
    )


def _refused(label: str, error: BaseException) -> str:
    return (
        f"{label} cannot be captured whole, as `fullgraph=True` asks:\n  {str(error).strip()[:2000]}\n"
        "Leave `fullgraph=True` out: eager PyTorch then runs that line between the compiled parts."
    )


def _failed(label: str, error: BaseException) -> str:
    return (
        f"Dynamo could not capture {label}: {type(error).__name__}: {str(error).strip()[:1500]}\n"
        "The model itself was called instead. Call it in eager PyTorch to see whether the inputs are right."
    )
