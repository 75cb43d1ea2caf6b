"""Mutations of parameters, buffers, dtypes, parametrizations and gradients."""

from __future__ import annotations

import io
import random

import torch
from torch.nn.utils import parametrizations, parametrize, prune

from tests.bridges.state import models
from tests.bridges.state.registry import Inapplicable, Side, dtype_of, mutation, normal, pick


def parameters(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """Return modules and names of the parameters that a module uses under their own name."""
    return [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is not None]


def buffers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    return [(m, n) for m in model.modules() for n, b in m._buffers.items() if b is not None and b.is_floating_point()]


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Return other positive-mean values of the same shape, dtype and memory format."""
    values = torch.rand(tensor.shape, dtype=torch.float64) * 0.6
    return torch.empty_like(tensor, requires_grad=False).copy_(values)


def plain_linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [
        m
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and type(m) is torch.nn.Linear and "weight" in m._parameters
    ]


# Parameters ------------------------------------------------------------------------------------


@mutation
def parameter_replaced(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    setattr(module, name, torch.nn.Parameter(like(module._parameters[name])))
    side.optimizer = None


@mutation
def parameter_data_swapped(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    module._parameters[name].data = like(module._parameters[name])


@mutation
def parameter_in_place(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    with torch.no_grad():
        module._parameters[name].copy_(like(module._parameters[name]))


@mutation
def parameter_through_data(side: Side, rng: random.Random) -> None:
    """Write through `.data`, which advances no version counter of the parameter."""
    module, name = pick(rng, parameters(side.model))
    module._parameters[name].data.mul_(-0.5)


@mutation
def parameter_through_detached(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    module._parameters[name].detach().view(-1)[:1].add_(1)


@mutation
def parameter_through_numpy(side: Side, rng: random.Random) -> None:
    """Write the memory itself, which no version counter sees."""
    module, name = pick(rng, parameters(side.model))
    tensor = module._parameters[name].detach()
    if tensor.dtype is torch.bfloat16:
        raise Inapplicable
    tensor.numpy()[...] *= -1.5


@mutation
def parameter_transposed_in_memory(side: Side, rng: random.Random) -> None:
    layer = pick(rng, plain_linears(side.model))
    layer.weight.data = like(layer.weight).T.contiguous().T


@mutation
def bias_removed(side: Side, rng: random.Random) -> None:
    layers = [m for m in plain_linears(side.model) if m.bias is not None]
    pick(rng, layers).bias = None
    side.optimizer = None


@mutation
def bias_added(side: Side, rng: random.Random) -> None:
    layer = pick(rng, [m for m in plain_linears(side.model) if m.bias is None])
    layer.bias = torch.nn.Parameter(normal(side.model, layer.weight.shape[0]))
    side.optimizer = None


@mutation
def head_resized(side: Side, rng: random.Random) -> None:
    """Give the last layer another width."""
    head = getattr(side.model, "head", None)
    if type(head) is not torch.nn.Linear or "weight" not in head._parameters or hasattr(side.model, "layers"):
        raise Inapplicable
    width = rng.choice([5, 8])
    with torch.no_grad():
        head.weight = torch.nn.Parameter(normal(side.model, width, head.weight.shape[1]))
        head.bias = torch.nn.Parameter(normal(side.model, width))
    side.optimizer = None


@mutation
def parameter_deleted(side: Side, rng: random.Random) -> None:
    """Delete a layer's bias and put a buffer of the same name in its place."""
    layer = pick(rng, [m for m in plain_linears(side.model) if "bias" in m._parameters and m.bias is not None])
    value = like(layer.bias)
    del layer.bias
    layer.register_buffer("bias", value)
    side.optimizer = None


@mutation
def parameters_tied(side: Side, rng: random.Random) -> None:
    layers = [m for m in plain_linears(side.model) if m.weight.shape == (models.WIDTH, models.WIDTH)]
    if len(layers) < 2:
        raise Inapplicable
    first, second = rng.sample(layers, 2)
    second.weight = first.weight
    side.optimizer = None


@mutation
def requires_grad_toggled(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    module._parameters[name].requires_grad_(not module._parameters[name].requires_grad)


@mutation
def requires_grad_of_all(side: Side, rng: random.Random) -> None:
    side.handle(rng).requires_grad_(rng.random() < 0.6)


@mutation
def optimizer_step(side: Side, rng: random.Random) -> None:
    """Step on gradients by seed, with one optimizer while the parameters are the same."""
    kind = rng.choice(["sgd", "adam"])
    held = [p for p in side.model.parameters() if p.requires_grad]
    if not held:
        raise Inapplicable
    if side.optimizer is None or [id(p) for p in side.optimizer.param_groups[0]["params"]] != [id(p) for p in held]:
        make = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
        side.optimizer = make(held, lr=0.1)
    for p in held:
        p.grad = like(p) - 0.2
    side.optimizer.step()
    side.optimizer.zero_grad()


@mutation
def state_dict_loaded(side: Side, rng: random.Random) -> None:
    owner = side.handle(rng)
    state = {k: like(v) if v.is_floating_point() else v.clone() for k, v in side.model.state_dict().items()}
    owner.load_state_dict(state)


@mutation
def state_dict_assigned(side: Side, rng: random.Random) -> None:
    owner = side.handle(rng)
    state = {k: like(v) if v.is_floating_point() else v.clone() for k, v in side.model.state_dict().items()}
    owner.load_state_dict(state, assign=True)
    side.optimizer = None


@mutation
def state_saved_and_loaded(side: Side, rng: random.Random) -> None:
    """Save the state through the wrapper or the model, change the weights, and load it again."""
    stream = io.BytesIO()
    torch.save(side.handle(rng).state_dict(), stream)
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.zero_()
    stream.seek(0)
    side.handle(rng).load_state_dict(torch.load(stream, weights_only=True))


@mutation
def tensors_swapped(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, parameters(side.model))
    parameter = module._parameters[name]
    if parameter.grad_fn is not None or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise Inapplicable
    new = torch.nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
    parameter.data, new.data = new.data, parameter.data


# Buffers ---------------------------------------------------------------------------------------


@mutation
def buffer_in_place(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, buffers(side.model))
    module._buffers[name].copy_(like(module._buffers[name]) + 0.1)


@mutation
def buffer_replaced(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, buffers(side.model))
    setattr(module, name, like(module._buffers[name]) + 0.1)


@mutation
def buffer_data_swapped(side: Side, rng: random.Random) -> None:
    module, name = pick(rng, buffers(side.model))
    module._buffers[name].data = like(module._buffers[name]) + 0.1


@mutation
def buffer_registered(side: Side, rng: random.Random) -> None:
    side.handle(rng).register_buffer("optional", normal(side.model, 1), persistent=rng.random() < 0.5)


@mutation
def buffer_removed(side: Side, rng: random.Random) -> None:
    if side.model.optional is None:
        raise Inapplicable
    side.handle(rng).optional = None


@mutation
def mask_written(side: Side, rng: random.Random) -> None:
    if not hasattr(side.model, "mask"):
        raise Inapplicable
    side.model.mask[:, 0] = True
    side.model.mask[2, 1] = not bool(side.model.mask[2, 1])


# Dtypes ----------------------------------------------------------------------------------------


def _cast_attributes(model: torch.nn.Module) -> None:
    """Cast the tensor that is a plain attribute as well."""
    if "extra" in vars(model) and model.extra is not None:
        model.extra = model.extra.detach().to(dtype_of(model))


@mutation
def made_double(side: Side, rng: random.Random) -> None:
    side.handle(rng).double()
    _cast_attributes(side.model)


@mutation
def made_bfloat16(side: Side, rng: random.Random) -> None:
    side.handle(rng).bfloat16()
    _cast_attributes(side.model)


@mutation
def made_float(side: Side, rng: random.Random) -> None:
    side.handle(rng).float()
    _cast_attributes(side.model)


@mutation
def moved_and_formatted(side: Side, rng: random.Random) -> None:
    kwargs = {"memory_format": torch.channels_last} if rng.random() < 0.5 else {"device": "cpu"}
    side.handle(rng).to(**kwargs)


@mutation
def applied(side: Side, rng: random.Random) -> None:
    side.handle(rng).apply(_shrink)


def _shrink(module: torch.nn.Module) -> None:
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data.mul_(0.75)


# Parametrizations ------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """A parametrization: a weight times a number."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, weight):
        return weight * self.by

    def right_inverse(self, weight):
        return weight / self.by


def free_linears(side: Side) -> list[torch.nn.Linear]:
    """Return linear layers whose weight nothing else refers to."""
    counts: dict[int, int] = {}
    for module in side.model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    layers = [
        m
        for m in side.model.modules()
        if type(m) is torch.nn.Linear and "weight" in m._parameters and counts[id(m.weight)] == 1
    ]
    return [m for m in layers if not any(isinstance(h, prune.BasePruningMethod) for h in m._forward_pre_hooks.values())]


@mutation
def parametrization_added(side: Side, rng: random.Random) -> None:
    layer = pick(rng, free_linears(side))
    parametrize.register_parametrization(layer, "weight", Scaled(rng.choice([0.5, 2.0])))
    side.optimizer = None


@mutation
def parametrization_number(side: Side, rng: random.Random) -> None:
    pick(rng, [m for m in side.model.modules() if isinstance(m, Scaled)]).by = rng.choice([-1.0, 3.0])


@mutation
def parametrization_removed(side: Side, rng: random.Random) -> None:
    layer = pick(rng, [m for m in side.model.modules() if parametrize.is_parametrized(m, "weight")])
    if layer._parameters.get("bias", 0) is None and not layer.parametrizations.weight:
        raise Inapplicable
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    side.optimizer = None


@mutation
def weight_norm_added(side: Side, rng: random.Random) -> None:
    parametrizations.weight_norm(pick(rng, free_linears(side)))
    side.optimizer = None


@mutation
def spectral_norm_added(side: Side, rng: random.Random) -> None:
    layer = pick(rng, free_linears(side))
    parametrizations.spectral_norm(layer)
    side.optimizer = None


@mutation
def parametrization_cached(side: Side, rng: random.Random) -> None:
    """Assign through a parametrization."""
    layer = pick(rng, [m for m in side.model.modules() if hasattr(m, "parametrizations") and _is_assignable(m)])
    layer.weight = like(layer.weight.detach())


def _is_assignable(module: torch.nn.Module) -> bool:
    return all(isinstance(p, Scaled) for p in module.parametrizations.weight)


@mutation
def pruned(side: Side, rng: random.Random) -> None:
    layer = pick(rng, free_linears(side))
    if rng.random() < 0.5:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        prune.ln_structured(layer, "weight", amount=0.25, n=2, dim=0)
    side.optimizer = None


@mutation
def pruning_removed(side: Side, rng: random.Random) -> None:
    layer = pick(rng, [m for m in side.model.modules() if "weight_orig" in m._parameters])
    prune.remove(layer, "weight")
    side.optimizer = None


# Averages --------------------------------------------------------------------------------------


@mutation
def averaged(side: Side, rng: random.Random) -> None:
    """Take one step of an exponential moving average towards other weights."""
    held = list(side.model.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(held, [like(p) for p in held], 0.5)


@mutation
def cast_for_export(side: Side, rng: random.Random) -> None:
    """Cast to another dtype and back, which replaces every storage."""
    owner, back = side.handle(rng), dtype_of(side.model)
    owner.to(torch.float64).to(back)
