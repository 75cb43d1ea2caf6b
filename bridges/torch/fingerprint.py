"""A word for all that decides what a model is compiled to, so that another process can find the program again.

It is made of the model's classes and the files that they are written in, everything that the modules hold but the values
of parameters and buffers, the inputs' shapes and dtypes, PyTorch's settings that tracing looks at, and versions. Files of
the user's own that are loaded count all, since a model may call what is in them. Where something has no name that another
process would give it too (a closure, an object without attributes, an interactive session's code), there is no word.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import operator
import os
import pathlib
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from kpx.bridges.torch.registry import rule_of

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
# Of a module, what its own attributes say better, or what no outputs depend on.
_APART = {"_parameters", "_buffers", "_modules", "training"}
_MOST_DEPTH = 12
_MOST_NUMBERS = 1 << 16  # of a tensor that is no parameter and no buffer, which is part of the program


class _Unnamed(Exception):
    """Something has no name that another process would give it too."""


def fingerprint(model: torch.nn.Module, key: Any, environment: Mapping[str, str], config: Any) -> str | None:
    """The word for a model and a signature, or None.

    Args:
        key: the signature: shapes, dtypes, constants, training or not.
        environment: what compiles: versions and the device.
    """
    parts: list[str] = [repr(sorted(environment.items())), repr(config), torch.__version__, sys.version, repr(key)]
    parts += [repr(setting) for setting in _settings()]
    try:
        parts += _own_files()
        for name, module in model.named_modules(remove_duplicate=False):
            parts += [name, str(module.training), *_classes(type(module))]
            parts += _named(
                {k: v for k, v in vars(module).items() if k not in _APART}, _MOST_DEPTH, (module, *module.modules())
            )
            tensors = [*module._parameters.items(), *module._buffers.items()]
            parts += [f"{k}: {None if t is None else _kind(t)}" for k, t in tensors]
    except (_Unnamed, RecursionError):
        return None
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def graph_fingerprint(
    graph: torch.fx.Graph, args: Sequence[Any], environment: Mapping[str, str], config: Any
) -> str | None:
    """Return the cache key of a functional graph and its inputs; None where a rule or value has no name elsewhere.

    Args:
        args: the inputs, of which tensors count by shape, dtype and strides, and numbers by value.
        environment: what compiles: versions and the device.
    """
    parts = [repr(sorted(environment.items())), repr(config), torch.__version__, sys.version]
    parts += [_kind(a) if isinstance(a, torch.Tensor) else f"{type(a).__name__} {a!r}" for a in args]
    try:
        parts += _graph_parts(graph)
    except _Unnamed:
        return None
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _graph_parts(graph: torch.fx.Graph) -> Iterator[str]:
    ours = pathlib.Path(__file__).resolve().parents[2]
    for node in graph.nodes:
        path = list((node.meta.get("nn_module_stack") or {"": ("",)}).values())[-1][0]
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {path}"
        values = node.meta.get("val")
        yield repr([(v.dtype, v.shape, v.stride()) for v in (values if isinstance(values, (list, tuple)) else [values])
                    if isinstance(v, torch.Tensor)])  # fmt: skip
        if node.op == "get_attr":
            yield from _constant_parts(operator.attrgetter(str(node.target))(graph.owning_module))
        elif (rule := rule_of(node.target)) is not None:
            file = getattr(sys.modules.get(rule.__module__), "__file__", None)
            if file is None:
                raise _Unnamed
            if ours not in pathlib.Path(file).resolve().parents:  # a rule of the user's own
                yield _stamp(file)


def _constant_parts(value: Any) -> Iterator[str]:
    if isinstance(value, torch.fx.GraphModule):
        yield from _graph_parts(value.graph)
    elif isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1)
        yield _kind(value) + hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    else:
        raise _Unnamed


def _kind(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__qualname__} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"


def _settings() -> list[Any]:
    return [
        torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"), torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
    ]  # fmt: skip


def _classes(cls: type) -> Iterator[str]:
    """Each class that a module's own is made of, with what says which version it is."""
    for each in cls.__mro__:
        if each in (object, torch.nn.Module):
            continue
        yield f"{each.__module__}.{each.__qualname__} {_version(each.__module__)}"


@functools.cache
def _version(module: str) -> str:
    """A module's file, as it was when it was changed last, and the version of the package it belongs to."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        raise _Unnamed
    package = module.partition(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return f"{version} {_stamp(file)}"


def _stamp(file: str) -> str:
    try:
        stat = os.stat(file)
    except OSError:
        raise _Unnamed from None
    return f"{file} {stat.st_mtime_ns} {stat.st_size}"


def _own_files() -> list[str]:
    """The stamps of all loaded files that no package brought."""
    installed = {
        pathlib.Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    ours = pathlib.Path(__file__).resolve().parents[2]
    found = []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # What was loaded from a file has all of its path; PyTorch gives modules that it makes up a bare name.
        if not isinstance(file, str) or not file.endswith(".py") or not os.path.isabs(file):
            continue
        folders = pathlib.Path(file).resolve().parents
        if not any(folder in installed for folder in folders) and ours not in folders:
            found.append(_stamp(file))
    return sorted(found)


def _named(value: Any, depth: int, above: Sequence[Any]) -> Iterator[str]:
    """A value in words that another process would use too."""
    if depth == 0:
        raise _Unnamed
    inner = functools.partial(_named, depth=depth - 1, above=above)
    if isinstance(value, _SIMPLE):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, torch.nn.Module):
        if not any(value is module for module in above):
            raise _Unnamed  # held, but no submodule
        yield f"module {type(value).__qualname__}"
    elif isinstance(value, torch.Tensor):
        if value.numel() > _MOST_NUMBERS or value.device.type != "cpu":
            raise _Unnamed
        yield f"{_kind(value)} {value.detach().reshape(-1).tolist()}"
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} of {len(value)}"
        for k, v in value.items():
            yield from inner(k)
            yield from inner(v)
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from inner(item)
    elif isinstance(value, (set, frozenset)):
        yield f"{type(value).__name__} {sorted(map(repr, value))}"
    elif isinstance(value, functools.partial):
        yield "partial"
        yield from inner((value.func, value.args, value.keywords))
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        yield _importable(value)
    elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
        yield f"{type(value).__module__}.{type(value).__qualname__} {_version(type(value).__module__)}"
        yield from inner(vars(value))
    else:
        raise _Unnamed


def _importable(value: Any) -> str:
    """The place of a function or class that can be imported from there."""
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    found: Any = sys.modules.get(module or "")
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is not value and found != value:
        raise _Unnamed
    builtin = module in (None, "builtins") or getattr(sys.modules[module], "__file__", None) is None
    return f"{module}.{path}" if builtin else f"{module}.{path} {_version(str(module))}"
