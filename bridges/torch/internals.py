"""What kpx uses of PyTorch's private interfaces: Dynamo's contexts, counters and errors, and the modes that are active."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import math
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from kpx.errors import UnsupportedError

_numbers = itertools.count()
_python_kernels = threading.RLock()


def tensor_from_capsule(capsule: Any) -> torch.Tensor:
    """Return a CPU tensor over a DLPack capsule's memory; `torch.from_dlpack` would ask for protocols and devices first."""
    return torch._C._from_dlpack(capsule)


def capsule_from_tensor(tensor: torch.Tensor) -> Any:
    """Return a DLPack capsule over a tensor's memory."""
    return torch._C._to_dlpack(tensor)


def own_code(function: types.FunctionType) -> types.FunctionType:
    """Return a function with a code object of its own, so that what Dynamo compiles for it is freed with it.

    The code has a name of its own, too: Dynamo remembers by file, line and name which sizes have changed.
    """
    name = f"{function.__name__.partition('_of_')[0]}_of_{next(_numbers)}"
    code = function.__code__.replace(co_name=name)
    copy = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def dynamo_context(
    backend: Callable,
    *,
    fullgraph: bool,
    dynamic: bool | None,
    recompile_limit: int,
    on_recompile: Callable[[str], None],
) -> Callable[[Callable], Callable]:
    """Return a decorator that has Dynamo capture a function for a backend.

    Args:
        on_recompile: called with the guard that failed, when code is compiled again.
    """
    from torch._dynamo import eval_frame  # takes seconds to import

    def failed(failure: Any) -> None:
        on_recompile(str(failure.reason))

    options: dict[str, Any] = {"nopython": fullgraph, "dynamic": dynamic, "guard_fail_fn": failed}
    parameters = inspect.signature(eval_frame._optimize).parameters
    if "recompile_limit" in parameters:
        options["recompile_limit"] = recompile_limit
    if "isolate_recompiles" in parameters:  # models of one class share the code of what follows a graph break
        options["isolate_recompiles"] = True
    _guard_signs_of_zero()
    context = eval_frame.optimize(backend, **options)
    patcher = getattr(torch._dynamo.config, "_make_closure_patcher", None)
    configuration = {name: value for name, value in _CONFIGURATION.items() if hasattr(torch._dynamo.config, name)}
    if patcher is not None and configuration:
        context.callback = _Configured(context.callback, patcher(**configuration))
    return context


_CONFIGURATION = {
    # By default Dynamo does not see hooks that are added to or removed from a module after it was captured.
    "skip_nnmodule_hook_guards": False,
    # Two calls around each graph's own, for a profiler's sake.
    "record_runtime_overhead": False,
}


class _Configured:
    """Dynamo's callback for frames that are not compiled yet, under a configuration of this thread alone.

    Dynamo's own hooks would set the configuration at each call.
    """

    def __init__(self, callback: Any, enter: Callable[[], Callable[[], Any]]):
        self._torchdynamo_orig_backend = callback  # Dynamo looks for the backend behind its callback by this name
        self._enter = enter

    def __call__(self, *args, **kwargs):
        leave = self._enter()
        try:
            return self._torchdynamo_orig_backend(*args, **kwargs)
        finally:
            leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torchdynamo_orig_backend, name)


@functools.cache
def _guard_signs_of_zero() -> None:
    """Have Dynamo tell 0.0 from -0.0 where it guards a number, which are equal and compute different results."""
    from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts

    original = GuardBuilder.EQUALS_MATCH

    @functools.wraps(original)
    def guarded(self, guard, *args, **kwargs):
        original(self, guard, *args, **kwargs)
        value = self.get(guard)
        if type(value) is not float or value != 0.0:
            return
        sign = math.copysign(1.0, value)
        parts = get_verbose_code_parts([f"math.copysign(1, {self.arg_ref(guard)}) == {sign}"], guard)
        manager, check = self.get_guard_manager(guard), functools.partial(_has_sign, sign)
        try:
            manager.add_lambda_guard(check, parts, guard.user_stack)
        except TypeError:  # before torch 2.10 the user's stack was no argument
            manager.add_lambda_guard(check, parts)

    GuardBuilder.EQUALS_MATCH = guarded  # type: ignore[method-assign]


def _has_sign(sign: float, value: Any) -> bool:
    return type(value) is float and math.copysign(1.0, value) == sign


def global_hooks() -> tuple:
    """Return the hooks that are registered on calls of all modules."""
    module = torch.nn.modules.module
    dicts = (
        module._global_forward_hooks, module._global_forward_pre_hooks,
        module._global_backward_hooks, module._global_backward_pre_hooks,
    )  # fmt: skip
    return tuple(itertools.chain.from_iterable(map(dict.values, dicts)))


