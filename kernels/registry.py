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

from kpx.errors import KpxError

Supports = Callable[..., "str | None"]


def supports_everything(*avals, **attributes) -> None:
    """The `supports` of an implementation with no limits."""


@dataclass(frozen=True)
class Implementation:
    """One way to run a composite on a target: a JAX function, and when it may be used.

    Attributes:
        supports_gradient: what is asked beside `supports` where the gradient is computed with it.
        least: the size, in two dimensions, of some batched product's result in modules that are searched for its patterns.
    """

    name: str
    target: str
    function: Callable
    supports: Supports
    supports_gradient: Supports = supports_everything
    least: int = 0


@dataclass
class Kernel:
    """A fused op.

    Attributes:
        name: the composite's name, `kpx.<op>`.
        version: the composite's version; it changes when the meaning of an attribute does.
        decomposition: the reference in plain JAX. Arrays are positional, attributes are keywords.
        implementations: in order of preference.
        transpose: where the op is linear in each of its first two arrays, the other's product with a cotangent
            (see `bilinear`).
    """

    name: str
    version: int
    decomposition: Callable
    implementations: list[Implementation] = field(default_factory=list)
    transpose: Callable | None = None

    def __call__(self, *arrays, **attributes):
        """Emits the composite. Attributes are Python numbers, bools or strings.

        Differentiated or batched, it becomes its decomposition: derivatives of every order, forward and
        reverse, and any batching are those of plain JAX. Derivatives of a `bilinear` one are kernels again, and a
        batch of them is computed one by one.
        """
        if (asked := _TARGET.get()) is not None:
            structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
            chosen, _ = self.choose(asked[0], structs, attributes, differentiated=asked[1])
            return (self.decomposition if chosen is None else chosen.function)(*arrays, **attributes)
        return _composite.bind(*arrays, kernel=self.name, attributes=tuple(sorted(attributes.items())))

    def on(
        self,
        target: str,
        *,
        supports: Supports = supports_everything,
        gradient: Supports = supports_everything,
        least: int = 0,
    ) -> Callable:
        """Registers an implementation; earlier ones are preferred.

        Args:
            target: a platform (`cpu`, `cuda`, `rocm`, `tpu`, `xpu`).
            supports: given the operands' `jax.ShapeDtypeStruct`s and the attributes, gives the
                reason why this case is not supported, or None.
            gradient: the same, of what is asked beside `supports` where the gradient is computed with it.
            least: see `Implementation`.
        """

        def register(function: Callable) -> Callable:
            self.implementations.append(Implementation(function.__name__, target, function, supports, gradient, least))
            return function

        return register

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
    ) -> tuple[Implementation | None, dict[str, str]]:
        """The first implementation for a target that supports the case, with its gradient or alone; and why others do not."""
        refused = {}
        for implementation in self.implementations:
            if implementation.target != target:
                continue
            reason = implementation.supports(*avals, **attributes)
            if reason is None and differentiated:
                reason = implementation.supports_gradient(*avals, **attributes)
            if reason is None:
                return implementation, refused
            refused[implementation.name] = reason
        return None, refused


_TARGET: contextvars.ContextVar[tuple[str, bool] | None] = contextvars.ContextVar("kpx_kernels_for", default=None)


@contextlib.contextmanager
def implemented_for(target: str, *, differentiated: bool = True) -> Iterator[None]:
    """Kernels that are called inside are their implementations for a target, with the gradients that those define."""
    token = _TARGET.set((target, differentiated))
    try:
        yield
    finally:
        _TARGET.reset(token)


_KERNELS: dict[str, Kernel] = {}

# jax.lax.composite has neither a JVP nor a batching rule; this primitive has both, and lowers to it.
_composite = Primitive("kpx_composite")


def _plain(kernel: str, attributes: tuple) -> Callable:
    return functools.partial(_KERNELS[kernel].decomposition, **dict(attributes))


@_composite.def_impl
def _run(*arrays, kernel, attributes):
    return jax.jit(_plain(kernel, attributes))(*arrays)


@_composite.def_abstract_eval
def _shape(*avals, kernel, attributes):
    result = jax.eval_shape(_plain(kernel, attributes), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    return jax.core.ShapedArray(result.shape, result.dtype)


def _emit(*arrays, kernel, attributes):
    found = _KERNELS[kernel]
    return jax.lax.composite(found.decomposition, kernel, version=found.version)(*arrays, **dict(attributes))


def _differentiate(primals, tangents, *, kernel, attributes):
    if _KERNELS[kernel].transpose is not None:
        bind = functools.partial(_composite.bind, kernel=kernel, attributes=attributes)
        parts = [
            bind(*(tangent if place == i else array for i, array in enumerate(primals)))
            for place, tangent in enumerate(tangents[:2])
            if type(tangent) is not ad.Zero
        ]
        out = bind(*primals)
        return out, sum(parts[1:], parts[0]) if parts else ad.Zero.from_primal_value(out)
    return jax.jvp(_plain(kernel, attributes), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _transpose(cotangent, *arrays, kernel, attributes):
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

        return jax.lax.map(one, batched), 0
    return jax.vmap(_plain(kernel, attributes), dims)(*arrays), 0


jax_mlir.register_lowering(_composite, jax_mlir.lower_fun(_emit, multiple_results=False))
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
