"""Sequences of mutations and calls, run on an optimized model and on its eager twin, and shrunk where they differ."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.bridges.state import attributes, calls, hooks, weights  # noqa: F401  # they register their mutations
from tests.bridges.state.compare import arguments, difference, observe
from tests.bridges.state.models import KINDS
from tests.bridges.state.registry import MUTATIONS, Environment, Inapplicable, Plan, Shared, Side


@dataclasses.dataclass(frozen=True)
class Step:
    """One mutation, which draws from its own seed; steps can thus be left out alone."""

    name: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Script:
    """A model, a door of kpx, and the mutations after each of which both sides are called."""

    seed: int
    kind: str
    door: str
    grad: bool
    training: bool
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A difference from eager PyTorch after a step (-1: at the first call)."""

    step: int
    message: str


# Doors -----------------------------------------------------------------------------------------


def _optimized(model: torch.nn.Module) -> Any:
    import kpx

    return kpx.optimize(model)


def _in_place(model: torch.nn.Module) -> Any:
    import kpx

    kpx.optimize(model, inplace=True)
    return model


def _compiled(backend: str) -> Callable[[torch.nn.Module], Any]:
    return lambda model: torch.compile(model, backend=backend)


def _compiled_in_place(model: torch.nn.Module) -> Any:
    model.compile(backend="kpx")
    return model


# `eager` and `aot_eager` check the harness itself: they are PyTorch's own.
DOORS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "optimize": _optimized,
    "inplace": _in_place,
    "compile": _compiled_in_place,
    "torch.compile": _compiled("kpx"),
    "eager": _compiled("eager"),
    "aot_eager": _compiled("aot_eager"),
    "none": lambda model: model,
}
_DRAWN = ("optimize", "optimize", "inplace", "compile")


def sequence(seed: int, door: str | None = None, kind: str | None = None) -> Script:
    """Draw the sequence of a seed."""
    rng = random.Random(seed)
    drawn_kind, drawn_door = rng.choice(sorted(KINDS)), rng.choice(_DRAWN)
    grad, training = rng.random() < 0.4, rng.random() < 0.4
    by_dynamo = (door or drawn_door) not in ("optimize", "inplace")
    names = sorted(name for name, mutation in MUTATIONS.items() if mutation.is_guarded or not by_dynamo)
    steps = tuple(Step(rng.choice(names), rng.randrange(2**31)) for _ in range(rng.randint(4, 8)))
    return Script(seed, kind or drawn_kind, door or drawn_door, grad, training, steps)


def line(drawn: Script, keep: Sequence[int] | None = None) -> str:
    """Return the command that runs a sequence again."""
    text = f"python -m bench.state_fuzz --seed {drawn.seed} --steps "
    return text + ("".join(f"{i}," for i in keep) if keep else "none") + f" --door {drawn.door} --kind {drawn.kind}"


# Running ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Run:
    """The state of a sequence that is being run."""

    drawn: Script
    twin: Side
    optimized: Side
    both: Shared
    applied: list[str] = dataclasses.field(default_factory=list)


def run(drawn: Script, keep: Sequence[int] | None = None, applied: list[str] | None = None) -> Failure | None:
    """Run a sequence, or those of its steps whose indices are kept.

    Args:
        applied: takes the names of the mutations that applied, and "refused by both" where that ended the sequence.
    """
    with contextlib.ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        undo.callback(_reset)
        # Built twice, since deep copies of a parametrized module share the class that a later removal changes.
        twin, model = _built(drawn), _built(drawn)
        is_foreign = drawn.door not in ("optimize", "inplace", "none")
        if is_foreign:  # by default Dynamo sees no hook that is added after the capture
            undo.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))
        optimized = Side(model, DOORS[drawn.door](model), is_foreign=is_foreign)
        sides = [Side(twin, twin), optimized]
        both = Shared(Plan(seed=drawn.seed), Environment(grad=drawn.grad), sides, undo)
        current = _Run(drawn, sides[0], optimized, both)
        failure = _check(current, -1, drawn.seed)
        for index, step in enumerate(drawn.steps):
            if failure is not None:
                break
            if keep is not None and index not in keep:
                continue
            failure = _mutate(current, index, step)
        if failure is not None and not failure.message:
            current.applied.append("refused by both")
        if applied is not None:
            applied.extend(current.applied)
        return failure if failure is not None and failure.message else None


def _built(drawn: Script) -> torch.nn.Module:
    torch.manual_seed(drawn.seed)
    return KINDS[drawn.kind].make().train(drawn.training)


def _reset() -> None:
    torch._dynamo.reset()
    gc.collect()


