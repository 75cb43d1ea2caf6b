"""Kernels: a composite's name, its plain-JAX decomposition, and implementations by target.

A module holds a fused op as `stablehlo.composite "kpx.<op>"`, whose decomposition is plain StableHLO.
`kpx.passes.composites` asks this registry for an implementation when the target is known; where none
supports the case, the decomposition runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from kpx.errors import KpxError

Supports = Callable[..., "str | None"]


def supports_everything(*avals, **attributes) -> None:
    """The `supports` of an implementation with no limits."""


@dataclass(frozen=True)
class Implementation:
    """One way to run a composite on a target: a JAX function, and when it may be used."""

    name: str
    target: str
    function: Callable
    supports: Supports


@dataclass
class Kernel:
    """A fused op.

    Attributes:
        name: the composite's name, `kpx.<op>`.
        version: the composite's version; it changes when the meaning of an attribute does.
        decomposition: the reference in plain JAX. Arrays are positional, attributes are keywords.
        implementations: in order of preference.
    """

    name: str
    version: int
    decomposition: Callable
    implementations: list[Implementation] = field(default_factory=list)

    def __call__(self, *arrays, **attributes):
        """Emits the composite. Attributes are Python numbers, bools or strings."""
        return jax.lax.composite(self.decomposition, self.name, version=self.version)(*arrays, **attributes)

    def on(self, target: str, *, supports: Supports = supports_everything) -> Callable:
        """Registers an implementation; earlier ones are preferred.

        Args:
            target: a platform (`cpu`, `cuda`, `rocm`, `tpu`, `xpu`).
            supports: given the operands' `jax.ShapeDtypeStruct`s and the attributes, gives the
                reason why this case is not supported, or None.
        """

        def register(function: Callable) -> Callable:
            self.implementations.append(Implementation(function.__name__, target, function, supports))
            return function

        return register

    def choose(
        self, target: str, avals: Sequence[jax.ShapeDtypeStruct], attributes: dict[str, Any]
    ) -> tuple[Implementation | None, dict[str, str]]:
        """The first implementation for a target that supports the case, and why others do not."""
        refused = {}
        for implementation in self.implementations:
            if implementation.target != target:
                continue
            reason = implementation.supports(*avals, **attributes)
            if reason is None:
                return implementation, refused
            refused[implementation.name] = reason
        return None, refused


_KERNELS: dict[str, Kernel] = {}


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


def find(name: str) -> Kernel | None:
    """The kernel behind a composite's name, or None where it is somebody else's."""
    return _KERNELS.get(name)
