"""The registry of the fuzz's mutations, and what they are applied to."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Inapplicable(Exception):
    """A mutation does not apply to the model as it is now; the step is skipped on both sides."""


@dataclasses.dataclass
class Side:
    """One of the two models that must agree: eager PyTorch's, or the optimized one.

    Attributes:
        model: the user's own module.
        call: what is called; the module itself in eager PyTorch.
        log: what hooks record.
        handles: removable handles of hooks.
        is_foreign: it is called through `torch.compile`, whose wrapper's state has names of its own.
    """

    model: torch.nn.Module
    call: Any
    log: list[Any] = dataclasses.field(default_factory=list)
    handles: list[Any] = dataclasses.field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    is_foreign: bool = False

    def handle(self, rng: random.Random) -> Any:
        """Return the wrapper or the model itself, by chance."""
        return self.call if rng.random() < 0.5 and not self.is_foreign else self.model


@dataclasses.dataclass
class Plan:
    """How the models are called."""

    batch: int = 3
    length: int = 4
    layout: str = "plain"
    companion: str | None = None
    factor: Any = 1.0
    nested: bool = False
    keywords: bool = False
    input_grad: bool = False
    seed: int = 0


@dataclasses.dataclass
class Environment:
    """PyTorch's global state around a call."""

    grad: bool = True
    inference: bool = False
    autocast: torch.dtype | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Set the grad mode, inference mode and autocast for a call."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.inference:
                stack.enter_context(torch.inference_mode())
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            yield


@dataclasses.dataclass
class Shared:
    """What both sides share: the call's plan, PyTorch's global state, and a stack of undos."""

    plan: Plan
    environment: Environment
    sides: list[Side]
    undo: contextlib.ExitStack

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute until the sequence ends."""
        missing = object()
        before = vars(owner).get(name, missing)
        if before is missing:
            self.undo.callback(delattr, owner, name)
        else:
            self.undo.callback(setattr, owner, name, before)
        setattr(owner, name, value)

    def set_item(self, owner: dict, name: str, value: Any) -> None:
        """Set an item of a dict until the sequence ends."""
        self.undo.callback(owner.__setitem__, name, owner[name])
        owner[name] = value


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A kind of mutation: of each side, or of what both share.

    Attributes:
        is_guarded: Dynamo sees it. What it does not see is drawn for kpx's own doors alone.
    """

    name: str
    apply: Callable[[Any, random.Random], None]
    of_shared: bool
    is_guarded: bool = True


MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Callable[[Side, random.Random], None]) -> Callable[[Side, random.Random], None]:
    """Register a mutation that is applied to each side, with the same random numbers."""
    MUTATIONS[function.__name__] = Mutation(function.__name__, function, False)
    return function


def shared(function: Callable[[Shared, random.Random], None]) -> Callable[[Shared, random.Random], None]:
    """Register a mutation of what both sides share, applied once."""
    MUTATIONS[function.__name__] = Mutation(function.__name__, function, True)
    return function


def unguarded(function: Callable[[Shared, random.Random], None]) -> Callable[[Shared, random.Random], None]:
    """Register a mutation of what both sides share that Dynamo does not guard."""
    MUTATIONS[function.__name__] = Mutation(function.__name__, function, True, is_guarded=False)
    return function


def pick(rng: random.Random, items: Any) -> Any:
    """Return one of the items.

    Raises:
        Inapplicable: there are none.
    """
    items = list(items)
    if not items:
        raise Inapplicable
    return rng.choice(items)


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype that the model computes in."""
    return model.get_parameter("gate").dtype if model.gate is not None else torch.float32


def normal(model: torch.nn.Module, *shape: int, size: float = 0.3) -> torch.Tensor:
    """Return a normal tensor of the model's dtype, from the global generator."""
    return (torch.randn(*shape, dtype=torch.float64) * size).to(dtype_of(model))
