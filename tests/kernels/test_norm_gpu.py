"""Norms in training steps on GPUs: kernels interpreted against f64, and found with their gradients however written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.bridges.torch import functional
from kpx.kernels import norm
from kpx.kernels.norm_gpu import normalized
from kpx.passes import fusion
from tests.devices import on_four
from tests.optional import torch
from tests.reference import assert_closer

pytest.importorskip("triton")

RMS, LAYER = {"kpx.rms_norm and its gradient": 1}, {"kpx.layer_norm and its gradient": 1}


def _both(function, carried):
    """The result and gradients; where carried, of what uses the first array beside the norm."""

    def run(arrays, cotangent, further):
        if carried:
            (out, _), pull = jax.vjp(lambda *a: function(*a), *arrays)
            return out, *pull((cotangent, further))
        out, pull = jax.vjp(lambda *a: function(*a), *arrays)
        return out, *pull(cotangent)

    return run


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(
    ("affine", "centred"), [("none", False), ("w", False), ("none", True), ("w", True), ("wb", True)]
)
@pytest.mark.parametrize(
    "shape",
    [(5, 96), (600, 33), *(pytest.param(s, marks=pytest.mark.slow) for s in ((3, 4, 64), (2, 5000), (1, 1)))],
    ids=str,
)
def test_the_kernels_interpreted_are_the_norm_and_its_gradient(shape, centred, affine, carried):
    rng = np.random.default_rng(0)
    dtype = np.float16 if affine == "w" else np.float32
    shapes = shape, *[shape[-1:]] * len(affine.replace("none", "")), shape, shape
    *arrays, cotangent, further = (rng.standard_normal(s).astype(dtype) for s in shapes)
    given = {"eps": 1e-3, "centred": centred, "affine": affine}
    platform = "rocm" if carried else "cuda"
    ours = functools.partial(normalized, platform=platform, carried=carried, **given)
    plain = functools.partial((norm.carried_kernel if carried else norm.norm_kernel).decomposition, **given)
    found = _both(ours, carried)(arrays, cotangent, further)
    other = jax.jit(_both(plain, carried))(arrays, cotangent, further)
    with jax.enable_x64(True):
        exact = _both(plain, carried)(*jax.tree.map(lambda a: a.astype(np.float64), (arrays, cotangent, further)))
    for made, theirs, wanted in zip(found, other, exact, strict=True):
        assert made.dtype == dtype
        assert_closer(made, theirs, wanted, relative=4e-6 if dtype == np.float32 else 1e-3)


def _rms(x, w, b):
    wide = x.astype(jnp.float32)
    return w * (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def _rms_in_f32(x, w, b):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(1e-6 + jnp.mean(wide * wide, -1, keepdims=True)) * w.astype(jnp.float32)).astype(x.dtype)


def _layer(x, w, b):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-5) * w + b).astype(x.dtype)


def _flax(x, w, b):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(0.0, jnp.mean(jax.lax.square(wide), -1, keepdims=True) - jax.lax.square(mean))
    return ((wide - mean) * (jax.lax.rsqrt(variance + 1e-6) * w) + b).astype(x.dtype)


WRITTEN = {
    "rms, rounded before the weight": (_rms, RMS),
    "rms in f32": (_rms_in_f32, RMS),
    "kpx's rms": (lambda x, w, b: kpx.ops.rms_norm(x, w), RMS),
    "layer": (_layer, LAYER),
    "layer, Flax's": (_flax, LAYER),
    "kpx's layer": (lambda x, w, b: kpx.ops.layer_norm(x, w, b), LAYER),
    "kpx's layer without a bias": (lambda x, w, b: kpx.ops.layer_norm(x, w), LAYER),
}


def _step(function, carried):
    """Gradients of a norm before a product; where carried, of a residual around both."""

    def loss(x, w, b, matrix):
        y = function(x, w, b) @ matrix
        return jnp.sum(jnp.sin((x + y if carried else y).astype(jnp.float32)))

    return jax.value_and_grad(loss, (0, 1, 2, 3))


def _specs(dtype=jnp.bfloat16, shape=(8, 512, 1024), place=lambda *axes: None):
    size = shape[-1]
    shapes = shape, (size,), (size,), (size, size)
    return [jax.ShapeDtypeStruct(s, dtype, sharding=place(*["data"] * (i == 0))) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("carried", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_norm_is_found_with_its_gradient(written, carried):
    function, found = WRITTEN[written]
    compiled = kpx.compile(_step(function, carried), *_specs(), target="rocm:mi300x")
    assert compiled.fusions == found
    assert compiled.hlo.count('custom_call_target="__gpu$xla.gpu.triton"') == 2


@pytest.mark.parametrize(("written", "found"), [("layer", LAYER), ("rms in f32", {})])
def test_on_nvidias_gpus_a_root_mean_square_is_left_to_xla(written, found):
    assert kpx.compile(_step(WRITTEN[written][0], True), *_specs(), target="cuda:h100").fusions == found


def test_it_is_found_where_nothing_is_a_product():
    step = jax.grad(lambda x, w, b: jnp.sum(jnp.sin(x + kpx.ops.layer_norm(x, w, b)).astype(jnp.float32)), (0, 1, 2))
    assert kpx.compile(step, *_specs()[:3], target="cuda:h100").fusions == LAYER


def test_it_reads_and_writes_less():
    plain, ours = (
        kpx.compile(_step(_layer, True), *_specs(), target="cuda:h100", config=kpx.Config(disable=disable)).cost.bytes
        for disable in (("layer_norm.wb.3",), ())
    )
    assert ours < 0.8 * plain


LEFT_ALONE = {
    "forward alone": (lambda *a: _layer(*a[:3]), {}),
    "small": (_step(_layer, True), {"shape": (4, 16, 64)}),
    "large rows": (_step(_layer, True), {"shape": (128, 8200)}),
    "weights for every row": (
        lambda x, w, b, m: _step(_layer, True)(x, jnp.broadcast_to(w, x.shape[-2:]) * x[0], b, m),
        {},
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_is_left_to_xla(what):
    function, given = LEFT_ALONE[what]
    assert kpx.compile(function, *_specs(**given), target="rocm:mi300x").fusions == {}


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        pytest.param("gpt2", {"kpx.layer_norm and its gradient": 5}, marks=pytest.mark.slow),
        ("llama", {"kpx.rms_norm and its gradient": 5}),
    ],
)
@pytest.mark.models
def test_a_models_training_step_has_its_norms(kind, found):
    import transformers

    config, model = {
        "gpt2": (
            transformers.GPT2Config(n_layer=2, n_embd=512, n_head=4, vocab_size=100),
            transformers.GPT2LMHeadModel,
        ),
        "llama": (
            transformers.LlamaConfig(
                num_hidden_layers=2, hidden_size=512, intermediate_size=512, num_attention_heads=4, vocab_size=100
            ),
            transformers.LlamaForCausalLM,
        ),
    }[kind]
    config.use_cache = False
    params, buffers, fn = functional(model(config).to(torch.bfloat16).eval())
    tokens = jnp.zeros((8, 512), jnp.int32)

    def loss(params):
        out, _ = fn(params, buffers, input_ids=tokens)
        return jnp.sum(jnp.sin(out["logits"].astype(jnp.float32)))

    compiled = kpx.compile(jax.grad(loss), params, target="rocm:mi300x")
    assert found.items() <= compiled.fusions.items()


@pytest.fixture
def on_cpu():
    """Plain JAX in the kernels' place on the CPU, so that what takes a norm's place runs here."""
    kernels = norm.norm_kernel, norm.carried_kernel
    for kernel in kernels:
        kernel.on("cpu")(kernel.decomposition)
    fusion.is_of_use.cache_clear()
    yield
    for kernel in kernels:
        kernel.implementations.pop()
    fusion.is_of_use.cache_clear()


@pytest.mark.parametrize("carried", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("written", WRITTEN)
def test_what_takes_its_place_is_as_near_to_f64(written, carried, on_cpu):
    function, found = WRITTEN[written]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s.shape).astype(np.float32) for s in _specs(shape=(3, 7, 24))]
    step = _step(function, carried)
    compiled = kpx.compile(step, *arrays)
    assert compiled.fusions == found
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) for a in arrays]
        exact = jax.tree.leaves(step(*wide))
    for made, theirs, wanted in zip(
        *map(jax.tree.leaves, (compiled(*arrays), jax.jit(step)(*arrays))), exact, strict=True
    ):
        assert_closer(made, theirs, wanted, relative=4e-6)


# Over a mesh -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [False, True])
def test_over_a_mesh_each_device_normalizes_its_rows(carried):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = kpx.Target("rocm:mi300x4").mesh(data=4)
    specs = _specs(shape=(32, 512, 1024), place=lambda *axes: NamedSharding(mesh, P(*axes)))
    step = _step(WRITTEN["layer"][0], carried)
    compiled = kpx.compile(step, *specs, target="rocm:mi300x4")
    assert compiled.fusions == LAYER
    assert {c.kind for c in compiled.collectives} == {"all-reduce"}  # the loss, and gradients by weights


RUN = """
import functools, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import kpx
from kpx.kernels import norm
from tests.kernels.test_norm_gpu import LAYER, WRITTEN, _step
from tests.reference import assert_closer

for kernel in (norm.norm_kernel, norm.carried_kernel):
    kernel.on("cpu")(kernel.decomposition)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
whole = [rng.standard_normal(s).astype(np.float32) for s in ((8, 7, 24), (24,), (24,), (24, 24))]
arrays = [jax.device_put(a, NamedSharding(mesh, P(*["data"] * (i == 0)))) for i, a in enumerate(whole)]
for carried in (False, True):
    step = _step(WRITTEN["layer"][0], carried)
    compiled = kpx.compile(step, *arrays)
    assert compiled.fusions == LAYER, compiled.fusions
    with jax.enable_x64(True):
        exact = step(*(a.astype(np.float64) for a in whole))
    for ours, theirs, reference in zip(*map(jax.tree.leaves, (compiled(*arrays), jax.jit(step)(*whole), exact)), strict=True):
        assert_closer(ours, theirs, reference, relative=4e-6)
print("the same")
"""


def test_four_devices_give_what_one_gives():
    on_four(RUN)
