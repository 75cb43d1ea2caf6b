"""How many fusions each model has, forward and in training: read from the module, for a target that has kernels."""

import jax
import jax.numpy as jnp
import pytest
import torch

import kpx
from bench.cases import CASES
from bench.zoo_models import build
from kpx.bridges.torch import functional

ATTENTION, WITH_GRADIENT = "kpx.attention", "kpx.attention and its gradient"
CASE = {"minilm": 6, "bert": 2, "gpt2": 2, "llama": 2, "vit": 2, "resnet50": 0, "convnext": 0, "mlp": 0}
# Models of the zoo: fusions forward, and in a training step.
ZOO = {
    "roberta": (2, 2), "distilbert": (2, 2), "albert": (2, 2), "modernbert": (2, 2), "electra": (2, 2), "gpt_neox": (2, 2),
    "opt": (2, 2), "mistral": (2, 2), "qwen2": (2, 2), "phi3": (2, 2), "falcon": (2, 2), "olmo2": (2, 2), "stablelm": (2, 2),
    "starcoder2": (2, 2), "mixtral": (2, 2), "dinov2": (2, 2), "deit": (2, 2), "wav2vec2": (2, 2), "blip": (2, 2),
    "gemma2": (2, 2), "gpt_oss": (2, 2), "t5": (6, 0), "swin": (2, 0),
}  # fmt: skip


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


@pytest.mark.parametrize("name", CASE)
@pytest.mark.models
def test_a_case_has_its_fusions(name):
    compiled = forward(*CASES[name].make(small=True, dtype=torch.bfloat16))
    assert compiled.fusions.get(ATTENTION, 0) == CASE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, count in CASE.items() if count])
@pytest.mark.models
def test_a_cases_training_step_has_its_fusions(name):
    compiled = trained(*CASES[name].make(small=True, dtype=torch.bfloat16))
    assert compiled.fusions.get(WITH_GRADIENT, 0) == CASE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.models
def test_a_model_of_the_zoo_has_its_fusions_forward_and_in_training(name):
    model, inputs = build(name)
    model = model.eval()
    found = forward(model, inputs).fusions.get(ATTENTION, 0), trained(model, inputs).fusions.get(WITH_GRADIENT, 0)
    assert found == ZOO[name]
