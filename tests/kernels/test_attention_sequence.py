"""Attention whose sequence is split over devices: by a ring, by exchanging heads, and against f64."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from kpx.hardware import plugins
from tests.devices import on_four

_CLOSER = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import kpx
mesh = jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
at = NamedSharding(mesh, P(None, None, "context"))

def step(q, k, v, causal):
    def loss(q, k, v):
        out = kpx.ops.attention(q, k, v, causal=causal)
        return jnp.sum(jnp.sin(3 * out)), out
    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return [out, *gradients]

for heads, kv_heads, way in ((4, 2, "ring"), (8, 4, "ulysses")):
    for causal in (True, False):
        rng = np.random.default_rng(heads)
        given = [rng.standard_normal((2, h, 64, 16)) for h in (heads, kv_heads, kv_heads)]
        with jax.enable_x64(True):
            exact = [np.asarray(a) for a in jax.jit(functools.partial(step, causal=causal))(*given)]
        narrow = [a.astype(np.float32) for a in given]
        plain = jax.jit(functools.partial(step, causal=causal))(*narrow)
        jitted = kpx.jit(functools.partial(step, causal=causal), in_shardings=(at,) * 3)
        specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at) for a in narrow]
        compiled = kpx.compile(jitted, *specs)
        assert compiled.kernels["kpx.attention and its gradient"].startswith(way), compiled.kernels
        kinds = {c.kind for c in compiled.collectives}
        assert ("collective-permute" in kinds) == (way == "ring"), kinds
        assert "all-gather" not in kinds, kinds
        for ours, theirs, wanted in zip(jitted(*narrow), plain, exact):
            mine, other = (np.sqrt(np.mean((np.asarray(a, np.float64) - wanted) ** 2)) for a in (ours, theirs))
            assert mine <= 1.5 * other + 1e-7, (way, causal, mine, other)
print("the same")
"""


def test_both_ways_are_as_near_to_f64_as_plain_jax_and_gather_nothing():
    on_four(_CLOSER)


_LAYERS = """
import numpy as np
import kpx
from tests.sharding.steps import batches, llama_step, start
step, (tokens,) = llama_step(), batches(1)
weights, state = start()
wanted = step(weights, state, tokens)[2]
plan = kpx.plan(step, weights, state, tokens, target="cpu", fixed={"context": 4})
planned = plan.apply(step)
context = planned._lower((weights, state, tokens), {})[1]
assert set(context.kernels) == {"kpx.attention and its gradient", "kpx.attention"}, context.kernels
np.testing.assert_allclose(planned(weights, state, tokens)[2], wanted, atol=1e-5)
print("the same")
"""


@pytest.mark.slow
def test_attention_in_rematerialized_layers_of_a_scan_is_split():
    on_four(_LAYERS)


def _specs(kind, length, heads=4):
    at = NamedSharding(kpx.Target(kind).mesh(context=8), P(None, None, "context"))
    return [jax.ShapeDtypeStruct((1, heads, length, 128), jnp.bfloat16, sharding=at)] * 3


def _gradients(q, k, v):
    def loss(q, k, v):
        return jnp.sum(kpx.ops.attention(q, k, v, causal=True).astype(jnp.float32) ** 2)

    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


@pytest.mark.skipif(plugins.find("tpu") is None, reason="the TPU's compiler is not installed: not run")
def test_a_ring_fits_where_plain_attention_does_not():
    specs = _specs("tpu-v5e:2x4", 131072)
    ring = kpx.compile(_gradients, *specs, target="tpu-v5e:2x4")
    assert ring.kernels["kpx.attention and its gradient"].startswith("ring")
    assert ring.memory.fits
    assert ring.memory.peak_bytes < 2**30
    with pytest.raises(kpx.OutOfMemoryError, match="131072x131072"):
        kpx.compile(_gradients, *specs, target="tpu-v5e:2x4", config=kpx.Config(level="none"))


@pytest.mark.skipif(plugins.find("tpu") is None, reason="the TPU's compiler is not installed: not run")
@pytest.mark.slow
def test_a_way_can_be_asked_for_by_name():
    specs = _specs("tpu-v5e:2x4", 2048, heads=8)
    found = {}
    for name in ("ring", "ulysses"):
        config = kpx.Config(kernels={"kpx.attention": name})
        compiled = kpx.compile(_gradients, *specs, target="tpu-v5e:2x4", config=config)
        found[name] = {c.kind for c in compiled.collectives} & {"collective-permute", "all-to-all"}
    assert found == {"ring": {"collective-permute"}, "ulysses": {"all-to-all"}}
