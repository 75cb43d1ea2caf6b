"""Composites become what runs them: a kernel's implementation for the target, or their decomposition."""

from __future__ import annotations

import collections
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kpx.errors import RewriteWarning
from kpx.ir import cost
from kpx.ir import module as m
from kpx.ir.module import func, ir, stablehlo
from kpx.jax_internals import lower_alone
from kpx.kernels import patterns, registry
from kpx.kernels.selection import RULES, Selection
from kpx.passes import known_masks


@dataclass(frozen=True)
class Device:
    """What kernels are chosen for: a platform, and a device of it by the vendor's name.

    Attributes:
        is_known: whether it is in the table of chips. Kernels have been compiled for those; on another (an older GPU, one
            with less on-chip memory) they might not compile.
        selection: what is known of kernels on it beside their rules.
    """

    platform: str
    kind: str
    is_known: bool = True
    selection: Selection = RULES


@dataclass(frozen=True)
class Choice:
    """What runs a composite: a JAX function, or its decomposition where that is None; and why not others.

    Attributes:
        label: what reports say of it.
    """

    function: Callable | None
    label: str


def decompose_unsupported(module: ir.Module, device: Device | None) -> dict[str, str]:
    """Inlines the decomposition of every `kpx.*` composite that no kernel takes on a platform, in place.

    Args:
        device: whose kernels may be used; None for no kernels at all.

    Returns:
        What each of them runs as.
    """
    return _lower(module, device, _plain)


def _plain(op: Any, choice: Choice) -> Choice | None:
    """What is decomposed at once: what no kernel takes, and attention whose mask fusion finds an attribute for."""
    if choice.function is None:
        return choice
    masked = [known_masks.is_by_position(v) for v in op.operands if m.element_type(v) == "i1"]
    plain = op.operation.attributes["name"].value == "kpx.attention" and attributes(op).keys() <= {"scale", "causal"}
    return Choice(None, "") if masked and all(masked) and plain and m.rank(op.operands[0]) == 4 else None


def lower_composites(module: ir.Module, device: Device | None) -> dict[str, str]:
    """Inlines what runs every `kpx.*` composite, in place.

    Composites of other names stay for whoever knows them; XLA runs their decomposition.

    Args:
        device: whose kernels may be used; None for no kernels at all.

    Returns:
        What each composite runs as: `{"kpx.attention": "decomposition (XLA)"}`.
    """
    chosen: dict[str, str] = {}
    while found := _lower(module, device, lambda op, choice: choice):
        chosen |= found  # what takes a fusion's place may be made of composites
    return chosen


def _lower(module: ir.Module, device: Device | None, taken: Callable[[Any, Choice], Choice | None]) -> dict[str, str]:
    chosen: dict[str, str] = {}
    choices: dict[tuple, Choice] = {}
    any_left = False  # of what is not reported
    for op in list(composites(module)):
        fields = op.operation.attributes
        name, avals = fields["name"].value, tuple(map(struct, op.operands))
        stated = attributes(op)
        case = (name, avals, tuple(sorted(stated.items())))
        if case not in choices:
            choices[case] = _choose(name, device, avals, stated)
        if (choice := taken(op, choices[case])) is None:
            continue
        target = fields["decomposition"].value
        if choice.function is not None:
            try:
                flops = cost.product_flops(m.walk(m.functions(module)[target]))
                target = spliced(module, name, functools.partial(choice.function, **stated), avals, device, flops)
            except Exception as error:  # a kernel may be anyone's, and must not stop the model
                choice = choices[case] = _failed(name, choice, error)
        if not choice.label:
            any_left = True
        elif choice.function is None or patterns.find(name) is None:  # a fusion's kernels tell of themselves
            chosen[_label(name)] = choice.label
        else:
            chosen.setdefault(_label(name), choice.label)
        call_instead(op, target)
    if chosen or any_left:
        m.inline_calls(module)
    return chosen


def call_instead(op: Any, symbol: str) -> None:
    """Puts a call of a function of its module in an op's place."""
    with op.operation.context, ir.InsertionPoint(op), op.location:
        call = func.CallOp([r.type for r in op.results], ir.FlatSymbolRefAttr.get(symbol), list(op.operands))
    for old, new in zip(op.results, call.results, strict=True):
        old.replace_all_uses_with(new)
    op.operation.erase()


def _failed(name: str, choice: Choice, error: Exception) -> Choice:
    why = f"it raised {type(error).__name__}: {error}"
    warnings.warn(
        f"The kernel `{choice.label}` for `{_label(name)}` was left out: {why}. The model runs without it; please report this.",
        RewriteWarning,
        stacklevel=2,
    )
    return Choice(None, f"decomposition (XLA); {choice.label}: {why}")


