"""Mixtures of experts: products of groups of rows, each with a matrix of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kpx
from kpx.bridges.torch.aten.grouped import rows_by_group, sums_by_group

# Rows, groups, inner and outer size: one row a block and many, more groups than rows, one group.
SIZES = [(18, 4, 16, 8), (3, 8, 16, 8), (300, 3, 8, 24), (513, 1, 4, 4), (64, 64, 5, 3)]


def _case(rows, groups, inner, outer, seed):
    """Rows, matrices and ends of groups, some of them empty, and some rows of no group."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, rows + 1, groups)).astype(np.int32)
    return rng.standard_normal((rows, inner)), rng.standard_normal((groups, inner, outer)), ends


def _in_a_loop(x, weight, ends):
    wanted, start = np.zeros((len(x), weight.shape[2])), 0
    for group, end in enumerate(ends):
        wanted[start:end] = x[start:end] @ weight[group]
        start = end
    return wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_is_multiplied_with_its_groups_matrix(sizes, seed):
    x, weight, ends = _case(*sizes, seed)
    got = jax.jit(rows_by_group)(x.astype(np.float32), weight.astype(np.float32), ends)
    np.testing.assert_allclose(got, _in_a_loop(x, weight, ends), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_groups_sum_is_of_its_own_rows(sizes, seed):
    x, _, ends = _case(*sizes, seed)
    y = np.random.default_rng(seed + 9).standard_normal((len(x), 6))
    starts = [0, *ends[:-1]]
    wanted = np.stack([x[s:e].T @ y[s:e] for s, e in zip(starts, ends, strict=True)])
    got = jax.jit(sums_by_group)(x.T.astype(np.float32), y.astype(np.float32), ends)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-5)


def test_gradients_of_grouped_rows_are_those_of_a_loop():
    x, weight, ends = _case(18, 4, 16, 8, 0)
    cotangent = np.random.default_rng(1).standard_normal((18, 8))
    with jax.enable_x64(True):
        grads = jax.grad(lambda x, w: jnp.vdot(rows_by_group(x, w, ends), cotangent), (0, 1))(x, weight)
    dx = _in_a_loop(cotangent, weight.swapaxes(1, 2), ends)
    dw = np.stack([x[s:e].T @ cotangent[s:e] for s, e in zip([0, *ends[:-1]], ends, strict=True)])
    np.testing.assert_allclose(grads[0], dx, atol=1e-12)
    np.testing.assert_allclose(grads[1], dw, atol=1e-12)


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
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_a_mixture_of_experts_trains_in_either_precision(mixtral, dtype, tolerance):
    import copy

    ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    grads = []
    for way in (lambda model: kpx.optimize(model, training=True), lambda model: model):
        model = copy.deepcopy(mixtral).to(dtype)
        way(model)(ids).logits.float().square().mean().backward()
        grads.append([p.grad.float() for p in model.parameters()])
    for got, wanted in zip(*grads, strict=True):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
