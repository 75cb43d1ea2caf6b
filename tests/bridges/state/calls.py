"""Mutations of PyTorch's global state, of how the model is called, and of the wrapper itself."""

from __future__ import annotations

import copy
import pickle
import random

import torch

from tests.bridges.state.registry import Inapplicable, Shared, Side, mutation, shared

# Global state ----------------------------------------------------------------------------------


@shared
def autocast_toggled(both: Shared, rng: random.Random) -> None:
    both.environment.autocast = None if both.environment.autocast else torch.bfloat16


@shared
def grad_mode_toggled(both: Shared, rng: random.Random) -> None:
    both.environment.grad = not both.environment.grad


@shared
def inference_mode_toggled(both: Shared, rng: random.Random) -> None:
    both.environment.inference = not both.environment.inference


@shared
def default_dtype_set(both: Shared, rng: random.Random) -> None:
    both.undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(rng.choice([torch.float64, torch.float32]))


@shared
def threads_set(both: Shared, rng: random.Random) -> None:
    both.undo.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(rng.choice([1, 2]))


@shared
def seed_set(both: Shared, rng: random.Random) -> None:
    torch.manual_seed(rng.randrange(1000))
    both.plan.seed = rng.randrange(1000)


# Calls -----------------------------------------------------------------------------------------


@shared
def new_batch(both: Shared, rng: random.Random) -> None:
    both.plan.batch = rng.choice([1, 2, 4, 5])


@shared
def new_length(both: Shared, rng: random.Random) -> None:
    both.plan.length = rng.choice([1, 2, 3, 6, 7])


@shared
def empty_batch(both: Shared, rng: random.Random) -> None:
    both.plan.batch = 0


@shared
def layout_changed(both: Shared, rng: random.Random) -> None:
    both.plan.layout = rng.choice(["plain", "sliced", "transposed", "expanded", "offset", "inference", "parameter"])


@shared
def companion_changed(both: Shared, rng: random.Random) -> None:
    """Pass a second tensor: another one, the first again, an overlapping slice, a view, or the model's own."""
    kinds = [None, "other", "same", "overlap", "view", "buffer", "gate", "broadcast"]
    both.plan.companion = rng.choice(kinds)


@shared
def float_argument(both: Shared, rng: random.Random) -> None:
    both.plan.factor = rng.choice([0.5, 1.5, 2.5, -1.0])


@shared
def int_argument(both: Shared, rng: random.Random) -> None:
    both.plan.factor = rng.choice([1, 2, 3])


@shared
def tensor_argument(both: Shared, rng: random.Random) -> None:
    both.plan.factor = torch.tensor(rng.choice([0.5, 2.0]))


@shared
def nested_argument(both: Shared, rng: random.Random) -> None:
    both.plan.nested = not both.plan.nested


@shared
def keyword_arguments(both: Shared, rng: random.Random) -> None:
    both.plan.keywords = not both.plan.keywords


@shared
def input_that_requires_grad(both: Shared, rng: random.Random) -> None:
    both.plan.input_grad = not both.plan.input_grad


# The wrapper -----------------------------------------------------------------------------------


def copied(model):
    """Return a deep copy, where eager PyTorch can make one."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # a tensor that is no leaf of the graph of gradients, as pruning makes them
        raise Inapplicable from None


def adopt(side: Side, call) -> None:
    """Make a copy of what is called the side's own; a wrapper's copy stands for the model too."""
    side.call = call
    side.model = getattr(call, "_orig_mod", call)
    side.optimizer = None
    side.handles.clear()


@mutation
def deep_copied(side: Side, rng: random.Random) -> None:
    adopt(side, copied(side.call))


@mutation
def pickled(side: Side, rng: random.Random) -> None:
    try:
        text = pickle.dumps(side.model)
    except (RuntimeError, AttributeError, pickle.PicklingError):  # parametrized modules refuse it, for one
        raise Inapplicable from None
    if side.call is not side.model:
        text = pickle.dumps(side.call)
    adopt(side, pickle.loads(text))


@mutation
def copied_shallowly(side: Side, rng: random.Random) -> None:
    """Call a shallow copy of the wrapper; in eager PyTorch the model itself stands for it."""
    if side.call is not side.model:
        side.call = copy.copy(side.call)


@mutation
def gradients_left(side: Side, rng: random.Random) -> None:
    """Leave gradients of an earlier step, into which the next backward pass accumulates."""
    for parameter in side.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
