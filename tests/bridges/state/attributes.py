"""Mutations of mode, attributes, submodules and `forward`."""

from __future__ import annotations

import random

import torch

from tests.bridges.state import models
from tests.bridges.state.registry import Inapplicable, Shared, Side, dtype_of, mutation, normal, pick, shared, unguarded

# Mode ------------------------------------------------------------------------------------------


@mutation
def train(side: Side, rng: random.Random) -> None:
    side.handle(rng).train()


@mutation
def evaluate(side: Side, rng: random.Random) -> None:
    side.handle(rng).eval()


def submodules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for name, m in model.named_modules() if name]


@mutation
def submodule_mode(side: Side, rng: random.Random) -> None:
    on = rng.random() < 0.5
    pick(rng, submodules(side.model)).train(on)


@mutation
def normalization_frozen(side: Side, rng: random.Random) -> None:
    norms = [m for m in side.model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    pick(rng, norms).train(rng.random() < 0.3)


@mutation
def mode_of_parent(side: Side, rng: random.Random) -> None:
    torch.nn.Sequential(side.handle(rng)).train(rng.random() < 0.5)


@mutation
def training_attribute(side: Side, rng: random.Random) -> None:
    side.model.training = rng.random() < 0.5


# Attributes of the model -----------------------------------------------------------------------


@mutation
def float_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).scale = rng.choice([0.5, 1.0, 2.0, -1.5, 3])


@mutation
def int_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).offset = rng.choice([0, 1, 2, -3])


@mutation
def bool_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).flag = rng.random() < 0.7


@mutation
def str_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).mode = rng.choice(["plain", "tanh", "sin"])


@mutation
def outputs_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).returns = rng.choice(["tensor", "many", "many", "pair", "record", "transposed"])


@mutation
def list_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).steps = [rng.choice([0.5, -1.0, 2.0]) for _ in range(rng.randrange(3))]


@mutation
def list_in_place(side: Side, rng: random.Random) -> None:
    side.model.steps.append(rng.choice([0.5, -1.0, 2.0]))


@mutation
def list_item(side: Side, rng: random.Random) -> None:
    if not side.model.steps:
        raise Inapplicable
    side.model.steps[0] = rng.choice([0.75, 4.0])


@mutation
def dict_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).options = {"gain": rng.choice([0.5, 2.0])}


@mutation
def dict_item(side: Side, rng: random.Random) -> None:
    side.model.options["gain"] = rng.choice([0.5, 1.0, 2.0])


@mutation
def dict_key(side: Side, rng: random.Random) -> None:
    if "more" in side.model.options:
        del side.model.options["more"]
    else:
        side.model.options["more"] = rng.choice([-1.0, 1.5])


@mutation
def dict_tensor(side: Side, rng: random.Random) -> None:
    side.model.options["tensor"] = normal(side.model, 1) + 1


@mutation
def tensor_attribute(side: Side, rng: random.Random) -> None:
    value = normal(side.model, 1)
    side.handle(rng).extra = None if rng.random() < 0.2 else value


@mutation
def tensor_attribute_in_place(side: Side, rng: random.Random) -> None:
    if side.model.extra is None:
        raise Inapplicable
    side.model.extra.mul_(-2)


@mutation
def tensor_attribute_data(side: Side, rng: random.Random) -> None:
    if side.model.extra is None:
        raise Inapplicable
    side.model.extra.data = normal(side.model, 1)


@mutation
def function_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).function = rng.choice([None, torch.tanh, models.halve, models.cube, torch.nn.functional.relu])


@mutation
def parameter_as_attribute(side: Side, rng: random.Random) -> None:
    side.handle(rng).extra = torch.nn.Parameter(normal(side.model, 1))
    side.optimizer = None


@mutation
def attribute_deleted(side: Side, rng: random.Random) -> None:
    """Delete an instance's attribute, so that the class's is read again."""
    if "polarity" in vars(side.model):
        del side.model.polarity
    else:
        side.model.polarity = -1


@mutation
def instance_over_class(side: Side, rng: random.Random) -> None:
    side.handle(rng).class_gain = rng.choice([0.5, 2.0])


@mutation
def writes_attribute(side: Side, rng: random.Random) -> None:
    side.model.writes = rng.random() < 0.7


@mutation
def fresh_attribute(side: Side, rng: random.Random) -> None:
    side.model.fresh = rng.random() < 0.8


