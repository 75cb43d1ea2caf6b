"""Keys and values that a model repeats for the heads that share them reach kernels before they are repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels.attention import attention_kernel
from kpx.passes import fusion
from tests.optional import torch

GROUP = 4


class _Repeating(torch.nn.Module):
    def forward(self, q, k, v, mask):
        batch, heads, length, size = k.shape
        wide = [
            a[:, :, None].expand(batch, heads, GROUP, length, size).reshape(batch, -1, length, size) for a in (k, v)
        ]
        return self.attend(q, *wide, mask)


class _Library(_Repeating):
    def attend(self, q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Written(_Repeating):
    def attend(self, q, k, v, mask):
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.125 + torch.where(mask, 0.0, -1e9).to(q.dtype)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def _in_jax(q, k, v, mask):
    k, v = (jnp.repeat(a, GROUP, 1) for a in (k, v))
    scores = jnp.where(mask, jnp.einsum("bhqd,bhkd->bhqk", q, k) * 0.1, -1e9)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, -1), v)


MODELS = {"PyTorch's": _Library().eval(), "written out": _Written().eval(), "in JAX": _in_jax}


@pytest.mark.parametrize("length", [1, 256])
@pytest.mark.parametrize("model", MODELS)
def test_keys_and_values_are_read_once(model, length):
    q, k = (jax.ShapeDtypeStruct((4, heads, n, 128), jnp.bfloat16) for heads, n in ((32, length), (8, 2048)))
    mask = jax.ShapeDtypeStruct((4, 1, 1, 2048), jnp.bool_)
    compiled = kpx.compile(MODELS[model], q, k, k, mask, target="cuda:h100")
    assert compiled.fusions == {"kpx.attention": 1}
    given = 2 * 2 * 4 * (2 * 8 * 2048 + 2 * 32 * length) * 128 / 2
    assert compiled.cost.bytes < 1.5 * given


@pytest.fixture
def narrow():
    """How many heads of keys a kernel for the CPU was given."""
    seen = []

    @attention_kernel.on("cpu")
    def plain(query, key, value, *arrays, **attributes):
        seen.append(key.shape[-3])
        return attention_kernel.decomposition(query, key, value, *arrays, **attributes)

    fusion.is_of_use.cache_clear()
    yield seen
    attention_kernel.implementations.remove(next(i for i in attention_kernel.implementations if i.name == "plain"))
    fusion.is_of_use.cache_clear()


@pytest.mark.parametrize("model", MODELS)
def test_what_comes_out_is_what_repeated_keys_give(model, narrow):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, 8, 16)).astype(np.float32) for heads in (8, 2, 2))
    mask = rng.random((2, 1, 8, 8)) < 0.7
    mask[..., 0] = True
    arrays = [q, k, v, mask]
    if isinstance(MODELS[model], torch.nn.Module):
        tensors = [torch.from_numpy(a) for a in arrays]
        wanted, found = MODELS[model](*tensors), kpx.optimize(MODELS[model])(*tensors)
    else:
        wanted, found = MODELS[model](*arrays), kpx.jit(MODELS[model])(*arrays)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert set(narrow) == {2}


def test_keys_alone_repeated_are_left_as_they_are(narrow):
    def function(q, k, v):
        return kpx.ops.attention(q, jnp.repeat(k, 2, 1), v)

    arrays = [
        np.ones((2, 4, 8, 16), np.float32),
        np.ones((2, 2, 8, 16), np.float32),
        np.ones((2, 4, 8, 16), np.float32),
    ]
    np.testing.assert_allclose(kpx.jit(function)(*arrays), 1, rtol=1e-6)
    assert set(narrow) == {4}
