"""Attention by others' libraries: cuDNN, compiled for Hopper and its numbers where there is one; tokamax, where installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import registry
from kpx.kernels.attention import attention_kernel
from tests.reference import assert_closer

CUDNN = "__cudnn$fmhaSoftmax"


def attend(q, k, v, **given):
    return kpx.ops.attention(q, k, v, **{"causal": True, **given})


def step(q, k, v, **given):
    return jax.grad(lambda *a: jnp.sum(attend(*a, **given).astype(jnp.float32) ** 2), (0, 1, 2))(q, k, v)


def _specs(length=2048, size=128, dtype=jnp.bfloat16):
    return [jax.ShapeDtypeStruct((2, heads, length, size), dtype) for heads in (8, 2, 2)]


@pytest.mark.parametrize("given", [{}, {"causal": False}, {"window": 256}], ids=str)
def test_on_hopper_long_attention_is_cudnns_forward_and_backward(given):
    compiled = kpx.compile(lambda *a: step(*a, **given), *_specs(), target="cuda:h100")
    assert compiled.kernels["kpx.attention and its gradient"] == "cudnn"
    for call in (CUDNN, f"{CUDNN}Backward"):
        assert compiled.hlo.count(f'custom_call_target="{call}"') == 1
    assert compiled.memory.temp_bytes < 2 * 8 * 2048 * 2048  # half of what scores in bf16 would take


REFUSED = {
    "multiples of 8": (_specs(size=100), {}),
    "bf16 or f16 alone": (_specs(dtype=jnp.float32), {}),
    "not softcap": (_specs(), {"softcap": 30.0}),
    "not sinks": (_specs(), {"sinks": np.ones(8, np.float32)}),
    "windows that are causal alone": (_specs(), {"window": 64, "causal": False}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_cudnn_does_not_compute_is_left_to_others(says):
    specs, given = REFUSED[says]
    compiled = kpx.compile(lambda *a: attend(*a, **given), *specs, target="cuda:h200")
    assert says in compiled.kernels["kpx.attention"]
    assert compiled.kernels["kpx.attention"].startswith("flash_cuda")


def test_elsewhere_and_for_short_attention_cudnn_is_used_by_name_alone():
    for target, specs, says in (
        ("cuda:b200", _specs(), "on Hopper alone"),
        ("cuda:h100", _specs(512), "from 2048 queries"),
    ):
        assert says in kpx.compile(attend, *specs, target=target).kernels["kpx.attention"]
        named = kpx.compile(attend, *specs, target=target, config=kpx.Config(kernels={"kpx.attention": "cudnn"}))
        assert named.kernels["kpx.attention"] == "cudnn"
        assert CUDNN in named.hlo


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash_cuda", "tokamax"])
def test_on_a_gpu_each_is_attention_and_its_gradient(name):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(s.shape), s.dtype) for s in _specs()]
    found = kpx.jit(step, config=kpx.Config(kernels={"kpx.attention": name}))(*arrays)
    plain = jax.jit(step)(*arrays)
    exact = jax.jit(step)(*(a.astype(jnp.float32) for a in arrays))
    for made, theirs, wanted in zip(found, plain, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=1e-2)


# tokamax --------------------------------------------------------------------------------------


@pytest.fixture
def library():
    return pytest.importorskip("tokamax")


CASES = {
    "whole": {},
    "causal": {"causal": True},
    "in a window": {"causal": True, "window": 7},
    "capped": {"softcap": 5.0},
    "a mask": {"mask": np.random.default_rng(1).random((2, 1, 33, 33)) < 0.7},
    "a bias": {"mask": np.random.default_rng(2).standard_normal((4, 33, 33)).astype(np.float32)},
    "lengths": {"kv_lengths": np.array([5, 33])},
    "lengths in a window, and none": {"kv_lengths": np.array([0, 9]), "causal": True, "window": 4},
    "rows that see nothing": {"mask": np.arange(33)[:, None] % 3 > np.zeros(33, int)},
    "a bias that hides all": {
        "mask": np.where(np.arange(33)[:, None] % 4 > 0, 0, -np.inf) + np.zeros((33, 33), np.float32)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_tokamax_is_attention_and_its_gradient(library, case):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, heads, 33, 8)).astype(np.float32) for heads in (4, 2, 2)]
    given = {"causal": False, **CASES[case]}

    def run(*a):
        out, pull = jax.vjp(lambda *b: attend(*b, **given), *a)
        return out, *pull(jnp.cos(out))

    named = kpx.Config(kernels={"kpx.attention": "tokamax"})
    with registry.implemented_for("cpu", selection=registry.Selection(named.kernels)):
        found = jax.jit(run)(*arrays)
    plain = jax.jit(run)(*arrays)
    with jax.enable_x64(True):
        exact = run(*(a.astype(np.float64) for a in arrays))
    for made, theirs, wanted in zip(found, plain, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=2e-6)


def test_tokamax_is_chosen_by_name(library):
    specs = _specs(64, 16, jnp.float32)
    config = kpx.Config(kernels={"kpx.attention": "tokamax"})
    assert kpx.compile(attend, *specs, config=config).kernels["kpx.attention"] == "tokamax"
    assert "tokamax" not in kpx.compile(attend, *specs).kernels["kpx.attention"]


def test_tokamax_is_refused_for_what_it_means_otherwise(library):
    specs = [*_specs(64, 16, jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)]
    config = kpx.Config(kernels={"kpx.attention": "tokamax"})
    with pytest.raises(kpx.KernelError, match="it caps scores after a mask is added"):
        kpx.compile(lambda q, k, v, b: attend(q, k, v, mask=b, softcap=3.0), *specs, config=config)
    with pytest.raises(kpx.KernelError, match="for a device that is here alone"):
        kpx.compile(attend, *_specs(), target="cuda:b200", config=config)


def test_an_implementation_of_a_library_that_is_not_installed_says_how_to_install_it(monkeypatch):
    from kpx.kernels import attention_tokamax

    monkeypatch.setattr(attention_tokamax.importlib.util, "find_spec", lambda name: None)
    specs = tuple(_specs(64, 16, jnp.float32))
    given = {"scale": 1.0, "causal": True}
    refused = next(i for i in attention_kernel.on_target("cpu") if i.name == "tokamax").refuses(specs, given, False)
    assert "pip install 'kpx-xla[tokamax]'" in refused
