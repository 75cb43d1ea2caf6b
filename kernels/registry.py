"""Kernels: a composite's name, its plain-JAX decomposition, and implementations by target.

A module holds a fused op as `stablehlo.composite "kpx.<op>"`, whose decomposition is plain StableHLO.
`kpx.passes.composites` asks this registry for an implementation when the target is known; where none
supports the case, the decomposition runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import ad, batching
from jax.interpreters import mlir as jax_mlir

from kpx.errors import KernelError, KpxError
from kpx.kernels.selection import PLAIN, RULES, Case, Selection, known, note

Supports = Callable[..., "str | None"]


def supports_everything(*avals, **attributes) -> None:
    """The `supports` of an implementation with no limits."""


@dataclass(frozen=True)
class Situation:
    """What rules know beside a case: the device, by the vendor's name, and whether the gradient is computed too."""

    kind: str
    differentiated: bool


def always(*avals, where: Situation, **attributes) -> None:
    """The `prefers` of an implementation that is used wherever it can be."""


def where_measured(*avals, where: Situation, **attributes) -> str:
    """The `prefers` of an implementation that rules never choose."""
    return "it is used by name, or where `kpx.tune` has measured it as the fastest"


@dataclass(frozen=True)
class Implementation:
    """One way to run a composite on a target: a JAX function, and when it may be used.

    Attributes:
        supports: the reason why it cannot compute a case, or None; `supports_gradient`, the same of the gradient with it.
        prefers: the reason why rules do not choose it for a case that it can compute, or None.
        least: the size, in two dimensions, of some batched product's result in modules that are searched for its patterns.
    """

    name: str
    target: str
    function: Callable
    supports: Supports = supports_everything
    supports_gradient: Supports = supports_everything
    prefers: Supports = always
    least: int = 0

    def refuses(
        self, avals: Sequence[jax.ShapeDtypeStruct], attributes: dict[str, Any], differentiated: bool
    ) -> str | None:
        """Why it cannot compute a case, or None."""
        reason = self.supports(*avals, **attributes)
        return self.supports_gradient(*avals, **attributes) if reason is None and differentiated else reason