def is_called_as_it_is(metadata: Any, inputs: int, placeholders: int) -> bool:
    """Return whether an inference graph can be called without AOTAutograd's wrapper, which would change nothing.

    Args:
        metadata: AOTAutograd's, of the graph; None where there is none.
        inputs, placeholders: how many inputs Dynamo's graph and AOTAutograd's have.
    """
    if metadata is None or inputs != placeholders:
        return False
    try:
        from torch._functorch._aot_autograd.schemas import OutputType, PlainTensorMeta

        subclasses = [*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta]
        return (
            not any(info.mutates_data or info.mutates_metadata for info in metadata.input_info)
            and all(info.output_type == OutputType.non_alias for info in metadata.output_info)
            and all(isinstance(meta, PlainTensorMeta) for meta in subclasses)
            and metadata.grad_enabled_mutation is None
            and not (
                metadata.num_intermediate_bases
                or metadata.tokens
                or metadata.dynamic_outputs
                or metadata.is_rng_op_functionalized
                or metadata.num_graphsafe_rng_states
            )
        )
    except (ImportError, AttributeError):  # another version's: its wrapper knows
        return False


def graph_breaks() -> list[Any]:
    """Return the graph breaks that Dynamo has met in this process: `reason` and `user_stack` of each."""
    from torch._dynamo import output_graph, utils

    return getattr(utils, "graph_break_reasons", None) or getattr(output_graph, "graph_break_reasons", [])


def capture_errors() -> tuple[type[BaseException], ...]:
    """Return the errors by which Dynamo refuses to capture a frame, or fails to."""
    from torch._dynamo import exc

    names = ("TorchDynamoException", "FailOnRecompileLimitHit", "RecompileLimitExceeded")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


def backend_error(error: BaseException) -> BaseException | None:
    """Return what a backend raised, of Dynamo's error around it; None of another error."""
    return getattr(error, "inner_exception", None)


def is_tracing_elsewhere() -> bool:
    """Return whether a call is being captured, transformed or watched by PyTorch, so that the model itself must run."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def writes_python_state() -> bool:
    """Return whether the frame that Dynamo is compiling writes attributes, globals or containers that outlive it."""
    from torch._dynamo import symbolic_convert

    tx = getattr(symbolic_convert.InstructionTranslator, "current_tx", lambda: None)()
    if tx is None:
        return False
    effects = tx.output.side_effects
    return any(
        effects.is_modified(value)
        for value in effects.id_to_variable.values()
        if not type(value.mutation_type).__name__.endswith("New")
    )


@contextlib.contextmanager
def without_python_kernels(ops: Iterable[Any]) -> Iterator[None]:
    """Have PyTorch trace operators whole that it decomposes in Python before a decomposition table is asked.

    Of these, `upsample_nearest2d` for example, the decomposition computes other numbers than the operator itself.
    """
    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    removed = []
    with _python_kernels:
        for op in ops:
            kernels = {key: op.py_kernels.pop(key) for key in keys if key in op.py_kernels}
            if kernels:
                op._dispatch_cache.clear()
                removed.append((op, kernels))
        try:
            yield
        finally:
            for op, kernels in removed:
                op.py_kernels.update(kernels)
                op._dispatch_cache.clear()


_tensorify = threading.local()


@contextlib.contextmanager
def without_tensorify(graph: torch.fx.GraphModule) -> Iterator[None]:
    """Have AOTAutograd leave out its pass that makes tensors of Python floats, where a graph takes none.

    The pass (seen with torch 2.13) takes 0-d float64 tensors for floats, and loses writes to them.

    Raises:
        UnsupportedError: a graph takes both.
    """
    values = graph.graph.find_nodes(op="placeholder")
    doubles = [n for n in values if _is_double(n.meta.get("example_value"))]
    floats = [n for n in doubles if getattr(n.meta.get("grapharg"), "pass_arg_as_tensor", False)]
    if floats:
        if len(doubles) > len(floats):
            raise UnsupportedError(
                "The model takes a Python float that changes and a 0-d float64 tensor, which PyTorch mistakes for one "
                "another. Pass the float as a tensor, too, or give the tensor one dimension of size 1."
            )
        yield
        return
    _bypass_tensorify()
    before, _tensorify.is_off = getattr(_tensorify, "is_off", False), True
    try:
        yield
    finally:
        _tensorify.is_off = before


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype is torch.float64


@functools.cache
def _bypass_tensorify() -> None:
    name = "tensorify_python_scalars"
    try:
        original = getattr(importlib.import_module("torch.fx.passes._tensorify_python_scalars"), name)
    except (ImportError, AttributeError):  # a PyTorch without the pass
        return
    importlib.import_module("torch._functorch.aot_autograd")

    @functools.wraps(original)
    def unless_off(*args, **kwargs):
        return None if getattr(_tensorify, "is_off", False) else original(*args, **kwargs)

    for module in [m for key, m in sys.modules.items() if key.startswith("torch.")]:
        if vars(module).get(name) is original:
            setattr(module, name, unless_off)