def _mutate(current: _Run, index: int, step: Step) -> Failure | None:
    """Apply a step to both sides and compare them; a failure without a message ends the sequence as equal."""
    mutation = MUTATIONS[step.name]
    if mutation.of_shared:
        try:
            mutation.apply(current.both, random.Random(step.seed))
        except Inapplicable:
            return None
    else:
        torch.manual_seed(step.seed)
        try:
            mutation.apply(current.twin, random.Random(step.seed))
        except Inapplicable:
            return None
        torch.manual_seed(step.seed)
        try:
            mutation.apply(current.optimized, random.Random(step.seed))
        except Exception as error:  # whatever the optimized model refuses and eager PyTorch allows is a failure
            return Failure(index, f"{step.name} raised {type(error).__name__}: {str(error)[:500]}")
    current.applied.append(step.name)
    for repeat in range(1 + (step.seed % 3 == 0)):
        if (failure := _check(current, index, step.seed + repeat)) is not None:
            return failure
    return None


def _check(current: _Run, index: int, seed: int) -> Failure | None:
    """Call both sides and compare what can be observed."""
    environment = current.both.environment
    (wanted, error), (got, our_error) = (_observed(current, side, seed) for side in (current.twin, current.optimized))
    if error is not None or our_error is not None:
        return Failure(index, _difference_of_errors(our_error, error))
    assert got is not None
    assert wanted is not None
    text = difference(got, wanted, environment, current.twin.model)
    if text is not None:
        return Failure(index, text)
    _synchronize(current)
    return None


def _observed(current: _Run, side: Side, seed: int) -> tuple[dict[str, Any] | None, Exception | None]:
    side.log.clear()
    call = arguments(KINDS[current.drawn.kind], side, current.both.plan, seed)
    torch.manual_seed(seed)
    try:
        with current.both.environment.active():
            result = side.call(*call.args, **call.kwargs)
        return observe(side, call, result, current.both.environment), None
    except Exception as error:  # compared with the other side's
        return None, error
    finally:
        for parameter in side.model.parameters():
            parameter.grad = None


def _difference_of_errors(ours: Exception | None, eager: Exception | None) -> str:
    """Return how errors differ; an empty text where both refuse."""
    if ours is None:
        return f"no error, eager raises {type(eager).__name__}: {str(eager)[:300]}"
    if eager is None:
        return f"raises {type(ours).__name__}, eager does not: {str(ours)[:1500]}"
    from kpx.errors import KpxError

    alike = isinstance(ours, (type(eager), KpxError)) or type(ours).__module__.startswith("torch._dynamo")
    return "" if alike else f"raises {type(ours).__name__}: {str(ours)[:300]}, eager {type(eager).__name__}: {eager}"


def _synchronize(current: _Run) -> None:
    """Copy the optimized model's values into the eager twin, so that rounding does not add up over the steps.

    The optimized model stays untouched: a write would hide what it failed to see.
    """
    twin, model = current.twin.model, current.optimized.model
    for theirs, mine in ((twin.named_parameters, model.named_parameters), (twin.named_buffers, model.named_buffers)):
        sources = dict(mine())
        for name, tensor in theirs():
            _copy(tensor, sources[name])
    if getattr(twin, "last", None) is not None:
        _copy(twin.last, model.last)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.inference_mode(target.is_inference()):
        (target if target.is_inference() else target.data).copy_(source.detach())


# Shrinking -------------------------------------------------------------------------------------


def shrink(drawn: Script, failure: Failure) -> tuple[list[int], Failure]:
    """Return the fewest steps, by leaving out one at a time, after which the sides still differ."""
    keep = list(range(failure.step + 1))
    for index in reversed(range(failure.step + 1)):
        shorter = [i for i in keep if i != index]
        if (smaller := run(drawn, shorter)) is not None:
            failure, keep = smaller, [i for i in shorter if i <= smaller.step]
    return keep, failure


def report(drawn: Script, failure: Failure) -> str:
    """Shrink a failing sequence and describe it, with the line that runs it again."""
    keep, smallest = shrink(drawn, failure)
    mode = f"{'train' if drawn.training else 'eval'} mode, grad {'on' if drawn.grad else 'off'}"
    names = ", ".join(drawn.steps[i].name for i in keep) or "no mutation"
    return f"{line(drawn, keep)}\n  {drawn.kind} in {mode}, after {names}: {smallest.message}"


def check(seed: int, door: str | None = None, applied: list[str] | None = None) -> str | None:
    """Run the sequence of a seed; return its report where the sides differ."""
    drawn = sequence(seed, door)
    failure = run(drawn, applied=applied)
    return None if failure is None else report(drawn, failure)
