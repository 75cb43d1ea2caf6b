"""Inputs of every kind: strides, empty and 0-d tensors, NaN, infinities, negative zero; and gradients that do not exist."""

import math
import subprocess
import sys

import pytest
import torch

import kpx

F = torch.nn.functional
BASE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Mixed(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x) + x.sign() * 0.5, x.sum(-1) if x.ndim else x, 1 / x


KINDS = {
    "transposed": BASE.t(),
    "sliced": BASE[::2, 1::3],
    "expanded": BASE[:1].expand(4, 8),
    "offset": BASE[2:],
    "negative view": torch.complex(BASE, BASE).conj().imag,
    "empty": BASE[:0],
    "empty inside": BASE[:, :0],
    "0-d": torch.tensor(2.5),
    "one": BASE[:1, :1],
    "odd values": torch.tensor([[0.0, -0.0, math.nan], [math.inf, -math.inf, 1e-30]]),
    "large": torch.tensor([[3e38, -3e38], [2e-38, -2e-38]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor_gives_eagers_values(kind):
    x = KINDS[kind]
    for got, wanted in zip(kpx.optimize(Mixed())(x), Mixed()(x), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_the_sign_of_zero_is_kept():
    class Copies(torch.nn.Module):
        def forward(self, x):
            return x.clone(), x * 1, x.abs(), -x, torch.copysign(torch.ones_like(x), x)

    x = torch.tensor([0.0, -0.0])
    for got, wanted in zip(kpx.optimize(Copies())(x), Copies()(x), strict=True):
        assert torch.equal(torch.signbit(got), torch.signbit(wanted))


@pytest.mark.parametrize("training", [False, True])
def test_channels_last_images_are_read_as_they_lie(training):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    optimized = kpx.optimize(model, training=training)
    torch.testing.assert_close(optimized(image), model(image), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimized(image.contiguous()), model(image), rtol=1e-5, atol=1e-5)


def test_a_conjugated_view_is_read_conjugated():
    class Product(torch.nn.Module):
        def forward(self, x, y):
            return x @ y

    x = torch.complex(BASE, BASE.flip(0))
    torch.testing.assert_close(kpx.optimize(Product())(x.conj(), x.t()), x.conj() @ x.t())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_keep_their_width_and_wrap_as_pytorchs(dtype):
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x + x, x * x, x.sum(), x.cumsum(0), x.float().mean()

    x = torch.tensor([1, 0, 100, 77]).to(dtype)
    for got, wanted in zip(kpx.optimize(Sums())(x), Sums()(x), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)


def test_f64_is_computed_in_f64():
    class Sin(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x) ** 2 + 1e-12

    torch.testing.assert_close(kpx.optimize(Sin())(BASE.double()), Sin()(BASE.double()), rtol=1e-14, atol=1e-15)


def test_a_backward_through_an_op_with_no_gradient_names_it():
    class Step(torch.nn.Module):
        def forward(self, x):
            return torch.heaviside(x, x)

    trained = kpx.optimize(Step())
    with pytest.raises(RuntimeError, match="derivative for aten::heaviside is not implemented"):
        trained(BASE.clone().requires_grad_()).sum().backward()


def test_torch_xlas_stablehlo_comes_in():
    stablehlo = pytest.importorskip("torch_xla.stablehlo", reason="torch-xla is not installed: not run")
    import jax.numpy as jnp
    import numpy as np

    from kpx.bridges.stablehlo import load

    program = torch.export.export(torch.nn.ReLU(), (BASE,))
    function = load(stablehlo.exported_program_to_stablehlo(program).get_stablehlo_bytecode())
    np.testing.assert_allclose(function(jnp.asarray(BASE.numpy()))[0], BASE.relu().numpy())


_ASYNCHRONOUS = """
import jax, jax.numpy as jnp
jnp.ones(3).block_until_ready()  # with a client of JAX's own, programs run in threads of their own
import torch
import kpx

class Scales(torch.nn.Module):
    def forward(self, x, a, b):
        for _ in range(3):
            x = torch.tanh(x @ x)
        return x * a + b, x + b

model = Scales()
optimized = kpx.optimize(model)
x = torch.randn(200, 200)
for i in range(50):
    got, expected = optimized(x, i % 7, i % 5), model(x, i % 7, i % 5)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, atol=1e-3, rtol=1e-3)
print("the same")
"""


def test_numbers_live_until_a_program_that_runs_in_another_thread_has_read_them():
    run = subprocess.run([sys.executable, "-c", _ASYNCHRONOUS], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1:] == ["the same"], run.stderr[-2000:]
