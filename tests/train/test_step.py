"""A step: microbatches, clipping and rematerialization leave a gradient what it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kpx
from kpx.train.model import adapted
from kpx.train.remat import listed_layers, rematerialized
from kpx.train.step import Step, split_rows
from tests.optional import torch

WIDTH, LAYERS = 16, 4


def _loss(params, carried, batch, key):
    def layer(x, w):
        return jnp.tanh(x @ w["a"]) @ w["b"] + x, None

    x, _ = jax.lax.scan(layer, batch["x"], params)
    return jnp.mean((x - batch["y"]) ** 2), (carried, {"size": jnp.mean(jnp.abs(x))})


def _given():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.standard_normal((LAYERS, WIDTH, WIDTH)) * 0.2, jnp.float32) for n in "ab"}
    batch = {n: jnp.asarray(rng.standard_normal((8, WIDTH)), jnp.float32) for n in "xy"}
    return params, batch


def _after(**options):
    params, batch = _given()
    step = Step(_loss, options.pop("optimizer", optax.sgd(0.1)), **options)
    return jax.jit(step)(step.start(params), batch)


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_give_the_mean_gradient(microbatches):
    (one, told), (parts, also) = _after(), _after(microbatches=microbatches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one.params, parts.params)
    np.testing.assert_allclose([told["loss"], told["size"]], [also["loss"], also["size"]], rtol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_changes_no_gradient(remat):
    plain, again = _after()[0], _after(remat=remat)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), plain.params, again.params)


def test_full_rematerialization_computes_every_layer_again():
    params, batch = _given()

    def products(policy):
        gradient = jax.grad(lambda p: rematerialized(_loss, policy)(p, {}, batch, None)[0])
        module = kpx.compile(gradient, params, target="cpu", config=kpx.Config(level="none"))
        return module.cost.flops

    assert products("full") > products("dots") >= products("none")


def _listed():
    """A PyTorch model whose layers are modules in a list, with its loss; and rows."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    torch.manual_seed(0)
    model = adapted(
        torch.nn.Sequential(*[Layer() for _ in range(LAYERS)]), lambda call, x: jnp.mean(call(x) ** 2), None
    )
    x = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)
    return model, lambda p: model.loss(p, model.carried, x, jax.random.key(0))[0]


def test_a_pytorch_models_layers_are_computed_again_and_its_gradients_stay():
    model, loss = _listed()
    found, flops = {}, {}
    for policy in ("none", "dots", "full"):
        gradient = jax.grad(rematerialized(loss, policy))
        found[policy] = jax.jit(gradient)(model.params)
        flops[policy] = kpx.compile(gradient, model.params, config=kpx.Config(level="none")).cost.flops
    layers = 2 * 8 * WIDTH * 2 * WIDTH * 2 * LAYERS
    assert flops["none"] <= flops["dots"] < flops["none"] + layers / 4
    assert flops["full"] >= flops["none"] + layers / 2  # of each layer, what its gradient needs
    for policy in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found[policy], found["none"])


def test_layers_are_the_innermost_lists_of_modules_with_several_products():
    def loss(w, x):
        for stage in range(2):
            for block in range(3):
                with jax.named_scope(f"stages/{stage}/blocks_{block}"):
                    for linear in range(2):
                        with jax.named_scope(f"mlp/{linear}"):
                            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    jaxpr = jax.make_jaxpr(loss)(jnp.ones((4, 4)), jnp.ones((4, 4))).jaxpr
    ranges = listed_layers(jaxpr)
    assert len(ranges) == 6
    assert [end - first for first, end in ranges] == [4] * 6
    assert listed_layers(jax.make_jaxpr(lambda w: jnp.sum(w @ w))(jnp.ones((4, 4))).jaxpr) == []


def test_a_layer_with_a_checkpoint_of_its_own_is_left_alone():
    def loss(params, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jnp.sum(jax.lax.scan(layer, x, params)[0])

    given = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((2, WIDTH))
    count = [str(jax.make_jaxpr(jax.grad(f))(*given)).count("checkpoint") for f in (loss, rematerialized(loss, "full"))]
    assert count[0] == count[1]


def test_gradients_are_clipped_by_their_norm_together():
    (state, told), (params, _) = _after(clip=0.01), _given()
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, state.params, params))
    np.testing.assert_allclose(moved, 0.1 * 0.01, rtol=1e-4)
    assert told["gradient_norm"] > 0.01


def test_the_key_is_another_at_each_step_and_the_same_in_each_run():
    def loss(params, carried, batch, key):
        return jnp.sum(params * jax.random.normal(key, params.shape)), (carried, {})

    step = Step(loss, optax.sgd(0.0))
    state = step.start(jnp.ones(4))
    first, told = step(state, {})
    _, then = step(first, {})
    assert told["loss"] == step(state, {})[1]["loss"] != then["loss"]


def test_a_part_has_rows_of_every_device():
    parts = split_rows(jnp.arange(8), 2)
    assert parts.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_rows_that_cannot_be_split_are_an_error():
    with pytest.raises(kpx.InputError, match=r"shape \(7, 2\) cannot be split into 2"):
        split_rows(jnp.ones((7, 2)), 2)


@pytest.mark.parametrize(
    ("options", "says"), [({"remat": "all"}, "'none', 'dots', 'offload', 'full'"), ({"microbatches": 0}, "1 or more")]
)
def test_what_there_is_not_is_refused(options, says):
    with pytest.raises(kpx.ConfigError, match=says):
        Step(_loss, optax.sgd(0.1), **options)


def test_a_plan_chooses_remat_and_microbatches_where_memory_asks_for_it():
    width, layers, batch = 4096, 16, 32768
    params = {n: jax.ShapeDtypeStruct((layers, width, width), jnp.float32) for n in "ab"}
    given = {n: jax.ShapeDtypeStruct((batch, 64, width), jnp.float32) for n in "xy"}
    step = Step(_loss, optax.sgd(0.1), remat=None, microbatches=None)
    state = jax.eval_shape(step.start, params)
    large = kpx.plan(step, state, given, target="tpu-v5p:2x2x2", confirm=0)
    small = kpx.plan(
        step,
        state,
        {n: jax.ShapeDtypeStruct((16, 64, width), jnp.float32) for n in "xy"},
        target="tpu-v5p:2x2x2",
        confirm=0,
    )
    assert small.variant == {"remat": "none", "microbatches": 1, "offload": False}
    assert large.variant["remat"] != "none" or large.variant["microbatches"] > 1
    assert large.memory_per_device_bytes < kpx.Target("tpu-v5p:2x2x2").spec.memory