@dataclass
class Kernel:
    """A fused op.

    Attributes:
        name: the composite's name, `kpx.<op>`.
        version: the composite's version; it changes when the meaning of an attribute does.
        decomposition: the reference in plain JAX. Arrays are positional, attributes are keywords.
        split: implementations over several devices that have parts of a sequence each (see `over_sequence`).
        implementations: of every target; `preference` names those that come first, in order.
        transpose: where the op is linear in each of its first two arrays, the other's product with a cotangent
            (see `bilinear`).
        sample: `(rng, structs, attributes)` gives arrays to measure it with, where random numbers, and zeros for integers,
            will not do.
        fixed: `(attributes)` gives the places of arrays that no gradient is measured by (masks).
    """

    name: str
    version: int
    decomposition: Callable
    implementations: list[Implementation] = field(default_factory=list)
    split: list[Implementation] = field(default_factory=list)
    preference: tuple[str, ...] = ()
    transpose: Callable | None = None
    sample: Callable | None = None
    fixed: Callable[[dict[str, Any]], tuple[int, ...]] = lambda attributes: ()

    def __call__(self, *arrays, **attributes):
        """Emits the composite. Attributes are Python numbers, bools or strings.

        Differentiated or batched, it becomes its decomposition: derivatives of every order, forward and
        reverse, and any batching are those of plain JAX. Derivatives of a `bilinear` one are kernels again, and a
        batch of them is computed one by one.
        """
        if (asked := _TARGET.get()) is not None:
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
            if asked.sequence is not None:
                selection = asked.options.get("selection", RULES)
                split, _ = self.choose_split(structs, attributes, asked.sequence.parts, selection)
                assert split is not None  # else the case was not taken
                inner = functools.partial(_unsplit, self, asked)
                return split.function(*arrays, axes=asked.sequence.axes, kernel=inner, **attributes)
            chosen, _ = self.choose(asked.target, structs, attributes, **asked.options)
            return (self.decomposition if chosen is None else chosen.function)(*arrays, **attributes)
        given = tuple(sorted(attributes.items()))
        results = _composite.bind(*arrays, kernel=self.name, attributes=given)
        return jax.tree.unflatten(jax.tree.structure(_results(self.name, given, arrays)), results)

    def on(
        self,
        target: str,
        *,
        supports: Supports = supports_everything,
        gradient: Supports = supports_everything,
        prefers: Supports = always,
        least: int = 0,
        name: str = "",
    ) -> Callable:
        """Registers an implementation.

        Args:
            target: a platform (`cpu`, `cuda`, `rocm`, `tpu`, `xpu`).
            supports: given the operands' `jax.ShapeDtypeStruct`s and the attributes, gives the
                reason why this case is not supported, or None.
            gradient: the same, of what is asked beside `supports` where the gradient is computed with it.
            prefers: given the same, and the `Situation` as `where`, the reason why rules leave a case that it can compute to
                others, or None.
            least: see `Implementation`.
            name: what it is called by; the function's name by default.
        """

        def register(function: Callable) -> Callable:
            made = Implementation(name or function.__name__, target, function, supports, gradient, prefers, least)
            self.implementations.append(made)
            return function

        return register

    def over_sequence(self, *, supports: Supports) -> Callable:
        """Registers a way to compute the op where devices have parts of its sequence each, one that comes before others where
        it was registered before them.

        The function is given each device's arrays and attributes, `axes`: names of the mesh's axes that split the sequence, and
        `kernel`: the op on arrays that are not split.

        Args:
            supports: given a device's `jax.ShapeDtypeStruct`s, the attributes, and `parts`: over how many devices the
                sequence is split; gives the reason why this case is not supported, or None.
        """

        def register(function: Callable) -> Callable:
            self.split.append(Implementation(function.__name__, "", function, supports))
            return function

        return register

    def choose_split(
        self, avals: Sequence[jax.ShapeDtypeStruct], attributes: dict[str, Any], parts: int, selection: Selection
    ) -> tuple[Implementation | None, dict[str, str]]:
        """The implementation for a sequence that is split over so many devices, or None; and why it is not another."""
        refused: dict[str, str] = {}
        asked = selection.by_name.get(self.name)
        for implementation in sorted(self.split, key=lambda i: i.name != asked):
            if (reason := implementation.supports(*avals, parts=parts, **attributes)) is None:
                return implementation, refused
            refused[implementation.name] = reason
        return None, refused

    def bilinear(self, transpose: Callable) -> Callable:
        """Says that the op is linear in each of its first two arrays; its derivatives, of any order, are kernels.

        Args:
            transpose: `(cotangent, x, y, *rest, **attributes)`, of which `x` or `y` is None, gives the cotangent by that.
        """
        self.transpose = transpose
        return transpose

    def choose(
        self,
        target: str,
        avals: Sequence[jax.ShapeDtypeStruct],
        attributes: dict[str, Any],
        *,
        differentiated: bool = False,
        kind: str = "",
        selection: Selection = RULES,
    ) -> tuple[Implementation | None, dict[str, str]]:
        """The implementation for a target and a case, with its gradient or alone, or None; and why it is not another.

        One that was asked for by name, then the one that was measured as the fastest, then the first that supports the case
        and prefers it.

        Raises:
            KernelError: what was asked for by name is not known, or does not support the case.
        """
        there = self.on_target(target)
        case = Case(self.name, self.version, tuple(avals), tuple(sorted(attributes.items())), differentiated)
        note(case)
        asked = selection.by_name.get(self.name)
        if asked is not None and asked not in {i.name for i in self.split}:
            return self._named(asked, target, there, case), {}
        refused: dict[str, str] = {}
        if (fastest := selection.fastest(case)) is not None:
            for implementation in there:
                reason = implementation.refuses(avals, attributes, differentiated)
                if implementation.name == fastest and reason is None:
                    return implementation, refused
                refused[implementation.name] = reason or f"`{fastest}` was measured as faster"
            if fastest == PLAIN:
                return None, refused
        refused.clear()
        for implementation in there:
            if implementation.prefers is where_measured:
                continue
            reason = implementation.refuses(avals, attributes, differentiated)
            if reason is None:
                reason = implementation.prefers(*avals, where=Situation(kind, differentiated), **attributes)
            if reason is None:
                return implementation, refused
            refused[implementation.name] = reason
        return None, refused

    def on_target(self, target: str) -> list[Implementation]:
        """The implementations for a target, those that are preferred first."""
        order = {name: place for place, name in enumerate(self.preference)}
        there = [i for i in self.implementations if i.target == target]
        return sorted(there, key=lambda i: order.get(i.name, len(order)))

    def _named(self, name: str, target: str, there: Sequence[Implementation], case: Case) -> Implementation | None:
        """The implementation that was asked for."""
        if name == PLAIN:
            return None
        if (found := next((i for i in there if i.name == name), None)) is None:
            raise KernelError(
                f"`{name}` is no implementation of `{self.name}` for {target}. There are {known([i.name for i in there])}."
            )
        reason = found.refuses(case.structs, dict(case.attributes), case.differentiated)
        if reason is not None:
            raise KernelError(
                f"`{name}`, asked for by name, cannot compute {case.text}: {reason}. Leave the choice to kpx, or ask for "
                f"another: {known([i.name for i in there if i.name != name])}."
            )
        return found


