"""kpx's fused ops in PyTorch models: eager, under torch.compile, through kpx, in training, and for targets that are not here."""

import pytest
import torch

import kpx
from kpx.bridges.torch import functional, ops


def _drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Attend(torch.nn.Module):
    def __init__(self, **given):
        super().__init__()
        self.given = given
        self.q, self.kv = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        heads = lambda y: y.view(*y.shape[:2], 4, 8).transpose(1, 2)  # noqa: E731
        q, k = heads(self.q(x)), heads(self.kv(x))
        return ops.attention(q, k, k, **self.given)


def test_eager_it_is_what_pytorch_computes_and_so_are_gradients():
    q, k, v = (_drawn(2, 4, 16, 8).requires_grad_() for _ in "qkv")
    for function in (
        ops.attention,
        lambda q, k, v, causal: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
    ):
        out = function(q, k, v, causal=True)
        out.sin().sum().backward()
        found = [out.detach(), *(t.grad for t in (q, k, v))]
        for t in (q, k, v):
            t.grad = None
        if function is ops.attention:
            ours = found
    for made, wanted in zip(ours, found, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [{"causal": True}, {"window": 3, "softcap": 5.0}], ids=str)
def test_through_kpx_it_is_what_eager_computes(given):
    model, x = Attend(**given).eval(), _drawn(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(kpx.optimize(model)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error::kpx.GraphBreakWarning")
def test_in_training_gradients_are_eagers():
    x = _drawn(2, 16, 32)
    found = []
    for wrap in (lambda m: m, lambda m: kpx.optimize(m), lambda m: torch.compile(m, backend="kpx")):
        torch.manual_seed(0)
        model = Attend(causal=True)
        wrap(model)(x).sin().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for eager, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)


def test_it_is_a_targets_kernel_forward_and_in_training():
    import jax
    import jax.numpy as jnp

    class Long(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(64))

        def forward(self, q, k, v):
            return ops.attention(q * self.scale, k, v, window=64, causal=True)

    model, x = Long().to(torch.bfloat16), torch.zeros(1, 4, 512, 64, dtype=torch.bfloat16)
    assert kpx.compile(model.eval(), x, x, x, target="cuda:h100").fusions == {"kpx.attention": 1}
    params, buffers, fn = functional(model)
    array = jax.ShapeDtypeStruct(tuple(x.shape), jnp.bfloat16)

    def loss(params, *arrays):
        return jnp.sum(jnp.sin(fn(params, buffers, *arrays)[0].astype(jnp.float32)))

    step = kpx.compile(jax.grad(loss, (0, 1, 2, 3)), params, array, array, array, target="tpu-v5e")
    assert step.fusions == {"kpx.attention and its gradient": 1}


def test_several_results_and_dtypes_come_back():
    x, r, w = _drawn(4, 16), _drawn(4, 16), _drawn(16)
    y, scale, total = ops.rms_norm(x, w, residual=r, dtype=torch.int8)
    assert (y.dtype, scale.shape) == (torch.int8, (4, 1))
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(
        y * scale, torch.nn.functional.rms_norm(x + r, (16,), w, eps=1e-6), rtol=0, atol=float(scale.max()) * 0.51
    )


def test_what_is_no_tensor_number_or_parameter_is_refused():
    x = _drawn(1, 4, 8)
    with pytest.raises(kpx.InputError, match=r"given `mask=\[1\]`"):
        ops.attention(x, x, x, mask=[1])
    with pytest.raises(kpx.InputError, match="unexpected keyword argument 'causall'"):
        ops.attention(x, x, x, causall=True)
    with pytest.raises(kpx.InputError, match=r"given no tensor\. For JAX arrays, use `kpx.ops.gelu`"):
        ops.gelu(3.0)


def test_every_op_is_there_with_its_own_documentation():
    for name in kpx.ops.__all__:
        assert getattr(kpx.ops, name).__doc__.splitlines()[0] in getattr(ops, name).__doc__
