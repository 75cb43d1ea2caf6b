"""Mutations of hooks: added to the model, its submodules, its parameters and all modules; changed; removed."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.bridges.state.attributes import submodules
from tests.bridges.state.registry import Inapplicable, Shared, Side, mutation, pick, shared
from tests.bridges.state.weights import parameters


def first_tensor(value: Any) -> torch.Tensor | None:
    """Return the first tensor of nested tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            if (tensor := first_tensor(item)) is not None:
                return tensor
    return None


def kind_of(tensor: Any) -> str:
    return type(tensor).__name__


class Scale:
    """A forward hook that multiplies a tensor output; `by` may change later."""

    def __init__(self, by: float):
        self.by = by

    def __call__(self, module, args, output):
        if isinstance(output, torch.Tensor):
            return output * self.by
        return None


class ScaleWithKwargs(Scale):
    def __call__(self, module, args, kwargs, output):
        return super().__call__(module, args, output)


class Note:
    """A forward hook that records the output: its type, its values, and the module's class."""

    def __init__(self, log: list):
        self.log = log

    def __call__(self, module, args, output):
        tensor = first_tensor(output)
        self.log.append((type(module).__name__, kind_of(tensor), tensor.detach().clone()))


class Before:
    """A forward pre-hook that multiplies the first argument."""

    def __init__(self, by: float):
        self.by = by

    def __call__(self, module, args):
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            return (args[0] * self.by, *args[1:])
        return None


class BeforeWithKwargs(Before):
    def __call__(self, module, args, kwargs):
        changed = super().__call__(module, args)
        return None if changed is None else (changed, kwargs)


class NoteBefore:
    def __init__(self, log: list):
        self.log = log

    def __call__(self, module, args):
        tensor = first_tensor(args)
        self.log.append(("before", type(module).__name__, None if tensor is None else tensor.detach().clone()))


class ScaleGradient:
    """A full backward hook that multiplies the gradients of the inputs."""

    def __init__(self, by: float):
        self.by = by

    def __call__(self, module, grad_input, grad_output):
        return tuple(None if g is None else g * self.by for g in grad_input)


class ScaleGradientBefore(ScaleGradient):
    def __call__(self, module, grad_output):
        return tuple(None if g is None else g * self.by for g in grad_output)


class NoteGradient:
    def __init__(self, log: list):
        self.log = log

    def __call__(self, module, grad_input, grad_output):
        self.log.append(("gradient", first_tensor(grad_output).detach().clone()))


class OfGradient:
    """A hook of a parameter's gradient."""

    def __init__(self, by: float):
        self.by = by

    def __call__(self, gradient):
        return gradient * self.by


class NoteAccumulated:
    def __init__(self, log: list):
        self.log = log

    def __call__(self, parameter):
        self.log.append(("accumulated", parameter.grad.detach().clone()))


def layers(side: Side) -> list[torch.nn.Module]:
    """Return submodules whose call is one of a module with a tensor output."""
    kinds = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d, torch.nn.Tanh, torch.nn.modules.batchnorm._NormBase)
    hidden = {id(m) for a in side.model.modules() if isinstance(a, torch.nn.MultiheadAttention) for m in a.modules()}
    return [m for m in submodules(side.model) if isinstance(m, kinds) and id(m) not in hidden]


@mutation
def forward_hook(side: Side, rng: random.Random) -> None:
    hook = Scale(rng.choice([2.0, -0.5]))
    side.handles.append(pick(rng, layers(side)).register_forward_hook(hook, prepend=rng.random() < 0.3))


@mutation
def forward_hook_on_model(side: Side, rng: random.Random) -> None:
    hook = Scale(rng.choice([2.0, -0.5]))
    side.handles.append(side.handle(rng).register_forward_hook(hook))


@mutation
def forward_hook_with_kwargs(side: Side, rng: random.Random) -> None:
    hook, place = ScaleWithKwargs(rng.choice([2.0, -0.5])), rng.random()
    owner = side.handle(rng) if place < 0.4 else pick(rng, layers(side))
    side.handles.append(owner.register_forward_hook(hook, with_kwargs=True))


@mutation
def forward_hook_always(side: Side, rng: random.Random) -> None:
    owner = pick(rng, layers(side))
    side.handles.append(owner.register_forward_hook(Scale(3.0), always_call=True))


@mutation
def recording_hook(side: Side, rng: random.Random) -> None:
    side.handles.append(pick(rng, layers(side)).register_forward_hook(Note(side.log)))


@mutation
def recording_hook_on_model(side: Side, rng: random.Random) -> None:
    side.handles.append(side.handle(rng).register_forward_hook(Note(side.log)))


@mutation
def pre_hook(side: Side, rng: random.Random) -> None:
    side.handles.append(pick(rng, layers(side)).register_forward_pre_hook(Before(rng.choice([2.0, -1.0]))))


@mutation
def pre_hook_on_model(side: Side, rng: random.Random) -> None:
    hook = Before(2.0) if rng.random() < 0.5 else NoteBefore(side.log)
    side.handles.append(side.handle(rng).register_forward_pre_hook(hook))


@mutation
def pre_hook_with_kwargs(side: Side, rng: random.Random) -> None:
    hook, place = BeforeWithKwargs(rng.choice([2.0, -1.0])), rng.random()
    owner = side.handle(rng) if place < 0.4 else pick(rng, layers(side))
    side.handles.append(owner.register_forward_pre_hook(hook, with_kwargs=True))


@mutation
def backward_hook(side: Side, rng: random.Random) -> None:
    hook = ScaleGradient(2.0) if rng.random() < 0.6 else NoteGradient(side.log)
    side.handles.append(pick(rng, layers(side)).register_full_backward_hook(hook))


@mutation
def backward_pre_hook(side: Side, rng: random.Random) -> None:
    side.handles.append(pick(rng, layers(side)).register_full_backward_pre_hook(ScaleGradientBefore(-2.0)))


@mutation
def parameter_hook(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    if not module._parameters[name].requires_grad:
        raise Inapplicable
    side.handles.append(module._parameters[name].register_hook(OfGradient(rng.choice([0.5, -2.0]))))


@mutation
def accumulation_hook(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    if not module._parameters[name].requires_grad:
        raise Inapplicable
    hook = NoteAccumulated(side.log)
    side.handles.append(module._parameters[name].register_post_accumulate_grad_hook(hook))


@mutation
def hook_removed(side: Side, rng: random.Random) -> None:
    handle = pick(rng, side.handles)
    side.handles.remove(handle)
    handle.remove()


@mutation
def hooks_cleared(side: Side, rng: random.Random) -> None:
    """Remove all forward hooks of a module, those it had from its start too."""
    hooked = [m for m in side.model.modules() if m._forward_hooks]
    pick(rng, hooked)._forward_hooks.clear()


@mutation
def hook_changed(side: Side, rng: random.Random) -> None:
    """Change the number by which a hook multiplies."""
    hooks = [h for m in side.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    pick(rng, [h for h in hooks if isinstance(h, (Scale, Before))]).by = rng.choice([-3.0, 0.25])


@shared
def hook_of_all_modules(both: Shared, rng: random.Random) -> None:
    if both.sides[1].is_foreign:
        raise Inapplicable  # `torch.compile` does not see the first such hook
    handle = torch.nn.modules.module.register_module_forward_hook(ScaleLinear(rng.choice([0.5, -1.0])))
    both.undo.callback(handle.remove)


class ScaleLinear(Scale):
    """A hook of all modules that multiplies the outputs of linear layers."""

    def __call__(self, module, args, output):
        return super().__call__(module, args, output) if isinstance(module, torch.nn.Linear) else None