@dataclass(frozen=True)
class SplitSequence:
    """How a sequence is split: the mesh's axes, and over how many devices."""

    axes: tuple[str, ...]
    parts: int


@dataclass(frozen=True)
class _Asked:
    target: str
    options: dict[str, Any]
    sequence: SplitSequence | None = None


_TARGET: contextvars.ContextVar[_Asked | None] = contextvars.ContextVar("kpx_kernels_for", default=None)


@contextlib.contextmanager
def implemented_for(
    target: str,
    *,
    differentiated: bool = True,
    kind: str = "",
    selection: Selection = RULES,
    sequence: SplitSequence | None = None,
) -> Iterator[None]:
    """Kernels that are called inside are their implementations for a target, with the gradients that those define.

    Args:
        sequence: how each device has a part of a sequence, inside a `shard_map`.
    """
    options = {"differentiated": differentiated, "kind": kind, "selection": selection}
    token = _TARGET.set(_Asked(target, options, sequence))
    try:
        yield
    finally:
        _TARGET.reset(token)


def _unsplit(kernel: Kernel, asked: _Asked, *arrays, **attributes):
    """A kernel on arrays that are whole, inside of one over a split sequence."""
    with implemented_for(asked.target, **asked.options):
        return kernel(*arrays, **attributes)


_KERNELS: dict[str, Kernel] = {}

# jax.lax.composite has neither a JVP nor a batching rule; this primitive has both, and lowers to it.
_composite = Primitive("kpx_composite")
_composite.multiple_results = True


def _plain(kernel: str, attributes: tuple) -> Callable:
    return functools.partial(_KERNELS[kernel].decomposition, **dict(attributes))


def _flat(kernel: str, attributes: tuple) -> Callable:
    """The decomposition, its results as a list."""
    plain = _plain(kernel, attributes)
    return lambda *arrays: jax.tree.leaves(plain(*arrays))


def _results(kernel: str, attributes: tuple, arrays: Sequence[Any]) -> Any:
    return jax.eval_shape(_plain(kernel, attributes), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays))


@_composite.def_impl
def _run(*arrays, kernel, attributes):
    return jax.jit(_flat(kernel, attributes))(*arrays)