@mutation
def nested_attribute(side: Side, rng: random.Random) -> None:
    """Change a number or a flag of a submodule."""
    names = ("eps", "p", "negative_slope", "momentum", "heads", "disabled", "threshold", "padding_mode", "norm_first")
    places = [(m, n) for m in side.model.modules() for n in names if n in vars(m)]
    module, name = pick(rng, places)
    value = {"eps": 0.5, "p": rng.choice([0.0, 1.0, 0.5]), "negative_slope": 0.7, "momentum": 0.9, "heads": 4,
             "disabled": True, "threshold": rng.choice([-1e4, 1e4]), "padding_mode": "circular",
             "norm_first": True}[name]  # fmt: skip
    setattr(module, name, value)


@mutation
def order_attribute(side: Side, rng: random.Random) -> None:
    if "order" not in vars(side.model):
        raise Inapplicable
    order = rng.choice([["b", "a"], ["a"], [], ["b", "b", "a"]])
    if rng.random() < 0.5:
        side.handle(rng).order = order
    else:
        side.model.order[:] = order


@mutation
def cache_cleared(side: Side, rng: random.Random) -> None:
    if not hasattr(side.model, "positions"):
        raise Inapplicable
    rng.choice([side.model.positions.clear, side.model.history.clear])()
    side.model.calls = rng.randrange(3)


# What both sides share -------------------------------------------------------------------------


@shared
def class_attribute(both: Shared, rng: random.Random) -> None:
    both.set_attribute(models.Adjustable, "class_gain", rng.choice([0.5, 2.0, 3.0]))


@unguarded
def subclass_attribute(both: Shared, rng: random.Random) -> None:
    both.set_attribute(type(both.sides[0].model), "polarity", rng.choice([-1, 1, 2]))


@shared
def global_number(both: Shared, rng: random.Random) -> None:
    both.set_attribute(models, "global_gain", rng.choice([0.5, 2.0, 3.0]))


@shared
def global_dict(both: Shared, rng: random.Random) -> None:
    both.set_item(models.GLOBALS, *rng.choice([("gain", 2.0), ("gain", 0.5), ("shift", 1.0)]))


@shared
def global_function(both: Shared, rng: random.Random) -> None:
    both.set_attribute(models, "rescaled", rng.choice([models.halve, torch.sin]))


def doubled_finish(self, x, y, source):
    return self.result(x * 2, y, source)


@unguarded
def class_method(both: Shared, rng: random.Random) -> None:
    both.set_attribute(type(both.sides[0].model), "finish", doubled_finish)


# Forward ---------------------------------------------------------------------------------------


class Replacement:
    """A `forward` for an instance: the class's own, times a number."""

    def __init__(self, module: torch.nn.Module, factor: float):
        self.module = module
        self.factor = factor

    def __call__(self, x, *args, **kwargs):
        return type(self.module).forward(self.module, x * self.factor, *args, **kwargs)


@mutation
def forward_replaced(side: Side, rng: random.Random) -> None:
    """Replace the model's `forward`, on the instance."""
    factor = rng.choice([2, 3])
    model = side.model
    side.handle(rng).forward = Replacement(model, factor)


@mutation
def submodule_forward_replaced(side: Side, rng: random.Random) -> None:
    layers = [m for m in submodules(side.model) if isinstance(m, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Tanh))]
    layer = pick(rng, layers)
    layer.forward = Replacement(layer, rng.choice([2.0, 0.5]))


@mutation
def forward_restored(side: Side, rng: random.Random) -> None:
    replaced = [m for m in side.model.modules() if "forward" in vars(m)]
    del pick(rng, replaced).forward


@mutation
def method_replaced(side: Side, rng: random.Random) -> None:
    side.handle(rng).function = models.cube
    side.model.begin = BeginReplacement(side.model)


class BeginReplacement:
    """A method of the model, replaced on the instance."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        return type(self.module).begin(self.module, *args) * 0.5


# Submodules ------------------------------------------------------------------------------------


def owners(model: torch.nn.Module, kind: type) -> list[tuple[torch.nn.Module, str]]:
    """Return parents and names of the submodules of exactly one class that are called as modules."""
    hidden = (torch.nn.MultiheadAttention, models.LoRALinear)  # these read their layers' weights
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is kind and not isinstance(parent, (*hidden, torch.nn.ModuleDict))
    ]


def linear_like(model: torch.nn.Module, old: torch.nn.Linear) -> torch.nn.Linear:
    new = torch.nn.Linear(old.in_features, old.out_features, dtype=dtype_of(model))
    return new.train(old.training)


@mutation
def submodule_replaced(side: Side, rng: random.Random) -> None:
    parent, name = pick(rng, owners(side.model, torch.nn.Linear))
    setattr(parent, name, linear_like(side.model, getattr(parent, name)))
    side.optimizer = None


@mutation
def submodule_wrapped(side: Side, rng: random.Random) -> None:
    """Replace a layer by a sequence, so that parameters' names change."""
    parent, name = pick(rng, owners(side.model, torch.nn.Linear))
    setattr(parent, name, torch.nn.Sequential(getattr(parent, name), rng.choice([torch.nn.Tanh, torch.nn.ReLU])()))


