"""On a GPU that is here: values, gradients, PyTorch's memory, and what kpx says of the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.bridges.torch.tensors import to_array, to_tensor
from kpx.hardware.target import platform_of
from tests.optional import torch
from tests.reference import assert_closer

pytestmark = pytest.mark.gpu
needs_cuda_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: PyTorch has no CUDA here")


def _mlp(x, w, v):
    return jax.nn.gelu(x @ w) @ v


def _arguments(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) / 8 for shape in ((64, 128), (128, 256), (256, 32))]


def _reference(function):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, function(*(jnp.asarray(a, jnp.float64) for a in _arguments())))


def test_values_are_no_farther_from_an_f64_reference_than_jits():
    arguments = _arguments()
    assert_closer(kpx.jit(_mlp)(*arguments), jax.jit(_mlp)(*arguments), _reference(_mlp), relative=1e-5)


def test_gradients_are_no_farther_from_an_f64_reference_than_jits():
    gradient = jax.grad(lambda *a: jnp.sum(_mlp(*a) ** 2), argnums=(0, 1, 2))
    arguments = _arguments()
    found, plain = kpx.jit(gradient)(*arguments), jax.jit(gradient)(*arguments)
    for ours, theirs, exact in zip(found, plain, _reference(gradient), strict=True):
        assert_closer(ours, theirs, exact, relative=1e-5)


def test_a_call_stays_on_the_device():
    result = kpx.jit(_mlp)(*_arguments())
    assert next(iter(result.devices())) == jax.devices()[0]


def test_the_device_is_listed_as_one_that_runs():
    here = platform_of(jax.devices()[0])
    assert any(a.can == "run" and a.target.startswith(here) for a in kpx.targets())


@needs_cuda_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_and_arrays_share_the_devices_memory_both_ways(dtype):
    tensor = torch.ones(64, 64, device="cuda").to(dtype)
    array = to_array(tensor, jax.devices()[0])
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert to_tensor(array).data_ptr() == tensor.data_ptr()


@needs_cuda_torch
def test_a_module_on_the_device_gives_tensors_on_the_device():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).cuda().eval()
    x = torch.randn(4, 64, device="cuda")
    with torch.no_grad():
        found, eager = kpx.optimize(model)(x), model(x)
        exact = model.double()(x.double())
    assert found.device == x.device
    assert_closer(found.cpu(), eager.cpu(), exact.cpu(), relative=1e-5)


@needs_cuda_torch
def test_a_training_step_on_the_device_fills_gradients_there():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 8).cuda()
    x = torch.randn(4, 64, device="cuda")
    kpx.optimize(model)(x).square().sum().backward()
    ours = model.weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert ours.device == x.device
    torch.testing.assert_close(ours, model.weight.grad, rtol=1e-4, atol=1e-4)
