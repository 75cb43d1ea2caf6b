"""A language model's loss, found over its last layer however it is written, with its gradient, and computed in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import kpx
from kpx.bridges.torch import functional
from kpx.kernels.linear_cross_entropy import chunked, linear_cross_entropy_kernel
from kpx.passes import fusion
from tests.devices import on_four
from tests.optional import torch
from tests.reference import assert_closer

FORWARD, TRAINED = {"kpx.linear_cross_entropy": 1}, {"kpx.linear_cross_entropy and its gradient": 1}
BATCH, LENGTH, SIZE, VOCABULARY = 4, 2048, 64, 32000
TARGETS = ("cuda:h100", "rocm:mi300x", "tpu-v5e")


def _optax(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _gathered(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def _logsumexp(logits, labels):
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]


def _one_hot(logits, labels):
    return -jnp.sum(jax.nn.one_hot(labels, logits.shape[-1]) * jax.nn.log_softmax(logits), -1)


WRITTEN = {f.__name__.strip("_"): f for f in (_optax, _gathered, _logsumexp, _one_hot)} | {"capped": _optax}


def _loss(written, axis=1, flat=False, weighed=False):
    def loss(x, w, labels):
        logits = jnp.einsum("...d,vd->...v" if axis == 0 else "...d,dv->...v", x, w).astype(jnp.float32)
        if written == "capped":
            logits = jnp.tanh(logits / 30.0) * 30.0
        if flat:
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        rows = WRITTEN[written](logits, labels)
        return jnp.sum(rows * jnp.sin(jnp.arange(rows.size)).reshape(rows.shape)) if weighed else rows.mean()

    return loss


def _trained(loss):
    return jax.value_and_grad(loss, (0, 1))


def _specs(axis=1, vocabulary=VOCABULARY, place=lambda *axes: None):
    weight = (vocabulary, SIZE) if axis == 0 else (SIZE, vocabulary)
    return (
        jax.ShapeDtypeStruct((BATCH, LENGTH, SIZE), jnp.bfloat16, sharding=place("data")),
        jax.ShapeDtypeStruct(weight, jnp.bfloat16, sharding=place(*([None, "data"] if axis == 0 else ["data"]))),
        jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=place("data")),
    )


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("flat", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("written", WRITTEN)
def test_a_loss_is_found_and_never_holds_the_logits(written, flat, axis):
    loss, logits = _loss(written, axis, flat), 4 * BATCH * LENGTH * VOCABULARY
    forward = kpx.compile(loss, *_specs(axis), target="cuda:h100")
    assert (forward.fusions, forward.kernels) == (FORWARD, {"kpx.linear_cross_entropy": "chunked"})
    assert forward.memory.temp_bytes < 0.3 * logits
    trained = kpx.compile(_trained(loss), *_specs(axis), target="cuda:h100")
    assert trained.fusions == TRAINED
    assert trained.memory.temp_bytes < 0.45 * logits


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_on_every_accelerator_whose_logits_are_large(target):
    specs = _specs(vocabulary=4 * VOCABULARY)
    plain, ours = (
        kpx.compile(_trained(_loss("optax")), *specs, target=target, config=kpx.Config(level=level))
        for level in ("conservative", "balanced")
    )
    assert (plain.fusions, ours.fusions) == ({}, TRAINED)
    assert ours.memory.temp_bytes < plain.memory.temp_bytes / 5


def test_small_logits_stay_as_they_are_and_the_report_says_why():
    compiled = kpx.compile(_loss("gathered"), *_specs(vocabulary=500), target="cuda:h100")
    assert compiled.kernels["kpx.linear_cross_entropy"].startswith("as it was (XLA); chunked: logits of 15 MiB stay")
    trained = kpx.compile(_trained(_loss("gathered")), *_specs(vocabulary=500), target="cuda:h100")
    assert trained.fusions == {}


@pytest.mark.parametrize(
    "kind",
    [(LlamaConfig, LlamaForCausalLM), pytest.param((Gemma2Config, Gemma2ForCausalLM), marks=pytest.mark.slow)],
    ids=["llama", "gemma2"],
)
@pytest.mark.models
def test_a_model_of_transformers_has_its_loss_found_forward_and_in_training(kind):
    config, model = kind
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    made = model(config(**sizes, num_hidden_layers=1, vocab_size=VOCABULARY, use_cache=False)).to(torch.bfloat16)
    params, buffers, fn = functional(made)
    tokens = jnp.zeros((BATCH, LENGTH), jnp.int32)

    def loss(params):
        out, _ = fn(params, buffers, input_ids=tokens, labels=tokens)
        return out["loss"]

    for function, found in ((loss, FORWARD), (jax.value_and_grad(loss), TRAINED)):
        compiled = kpx.compile(function, params, target="cuda:h100")
        assert found.items() <= compiled.fusions.items()
        assert compiled.memory.temp_bytes < 0.55 * 4 * BATCH * LENGTH * VOCABULARY


@pytest.fixture
def on_cpu(monkeypatch):
    """The loss in chunks on the CPU too, so that it runs here; several chunks of few columns."""
    monkeypatch.setattr("kpx.kernels.linear_cross_entropy._LEAST_CHUNK", 16)
    monkeypatch.setattr("kpx.kernels.linear_cross_entropy._CHUNK_BYTES", 1)
    linear_cross_entropy_kernel.on("cpu")(chunked)
    fusion.is_of_use.cache_clear()
    yield
    linear_cross_entropy_kernel.implementations.pop()
    fusion.is_of_use.cache_clear()


def _arrays(dtype, axis, vocabulary=50):
    rng = np.random.default_rng(0)
    shapes = (3, 7, 16), ((vocabulary, 16) if axis == 0 else (16, vocabulary))
    labels = rng.integers(0, vocabulary, (3, 7), dtype=np.int32)
    return *(rng.standard_normal(s).astype(dtype) for s in shapes), labels


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("written", WRITTEN)
def test_what_takes_its_place_is_as_near_to_f64(written, axis, dtype, on_cpu):
    *arrays, labels = _arrays(dtype, axis)
    for weighed in (False, True):  # a mean has one cotangent for all rows
        step = _trained(_loss(written, axis, weighed=weighed))
        compiled = kpx.compile(step, *arrays, labels)
        assert compiled.fusions == TRAINED
        with jax.enable_x64(True):
            exact = step(*(a.astype(np.float64) for a in arrays), labels)
        trees = (jax.tree.leaves(t) for t in (compiled(*arrays, labels), jax.jit(step)(*arrays, labels), exact))
        for ours, plain, reference in zip(*trees, strict=True):
            assert_closer(ours, plain, reference, relative=2e-6 if dtype == np.float32 else 1e-2)


@pytest.mark.parametrize("label", [-1, 50, -51, 2**31 - 1])
@pytest.mark.parametrize("written", ["gathered", "one_hot", "logsumexp"])
def test_a_label_out_of_range_gives_what_it_gave(written, label, on_cpu):
    x, w, labels = _arrays(np.float32, 0)
    labels[0, 0] = label

    def both(x, w, labels):
        rows, pull = jax.vjp(lambda x, w: WRITTEN[written](jnp.einsum("...d,vd->...v", x, w), labels), x, w)
        return rows, pull(jnp.sin(rows.at[0, 0].set(1)))

    compiled = kpx.compile(both, x, w, labels)
    assert compiled.fusions == TRAINED
    for ours, plain in zip(*(jax.tree.leaves(f(x, w, labels)) for f in (compiled, jax.jit(both))), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


# Over a mesh -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda:h100x4", "tpu-v5e:2x2"])
@pytest.mark.parametrize("flat", [False, True])
def test_each_device_computes_the_loss_of_its_rows(target, flat):
    mesh = kpx.Target(target).mesh(data=4)
    specs = _specs(0, 16 * VOCABULARY, lambda *axes: NamedSharding(mesh, P(*axes)))
    compiled = kpx.compile(_trained(_loss("gathered", 0, flat)), *specs, target=target)
    assert compiled.fusions == TRAINED
    assert compiled.memory.temp_bytes < 0.5 * 4 * BATCH * LENGTH * 16 * VOCABULARY / 4


def test_a_vocabulary_that_is_split_is_left_to_xla():
    mesh = kpx.Target("cuda:h100x4").mesh(data=2, model=2)
    place = lambda *axes: NamedSharding(mesh, P(*axes))  # noqa: E731
    x, w, labels = _specs(0, place=place)
    w = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place("model"))
    assert kpx.compile(_trained(_loss("gathered", 0)), x, w, labels, target="cuda:h100x4").fusions == {}


RUN = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import kpx
from kpx.kernels import linear_cross_entropy as op
from tests.kernels.test_linear_cross_entropy_fusion import TRAINED, _loss, _trained
from tests.reference import assert_closer

op._LEAST_CHUNK, op._CHUNK_BYTES = 16, 1
op.linear_cross_entropy_kernel.on("cpu")(op.chunked)
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
whole = [rng.standard_normal(s).astype(np.float32) for s in ((8, 7, 16), (50, 16))]
labels = rng.integers(0, 50, (8, 7), dtype=np.int32)
for weighed in (False, True):
    step = _trained(_loss("optax", 0, weighed=weighed))
    places = [NamedSharding(mesh, P(*axes)) for axes in (("data",), (None, "data"), ("data",))]
    arrays = [jax.device_put(a, p) for a, p in zip((*whole, labels), places, strict=True)]
    compiled = kpx.compile(step, *arrays)
    assert compiled.fusions == TRAINED, compiled.fusions
    plain = jax.jit(step)(*whole, labels)
    with jax.enable_x64(True):
        exact = step(*(a.astype(np.float64) for a in whole), labels)
    for ours, theirs, reference in zip(*map(jax.tree.leaves, (compiled(*arrays), plain, exact)), strict=True):
        assert_closer(ours, theirs, reference, relative=2e-6)
print("the same")
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives():
    on_four(RUN)
