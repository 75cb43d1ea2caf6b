"""How many fusions each model has, forward and in training: read from the module, for a target that has kernels."""

import warnings

import jax
import jax.numpy as jnp
import pytest
import torch

import kpx
from bench.cases import CASES
from bench.zoo_models import build
from kpx.bridges.torch import functional

ATTENTION, WITH_GRADIENT = "kpx.attention", "kpx.attention and its gradient"
GOLDEN = {"minilm": 6, "bert": 2, "gpt2": 2, "llama": 2, "vit": 2, "resnet50": 0, "convnext": 0, "mlp": 0}


def forward(model, inputs, target="cuda:h100"):
    return kpx.compile(model, target=target, **inputs)


def trained(model, inputs, target="cuda:h100"):
    """A step's loss and gradients, of what a model gives."""
    params, buffers, fn = functional(model)

    def loss(params, arrays):
        out, _ = fn(params, buffers, **arrays)
        leaves = [a for a in torch.utils._pytree.tree_leaves(out) if hasattr(a, "dtype")]
        return sum(jnp.sum(jnp.sin(a.astype(jnp.float32))) for a in leaves if jnp.issubdtype(a.dtype, jnp.floating))

    arrays = {name: jnp.from_dlpack(tensor.contiguous()) for name, tensor in inputs.items()}
    return kpx.compile(jax.value_and_grad(loss), params, arrays, target=target)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.models
def test_a_case_has_its_fusions(name):
    compiled = forward(*CASES[name].make(small=True, dtype=torch.bfloat16))
    assert compiled.fusions.get(ATTENTION, 0) == GOLDEN[name]


@pytest.mark.parametrize("name", [name for name, count in GOLDEN.items() if count])
@pytest.mark.models
def test_a_cases_training_step_has_its_fusions(name):
    compiled = trained(*CASES[name].make(small=True, dtype=torch.bfloat16))
    assert compiled.fusions.get(WITH_GRADIENT, 0) == GOLDEN[name]