@_composite.def_abstract_eval
def _shapes(*avals, kernel, attributes):
    found = jax.tree.leaves(_results(kernel, attributes, avals))
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in found]


def _emit(*arrays, kernel, attributes):
    found = _KERNELS[kernel]
    made = jax.lax.composite(found.decomposition, kernel, version=found.version)(*arrays, **dict(attributes))
    return jax.tree.leaves(made)


def _differentiate(primals, tangents, *, kernel, attributes):
    if _KERNELS[kernel].transpose is not None:

        def bind(*arrays):
            return _composite.bind(*arrays, kernel=kernel, attributes=attributes)[0]

        parts = [
            bind(*(tangent if place == i else array for i, array in enumerate(primals)))
            for place, tangent in enumerate(tangents[:2])
            if type(tangent) is not ad.Zero
        ]
        out = bind(*primals)
        return [out], [sum(parts[1:], parts[0]) if parts else ad.Zero.from_primal_value(out)]
    return jax.jvp(_flat(kernel, attributes), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangents, *arrays, kernel, attributes):
    (cotangent,) = cotangents  # what is linear has one result
    place = next(i for i, a in enumerate(arrays) if ad.is_undefined_primal(a))
    if type(cotangent) is ad.Zero:
        found = ad.Zero(arrays[place].aval)
    else:
        given = (None if i == place else a for i, a in enumerate(arrays))
        transpose = _KERNELS[kernel].transpose
        assert transpose is not None  # nothing else is linear
        found = transpose(cotangent, *given, **dict(attributes))
    return [found if i == place else None for i in range(len(arrays))]


def _batch(arrays, dims, *, kernel, attributes):
    if _KERNELS[kernel].transpose is not None:  # one after another: each is a kernel
        batched = [jnp.moveaxis(a, d, 0) for a, d in zip(arrays, dims, strict=True) if d is not None]

        def one(given):
            rest = iter(given)
            each = (a if d is None else next(rest) for a, d in zip(arrays, dims, strict=True))
            return _composite.bind(*each, kernel=kernel, attributes=attributes)

        return jax.lax.map(one, batched), [0]
    results = jax.vmap(_flat(kernel, attributes), dims)(*arrays)
    return results, [0] * len(results)


jax_mlir.register_lowering(_composite, jax_mlir.lower_fun(_emit, multiple_results=True))
ad.primitive_jvps[_composite] = _differentiate
ad.primitive_transposes[_composite] = _transpose
batching.primitive_batchers[_composite] = _batch


def kernel(name: str, *, version: int) -> Callable[[Callable], Kernel]:
    """Makes a `Kernel` of its decomposition.

    Raises:
        KpxError: the name is taken, or is not `kpx.<op>`.
    """

    def register(decomposition: Callable) -> Kernel:
        if name in _KERNELS:
            raise KpxError(f"A kernel named `{name}` is registered already. Choose another name.")
        if not name.startswith("kpx."):
            raise KpxError(f"`{name}` is not a kernel's name. Names have the form `kpx.<op>`.")
        _KERNELS[name] = Kernel(name, version, decomposition)
        return _KERNELS[name]

    return register


def kernels() -> list[Kernel]:
    """Every kernel that is registered."""
    return list(_KERNELS.values())


def calls(jaxpr: Any) -> Iterator[tuple[Kernel, tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]]:
    """The kernels that a jaxpr calls, each with its operands' types and its attributes."""
    for equation in jaxpr.eqns:
        if equation.primitive is _composite:
            structs = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars)
            yield _KERNELS[equation.params["kernel"]], structs, dict(equation.params["attributes"])
        for inner in jaxprs_in_params(equation.params):
            yield from calls(inner)


def find(name: str) -> Kernel | None:
    """The kernel behind a composite's name, or None where it is somebody else's."""
    return _KERNELS.get(name)