@mutation
def submodule_dissolved(side: Side, rng: random.Random) -> None:
    parent, name = pick(rng, owners(side.model, torch.nn.LayerNorm))
    setattr(parent, name, torch.nn.Identity())


@mutation
def submodule_added(side: Side, rng: random.Random) -> None:
    side.handle(rng).tail = rng.choice([torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.SiLU])()


@mutation
def submodule_with_weights_added(side: Side, rng: random.Random) -> None:
    side.handle(rng).tail = torch.nn.PReLU(dtype=dtype_of(side.model))
    side.optimizer = None


@mutation
def submodule_deleted(side: Side, rng: random.Random) -> None:
    if side.model.tail is None:
        raise Inapplicable
    owner = side.handle(rng)
    del owner.tail
    side.model.tail = None


@mutation
def add_module_called(side: Side, rng: random.Random) -> None:
    if "tail" in vars(side.model):
        raise Inapplicable  # eager PyTorch refuses a name that is an attribute's
    side.handle(rng).add_module("tail", torch.nn.Softplus())


@mutation
def list_of_modules_changed(side: Side, rng: random.Random) -> None:
    if not hasattr(side.model, "layers"):
        raise Inapplicable
    layers, action = side.model.layers, rng.randrange(4)
    if action == 0:
        layers.append(torch.nn.Sigmoid())
    elif action == 1 and len(layers) > 1:
        del layers[-1]
    elif action == 2:
        layers[0] = torch.nn.Linear(models.WIDTH, models.WIDTH, dtype=dtype_of(side.model))
    else:
        layers.insert(0, torch.nn.Tanh())
    side.optimizer = None


@mutation
def dict_of_modules_changed(side: Side, rng: random.Random) -> None:
    if not hasattr(side.model, "choices"):
        raise Inapplicable
    name = rng.choice(["a", "b"])
    if rng.random() < 0.3 and name in side.model.choices:
        del side.model.choices[name]
    else:
        side.model.choices[name] = torch.nn.ELU()
    side.optimizer = None


# Adapters --------------------------------------------------------------------------------------


def adapters(model: torch.nn.Module) -> list[models.LoRALinear]:
    return [m for m in model.modules() if isinstance(m, models.LoRALinear)]


@mutation
def adapter_injected(side: Side, rng: random.Random) -> None:
    """Replace a linear layer by one with an adapter."""
    parent, name = pick(rng, owners(side.model, torch.nn.Linear))
    layer = models.LoRALinear(getattr(parent, name))
    layer.add("default")
    layer.active = ["default"]
    setattr(parent, name, layer)
    side.optimizer = None


@mutation
def adapter_set(side: Side, rng: random.Random) -> None:
    layer = pick(rng, adapters(side.model))
    if layer.merged:
        raise Inapplicable
    layer.active = rng.sample(sorted(layer.up), rng.randint(0, len(layer.up)))


@mutation
def adapter_disabled(side: Side, rng: random.Random) -> None:
    on = rng.random() < 0.6
    for layer in pick(rng, [adapters(side.model)] if adapters(side.model) else []):
        layer.disabled = on


@mutation
def adapter_merged(side: Side, rng: random.Random) -> None:
    layer = pick(rng, adapters(side.model))
    layer.unmerge() if layer.merged and rng.random() < 0.5 else layer.merge()


@mutation
def adapter_scaled(side: Side, rng: random.Random) -> None:
    layer = pick(rng, adapters(side.model))
    if layer.merged:
        raise Inapplicable
    layer.scaling[rng.choice(sorted(layer.scaling))] = rng.choice([-2.0, 0.5])


@mutation
def adapter_added(side: Side, rng: random.Random) -> None:
    layer = pick(rng, adapters(side.model))
    if layer.merged or "new" in layer.up:
        raise Inapplicable
    layer.add("new", rank=3)
    layer.active.append("new")
    side.optimizer = None


@mutation
def adapter_deleted(side: Side, rng: random.Random) -> None:
    layer = pick(rng, [a for a in adapters(side.model) if a.active and not a.merged])
    name = layer.active.pop()
    del layer.up[name], layer.down[name], layer.scaling[name]
    side.optimizer = None
