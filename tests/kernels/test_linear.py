"""Linear layers with their epilogues, and gated ones: kernels interpreted against f64, found however written, left by rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.kernels import linear, linear_gpu, linear_tpu
from tests.optional import torch
from tests.reference import assert_closer

pytest.importorskip("triton")

FORMS = {
    "linear": ("linear_kernel", "linear_triton", ""),
    "bias and residual": ("linear_kernel", "linear_triton", "bias residual"),
    "gated": ("gated_kernel", "gated_triton", None),
}


def _arrays(rng, rows, size, width, form, transposed, dtype):
    shape = (width, size) if transposed else (size, width)
    weights = [rng.standard_normal(shape) / size**0.5 for _ in range(2 if form == "gated" else 1)]
    further = [rng.standard_normal(s) for s in ((width,), (rows, width))] if form == "bias and residual" else []
    return [a.astype(dtype) for a in (rng.standard_normal((rows, size)), *weights, *further)]


def _both(function, cotangent):
    def run(*arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(cotangent.astype(out.dtype))

    return run


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("silu", np.float16), ("gelu_tanh", np.float32), ("relu", np.float32), ("gelu", np.float16),
     *(pytest.param(a, np.float32, marks=pytest.mark.slow) for a in ("none", "sigmoid", "silu", "gelu"))],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_interpreted_are_the_layer_and_its_gradient(form, activation, dtype, transposed):
    plain, ours, given = FORMS[form]
    attributes = {"activation": activation, "transposed": transposed} | ({} if given is None else {"given": given})
    rng = np.random.default_rng(0)
    arrays = _arrays(rng, 37, 40, 50, form, transposed, dtype)
    cotangent = rng.standard_normal((37, 50))
    reference = _both(functools.partial(getattr(linear, plain).decomposition, **attributes), cotangent)
    found = _both(functools.partial(getattr(linear_gpu, ours), platform="cuda", **attributes), cotangent)(*arrays)
    other = jax.jit(reference)(*arrays)
    with jax.enable_x64(True):
        exact = reference(*(a.astype(np.float64) for a in arrays))
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert made.dtype == dtype
        assert_closer(made, theirs, wanted, relative=2e-6 if dtype == np.float32 else 2e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("form", FORMS)
def test_the_tpus_kernel_interpreted_is_the_layer_and_its_gradient(form, activation, transposed):
    plain, ours, given = FORMS[form]
    attributes = {"activation": activation, "transposed": transposed} | ({} if given is None else {"given": given})
    rng = np.random.default_rng(0)
    arrays = _arrays(rng, 256, 128, 640, form, transposed, np.float32)
    cotangent = rng.standard_normal((256, 640))
    reference = _both(functools.partial(getattr(linear, plain).decomposition, **attributes), cotangent)
    function = getattr(linear_tpu, ours.replace("triton", "pallas"))
    found = _both(functools.partial(function, platform="cpu", **attributes), cotangent)(*arrays)
    other = jax.jit(reference)(*arrays)
    with jax.enable_x64(True):
        exact = reference(*(a.astype(np.float64) for a in arrays))
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert_closer(made, theirs, wanted, relative=2e-6)


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_gated_layer_is_a_tpus_kernel_by_name(differentiated):
    def gated(x, g, u):
        return jax.nn.silu(x @ g) * (x @ u)

    def step(*arrays):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(gated(*a).astype(jnp.float32))), (0, 1, 2))(*arrays)

    config = kpx.Config(kernels={"kpx.gated_linear": "gated_pallas"})
    compiled = kpx.compile(step if differentiated else gated, X, W, W, target="tpu-v5e", config=config)
    assert compiled.fusions == {f"kpx.gated_linear{' and its gradient' if differentiated else ''}": 1}
    assert 'custom_call_target="tpu_custom_call"' in compiled.hlo


def _silu_by_powers(y):
    return y / (1 + jnp.exp(-y))


def _gelu_new(y):
    return 0.5 * y * (1.0 + jnp.tanh(0.7978845608028654 * (y + 0.044715 * y**3)))


def _in_f32(x, g, u):
    gate, up = (jnp.dot(x, w, preferred_element_type=jnp.float32) for w in (g, u))
    return (up * jax.nn.silu(gate)).astype(x.dtype)


WRITTEN = {
    "SwiGLU": (lambda x, g, u: jax.nn.silu(x @ g) * (x @ u), "gated_linear"),
    "SwiGLU, up first, by powers": (lambda x, g, u: (x @ u) * _silu_by_powers(x @ g), "gated_linear"),
    "SwiGLU in f32": (_in_f32, "gated_linear"),
    "GeGLU": (lambda x, g, u: jax.nn.gelu(x @ g, approximate=False) * (x @ u), "gated_linear"),
    "GeGLU by tanh": (lambda x, g, u: _gelu_new(x @ g) * (x @ u), "gated_linear"),
    "GLU": (lambda x, g, u: jax.nn.sigmoid(x @ g) * (x @ u), "gated_linear"),
    "ReGLU": (lambda x, g, u: jnp.maximum(x @ g, 0) * (x @ u), "gated_linear"),
    "linear and GELU": (lambda x, g, u: jax.nn.gelu(x @ g + u[0]), "linear"),
    "linear, ReLU and a residual": (lambda x, g, u: jnp.maximum(x @ g + u[0], 0) + x @ u, "linear"),
    "kpx's": (lambda x, g, u: kpx.ops.gated_linear(x, g, u, activation="gelu"), "gated_linear"),
}
NAMED = kpx.Config(kernels={"kpx.linear": "linear_triton_cuda", "kpx.gated_linear": "gated_triton_cuda"})
X, W = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)


@pytest.mark.parametrize("written", WRITTEN)
def test_a_layer_is_found_however_written_and_one_kernel_by_name(written):
    function, kernel = WRITTEN[written]
    compiled = kpx.compile(function, X, W, W, target="cuda:h100", config=NAMED)
    assert compiled.fusions == {f"kpx.{kernel}": 1}
    assert compiled.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


@pytest.mark.parametrize(
    "written", ["SwiGLU", "linear and GELU", pytest.param("GeGLU by tanh", marks=pytest.mark.slow)]
)
def test_a_layer_is_found_with_its_gradient(written):
    function, kernel = WRITTEN[written]

    def step(x, g, u):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a).astype(jnp.float32))), (0, 1, 2))(x, g, u)

    compiled = kpx.compile(step, X, W, W, target="cuda:h100", config=NAMED)
    assert compiled.fusions == {f"kpx.{kernel} and its gradient": 1}
    assert f"kpx.{kernel} and its gradient" in compiled.kernels


def test_weights_of_pytorchs_layout_are_found_with_their_gradients():
    def gated(x, g, u):
        return jax.nn.silu(x @ g.T) * (x @ u.T)

    def step(x, g, u):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(gated(*a).astype(jnp.float32))), (0, 1, 2))(x, g, u)

    transposed = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    compiled = kpx.compile(step, X, transposed, transposed, target="cuda:h100", config=NAMED)
    assert compiled.fusions == {"kpx.gated_linear and its gradient": 1}


@pytest.mark.parametrize(("target", "name"), [("cuda:b200", "gated_triton_cuda"), ("rocm:mi300x", "gated_triton_rocm")])
def test_a_gated_layer_is_one_kernel_that_moves_half_as_much(target, name):
    x, w = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)
    function = WRITTEN["SwiGLU"][0]
    plain = kpx.compile(function, x, w, w, target=target)
    fused = kpx.compile(function, x, w, w, target=target, config=kpx.Config(kernels={"kpx.gated_linear": name}))
    assert plain.fusions == {}  # rules leave it to the vendor's library
    assert fused.fusions == {"kpx.gated_linear": 1}
    assert fused.cost.bytes < 0.6 * plain.cost.bytes
    assert fused.cost.product_flops == pytest.approx(plain.cost.product_flops, rel=1e-6)


def test_in_a_model_of_pytorch_each_layers_gate_is_found():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=99,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
    compiled = kpx.compile(model, torch.zeros((1, 32), dtype=torch.int64), target="cuda:h100", config=NAMED)
    assert compiled.fusions["kpx.gated_linear"] == 3


def test_what_is_used_elsewhere_is_left_alone():
    def shared(x, g, u):
        gate = x @ g
        return jax.nn.silu(gate) * (x @ u), gate

    assert kpx.compile(shared, X, W, W, target="cuda:h100", config=NAMED).fusions == {}


REFUSED = {
    "They are `\\[..., size\\]` and `\\[size, width\\]`": lambda x: kpx.ops.gated_linear(
        x, jnp.ones((8, 4)), jnp.ones((8, 5))
    ),
    "All are one floating dtype": lambda x: kpx.ops.linear(x, jnp.ones((8, 4), jnp.bfloat16)),
    "There are none, relu, silu": lambda x: kpx.ops.linear(x, jnp.ones((8, 4)), activation="swish"),
    "was given a bias": lambda x: kpx.ops.linear(x, jnp.ones((8, 4)), jnp.ones(3)),
    "was given a residual": lambda x: kpx.ops.linear(x, jnp.ones((8, 4)), residual=jnp.ones((2, 3))),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_go_together_is_refused(says):
    with pytest.raises(kpx.InputError, match=says):
        REFUSED[says](jnp.ones((2, 8)))


def test_layers_can_be_batched_and_differentiated_twice():
    from jax.test_util import check_grads

    rng = np.random.default_rng(0)
    x, g, u = (rng.standard_normal(s) for s in ((3, 5, 4), (4, 6), (4, 6)))
    with jax.enable_x64(True):
        each = jnp.stack([kpx.ops.gated_linear(a, g, u) for a in x])
        np.testing.assert_allclose(jax.vmap(lambda a: kpx.ops.gated_linear(a, g, u))(x), each, rtol=1e-12)
        check_grads(lambda a: kpx.ops.linear(a, g, activation="gelu_tanh"), (x,), order=2, rtol=1e-4)
