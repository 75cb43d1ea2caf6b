"""Mixtures of experts: products of groups of rows, each with a matrix of its own."""

import jax
import jax.numpy as jnp
import pytest
import torch

import kpx
from kpx.bridges.torch import functional


class _Grouped(torch.nn.Module):
    def forward(self, x, y, ends):
        return torch._grouped_mm(x, y, offs=ends)


@pytest.mark.parametrize("shapes", [((24, 16), (3, 16, 8)), ((8, 24), (24, 16)), ((3, 8, 16), (16, 24))], ids=str)
def test_every_form_of_pytorchs_grouped_product_comes_over(shapes):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    if x.ndim == 2 and y.ndim == 3:  # as PyTorch wants it: column-major matrices
        y = y.mT.contiguous().mT
    ends = torch.tensor([8, 8, 24], dtype=torch.int32)
    got, wanted = kpx.optimize(_Grouped())(x, y, ends), torch._grouped_mm(x, y, offs=ends)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)


@pytest.fixture(scope="module")
def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.mark.models
def test_a_mixture_of_experts_runs_as_transformers_sets_it_up(mixtral):
    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(kpx.optimize(mixtral)(ids).logits, mixtral(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.models
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), pytest.param(torch.bfloat16, 0.1, marks=pytest.mark.slow)], ids=str
)
def test_a_mixture_of_experts_trains_in_either_precision(mixtral, dtype, tolerance):
    import copy

    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for way in (lambda model: kpx.optimize(model), lambda model: model):
        model = copy.deepcopy(mixtral).to(dtype)
        way(model)(ids).logits.float().square().mean().backward()
        grads.append([p.grad.float() for p in model.parameters()])
    for got, wanted in zip(*grads, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    ("target", "kernels"),
    [
        ("cuda:h100", {"kpx.grouped_matmul": "grouped_triton", "kpx.grouped_matmul_sums": "grouped_sums_triton"}),
        pytest.param(
            "rocm:mi300x",
            dict.fromkeys(("kpx.grouped_matmul", "kpx.grouped_matmul_sums"), "decomposition (XLA)"),
            marks=pytest.mark.slow,
        ),
        pytest.param("tpu-v5e", {"kpx.grouped_matmul": "decomposition (XLA)"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.models
def test_a_mixture_of_experts_has_its_grouped_products_in_training(mixtral, target, kernels):
    params, buffers, fn = functional(mixtral)
    ids = jnp.zeros((8, 64), jnp.int32)

    def loss(params):
        out, _ = fn(params, buffers, input_ids=ids)
        return jnp.sum(jnp.sin(out["logits"]))

    compiled = kpx.compile(jax.grad(loss), params, target=target)
    # Of 2 layers, rows by the matrices up and down, and by the cotangent; and the matrices' gradients.
    assert compiled.fusions["kpx.grouped_matmul"] == 8
    assert compiled.fusions["kpx.grouped_matmul_sums"] == 4
    assert kernels.items() <= compiled.kernels.items()
