"""Mixtures of experts over a mesh: each device routes its own rows, and plans know what that costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.hardware import plugins
from kpx.kernels import mixture_split
from tests.devices import on_four

_SAME = """
import jax, jax.numpy as jnp, numpy as np
import kpx
from kpx.kernels.mixture_split import Spread, spread_over
rng = np.random.default_rng(0)
shapes = (8, 4, 16), (8, 4, 8), (8, 16, 12), (8, 16, 12), (8, 12, 16)
arrays = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
skewed = [arrays[0], arrays[1].at[..., 5].set(9.0), *arrays[2:]]  # every row to one device

def both(*given):
    out, pull = jax.vjp(lambda *a: kpx.ops.mixture_of_experts(*a, top_k=2), *given)
    return out, *pull(jnp.cos(out))

for sizes, names, experts in (((4,), ("expert",), "expert"), ((2, 2), ("data", "expert"), "expert"), ((4,), ("data",), None)):
    mesh = jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    def spread(*given):
        with spread_over(Spread(mesh, (names,), experts)):
            return both(*given)
    for given in (arrays, skewed):
        for found, wanted in zip(jax.jit(spread)(*given), jax.jit(both)(*given)):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
print("the same")
"""


def test_values_and_gradients_are_those_of_one_device_wherever_rows_go():
    on_four(_SAME)


_TRAINED = """
import jax, jax.numpy as jnp, numpy as np
import kpx
from tests.sharding.test_experts import loss, start
def step(weights, x):
    value, gradient = jax.value_and_grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradient), value
x = np.random.default_rng(1).standard_normal((8, 4, 16)).astype(np.float32)
weights, wanted = start(), []
for _ in range(3):
    weights, value = jax.jit(step)(weights, x)
    wanted.append(float(value))
for fixed in ({"expert": 4}, {"expert": 2, "fsdp": 2}, {"data": 2, "context": 2}):
    weights = start()
    plan = kpx.plan(step, weights, x, target="cpu", fixed=fixed)
    planned, found = plan.apply(step), []
    for _ in range(3):
        weights, value = planned(weights, x)
        found.append(float(value))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert ("expert" in str(weights["gate"].sharding.spec)) == ("expert" in fixed)
print("the same")
"""


def start():
    rng = np.random.default_rng(0)
    shapes = {"router": (2, 16, 8), "gate": (2, 8, 16, 12), "up": (2, 8, 16, 12), "down": (2, 8, 12, 16)}
    return {n: jnp.asarray(rng.standard_normal(s) * 0.2, jnp.float32) for n, s in shapes.items()}


def loss(weights, x):
    @jax.checkpoint
    def layer(x, w):
        return x + kpx.ops.mixture_of_experts(x, x @ w["router"], w["gate"], w["up"], w["down"], top_k=2), None

    return jnp.mean(jax.lax.scan(layer, x, weights)[0] ** 2)


def test_plans_with_experts_train_to_the_losses_of_one_device():
    on_four(_TRAINED)


def _step(weights, x):
    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x))


def _specs(rows=256, experts=32, size=1024, width=4096):
    f32 = {"router": (4, size, experts), "gate": (4, experts, size, width), "up": (4, experts, size, width)}
    f32 |= {"down": (4, experts, width, size)}
    weights = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in f32.items()}
    return weights, jax.ShapeDtypeStruct((rows, 128, size), jnp.float32)


def test_experts_are_found_and_split_where_that_is_the_fastest():
    plan = kpx.plan(_step, *_specs(), target="tpu-v5p:4x4x2", confirm=0)
    assert plan.mesh.get("expert", 1) > 1
    assert "expert" in str(plan.shardings[0]["gate"].spec)
    assert {e.kind for e in plan.collectives if e.axes == ("expert",)} >= {"all-to-all"}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_rows_go_in_ragged_parts_where_there_is_such_an_exchange(platform):
    if plugins.find(platform) is None:
        pytest.skip(f"the compiler for {platform} is not installed: not run")
    target = {"tpu": "tpu-v5e:2x2", "cuda": "cuda:h100x4"}[platform]
    plan = kpx.plan(_step, *_specs(16, 8, 256, 512), target=target, fixed={"expert": 4}, confirm=0)
    compiled = kpx.compile(plan.apply(_step), *plan.specs, target=target)
    assert "ragged-all-to-all" in compiled.hlo
    assert compiled.memory.fits


def test_without_a_mesh_nothing_is_split():
    x = jnp.ones((4, 8))
    assert mixture_split.around(x) is None
    with mixture_split.spread_over(mixture_split.PLANNED):
        assert mixture_split.around(x) == mixture_split.PLANNED
