"""Composites become what runs them: a kernel's implementation for the target, or their decomposition."""

from __future__ import annotations

from typing import Any

import jax

from kpx.ir import module as m
from kpx.ir.module import func, ir, stablehlo
from kpx.kernels import registry


def lower_composites(module: ir.Module, platform: str) -> dict[str, str]:
    """Replaces every `kpx.*` composite of a module by a call, and inlines it.

    Composites of other names stay for whoever knows them; XLA runs their decomposition.

    Returns:
        What each composite runs as: `{"kpx.attention": "decomposition (XLA)"}`.
    """
    chosen: dict[str, str] = {}
    for op in list(m.walk(module.operation)):
        # The bindings give composites a class that stablehlo.CompositeOp is not a base of.
        if op.operation.name != stablehlo.CompositeOp.OPERATION_NAME:
            continue
        fields = op.operation.attributes
        kernel = registry.find(fields["name"].value)
        if kernel is None:
            continue
        avals = [jax.ShapeDtypeStruct(m.shape(v), m.element_dtype(m.tensor_type(v))) for v in op.operands]
        attributes = {name: _python(a) for name, a in m.dictionary(fields["composite_attributes"]).items()}
        implementation, refused = kernel.choose(platform, avals, attributes)
        if implementation is None:
            target = fields["decomposition"].value
        else:
            target = _spliced(module, kernel.name, implementation.function, avals, attributes)
        reasons = "".join(f"; {name}: {reason}" for name, reason in refused.items())
        label = "decomposition (XLA)" if implementation is None else implementation.name
        chosen[kernel.name] = label + reasons
        with module.context, ir.InsertionPoint(op), op.location:
            call = func.CallOp([r.type for r in op.results], ir.FlatSymbolRefAttr.get(target), list(op.operands))
        for old, new in zip(op.results, call.results, strict=True):
            old.replace_all_uses_with(new)
        op.operation.erase()
    m.inline_calls(module)
    return chosen


def _spliced(module: ir.Module, name: str, function: Any, avals: list, attributes: dict) -> str:
    """Adds an implementation, traced at a composite's types, to a module; gives its symbol."""
    with jax.enable_x64(True):
        lowered = jax.jit(lambda *arrays: function(*arrays, **attributes)).lower(*avals)
    donor = m.parse(m.text(lowered.compiler_ir("stablehlo"), large_constants=True), module.context)
    return m.merge(module, donor, name)


def _python(attribute: Any) -> Any:
    if isinstance(attribute, ir.StringAttr):
        return attribute.value
    if isinstance(attribute, ir.BoolAttr):
        return bool(attribute.value)
    return attribute.value
