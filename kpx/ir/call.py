"""A StableHLO module as a JAX function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir as jax_mlir

from kpx.errors import InputError
from kpx.ir import module as m
from kpx.ir.module import func, ir


@dataclass(frozen=True, eq=False)
class _Module:
    """A module's bytecode and signature; hashed by identity, as a JAX parameter must be."""

    bytecode: bytes
    inputs: tuple[jax.core.ShapedArray, ...]
    outputs: tuple[jax.core.ShapedArray, ...]

    def __repr__(self):
        return f"<StableHLO, {len(self.bytecode)} bytes>"


_call = Primitive("kpx_call_module")
_call.multiple_results = True


@_call.def_impl
def _run(*arrays, module: _Module):
    return jax.jit(lambda *values: _call.bind(*values, module=module))(*arrays)


@_call.def_abstract_eval
def _abstract(*_, module: _Module):
    return module.outputs


def _lower(ctx, *values, module: _Module):
    destination = ctx.module_context.module
    source = ir.Module.parse(module.bytecode)
    types = list(m.main(source).type.results)
    name = jax_mlir.merge_mlir_modules(destination, "kpx_module", source, ctx.module_context.symbol_table)
    call = func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(values))
    return list(call.results)


jax_mlir.register_lowering(_call, _lower)


def signature(module: ir.Module) -> tuple[list[jax.ShapeDtypeStruct], list[jax.ShapeDtypeStruct]]:
    """The shapes and dtypes that a module's `main` takes and gives."""
    kind = m.main(module).type

    def struct(t):
        t = ir.RankedTensorType(t)
        return jax.ShapeDtypeStruct(tuple(t.shape), m.element_dtype(t))

    return [struct(t) for t in kind.inputs], [struct(t) for t in kind.results]


def call_module(module: ir.Module) -> Callable:
    """A JAX function of positional arrays that runs a module's `main`, and gives a list.

    It can be jitted and composed, not differentiated: a module has no derivative of its own.

    Raises:
        InputError: (from the function) the arguments' shapes or dtypes are not the module's.
    """
    inputs, outputs = signature(module)
    held = _Module(
        m.bytecode(module),
        tuple(jax.core.ShapedArray(s.shape, s.dtype) for s in inputs),
        tuple(jax.core.ShapedArray(s.shape, s.dtype) for s in outputs),
    )

    def fn(*arrays):
        given = [jax.typeof(a) for a in arrays]
        if [(g.shape, g.dtype) for g in given] != [(i.shape, i.dtype) for i in held.inputs]:
            raise InputError(
                f"The module takes {_list(held.inputs)}, and was given {_list(given)}. "
                "Pass arrays of exactly these shapes and dtypes (64-bit ones need `jax.enable_x64`)."
            )
        return _call.bind(*arrays, module=held)

    return fn


def _list(avals) -> str:
    return "(" + ", ".join(f"{a.dtype.name}{list(a.shape)}" for a in avals) + ")"
