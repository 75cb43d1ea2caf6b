"""How many fusions each model has, forward and in training: read from the module, for a target that has kernels."""

import jax
import jax.numpy as jnp
import pytest

import kpx
from bench.cases import CASES
from bench.zoo_models import build
from kpx.bridges.torch import functional
from tests.optional import torch

ATTENTION, WITH_GRADIENT = "kpx.attention", "kpx.attention and its gradient"
CASE = {"minilm": 6, "bert": 2, "gpt2": 2, "llama": 2, "vit": 2, "resnet50": 0, "convnext": 0, "mlp": 0}
# Models of the zoo: fusions forward, and in a training step.
ZOO = {
    "roberta": (2, 2), "distilbert": (2, 2), "albert": (2, 2), "modernbert": (2, 2), "electra": (2, 2), "gpt_neox": (2, 2),
    "opt": (2, 2), "mistral": (2, 2), "qwen2": (2, 2), "phi3": (2, 2), "falcon": (2, 2), "olmo2": (2, 2), "stablelm": (2, 2),
    "starcoder2": (2, 2), "mixtral": (2, 2), "dinov2": (2, 2), "deit": (2, 2), "wav2vec2": (2, 2), "blip": (2, 2),
    "gemma2": (2, 2), "gpt_oss": (2, 2), "t5": (6, 0), "swin": (2, 0),
}  # fmt: skip


# What else they have forward: an embedding that a norm follows, products by group.
EMBEDDED = {"llama", "modernbert", "mistral", "qwen2", "phi3", "falcon", "stablelm", "starcoder2", "mixtral", "gpt_oss"}
MORE = {name: {"kpx.embed_norm": 1} for name in EMBEDDED} | {"t5": {"kpx.embed_norm": 2}}
for _name in ("mixtral", "gpt_oss"):
    MORE[_name]["kpx.grouped_matmul"] = 4
# Layers with what follows them, which are found where their kernels are asked for.
NAMED = kpx.Config(kernels={"kpx.linear": "linear_triton_cuda", "kpx.gated_linear": "gated_triton_cuda"})
LAYERS = {
    "bert": {"kpx.linear": 2}, "vit": {"kpx.linear": 2}, "mlp": {"kpx.linear": 1}, "llama": {"kpx.gated_linear": 2},
}  # fmt: skip
ZOO_LAYERS = {
    "mistral": {"kpx.gated_linear": 2}, "qwen2": {"kpx.gated_linear": 2}, "gemma2": {"kpx.gated_linear": 2},
    "olmo2": {"kpx.gated_linear": 2}, "opt": {"kpx.linear": 2}, "t5": {"kpx.linear": 4}, "starcoder2": {"kpx.linear": 2},
    "roberta": {"kpx.linear": 2}, "dinov2": {"kpx.linear": 2},
}  # fmt: skip


def forward(model, inputs, target="cuda:h100", config=None):
    return kpx.compile(model, target=target, config=config, **inputs)


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
    assert compiled.fusions == ({ATTENTION: CASE[name]} if CASE[name] else {}) | MORE.get(name, {})


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.models
def test_a_cases_layers_are_found_where_they_are_asked_for(name):
    compiled = forward(*CASES[name].make(small=True, dtype=torch.bfloat16), config=NAMED)
    assert {k: n for k, n in compiled.fusions.items() if "linear" in k} == LAYERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO_LAYERS)
@pytest.mark.models
def test_a_model_of_the_zoos_layers_are_found_where_they_are_asked_for(name):
    compiled = forward(*build(name), config=NAMED)
    assert {k: n for k, n in compiled.fusions.items() if "linear" in k} == ZOO_LAYERS[name]


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
    attention, in_training = ZOO[name]
    assert forward(model, inputs).fusions == {ATTENTION: attention} | MORE.get(name, {})
    assert trained(model, inputs).fusions.get(WITH_GRADIENT, 0) == in_training