def composites(module: ir.Module) -> Iterator[Any]:
    """The composites of a module that are kpx's, fusions included."""
    for op in m.walk(module.operation):
        # The bindings give composites a class that stablehlo.CompositeOp is not a base of.
        if op.operation.name == stablehlo.CompositeOp.OPERATION_NAME:
            name = op.operation.attributes["name"].value
            if registry.find(name) is not None or patterns.find(name) is not None:
                yield op


def count(module: ir.Module) -> dict[str, int]:
    """How many composites of each kind a module has, fusions by what they were recognised as."""
    return dict(collections.Counter(_label(op.operation.attributes["name"].value) for op in composites(module)))


def _label(composite: str) -> str:
    pattern = patterns.find(composite)
    return composite if pattern is None else pattern.label


def _choose(name: str, device: Device | None, avals: tuple, attributes: dict[str, Any]) -> Choice:
    pattern = patterns.find(name)
    if pattern is None:
        kernel = registry.find(name)
        assert kernel is not None  # `composites` gives no others
        implementation, refused = (None, {}) if device is None else chosen_for(kernel, device, avals, attributes)
        function = None if implementation is None else implementation.function
        label = "decomposition (XLA)" if implementation is None else implementation.name
    else:
        return replacement(pattern, device, avals, attributes)
    return Choice(function, label + _reasons(refused))


def chosen_for(
    kernel: registry.Kernel, device: Device, avals: tuple, attributes: dict[str, Any], differentiated: bool = False
) -> tuple[registry.Implementation | None, dict[str, str]]:
    """A kernel's implementation on a device (see `Kernel.choose`)."""
    options = {"kind": device.kind, "selection": device.selection}
    return kernel.choose(device.platform, avals, attributes, differentiated=differentiated, **options)


def replacement(
    pattern: patterns.Pattern,
    device: Device | None,
    avals: tuple,
    attributes: dict[str, Any],
    *,
    differentiated: bool = False,
    sequence: registry.SplitSequence | None = None,
) -> Choice:
    """A pattern's replacement, where every kernel that it calls has an implementation, and otherwise why not."""
    if device is None:
        return Choice(None, AS_IT_WAS)
    with jax.enable_x64(_wide(avals)):
        jaxpr = jax.make_jaxpr(lambda *arrays: pattern.replace(*arrays, **attributes))(*avals)
    refused: dict[str, str] = {}
    names: dict[str, None] = {}
    for kernel, structs, stated in registry.calls(jaxpr.jaxpr):
        if sequence is None:
            implementation, reasons = chosen_for(kernel, device, structs, stated, differentiated)
        else:
            implementation, reasons = kernel.choose_split(structs, stated, sequence.parts, device.selection)
        refused |= reasons
        if implementation is None:
            return Choice(None, AS_IT_WAS + _reasons(refused))
        names[implementation.name] = None
    return Choice(pattern.replace, (", ".join(names) or "its replacement") + _reasons(refused))


AS_IT_WAS = "as it was (XLA)"


def _reasons(refused: dict[str, str]) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in refused.items())


def spliced(module: ir.Module, name: str, function: Callable, avals: tuple, device: Device | None, flops: float) -> str:
    """Adds an implementation, traced at a composite's types, to a module; gives its symbol.

    Args:
        flops: of the products that it replaces.
    """
    assert device is not None  # nothing is chosen without one
    with jax.enable_x64(_wide(avals)):
        lowered = lower_alone(function, avals, device.platform, device.kind)
    donor = m.parse(m.text(lowered, large_constants=True), module.context)
    cost.tell_flops([donor], flops)
    return m.merge(module, donor, name)


def _wide(avals: Sequence[jax.ShapeDtypeStruct]) -> bool:
    """Whether 64-bit dtypes are needed; Pallas's kernels do without."""
    return any(aval.dtype.itemsize == 8 for aval in avals)


def struct(value: m.Value) -> jax.ShapeDtypeStruct:
    """A value's shape and dtype."""
    return jax.ShapeDtypeStruct(m.shape(value), m.element_dtype(m.tensor_type(value)))


def attributes(op: Any) -> dict[str, Any]:
    """A composite's attributes, as Python numbers, bools and strings."""
    fields = op.operation.attributes
    given = m.dictionary(fields["composite_attributes"]) if "composite_attributes" in fields else {}
    return {key: _python(a) for key, a in given.items()}


def _python(attribute: Any) -> Any:
    if isinstance(attribute, ir.StringAttr):
        return attribute.value
    if isinstance(attribute, ir.BoolAttr):
        return bool(attribute.value)
    return attribute.value
