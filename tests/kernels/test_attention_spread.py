"""Attention over several devices: kernels at the shapes of one, and nothing gathered."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpx
from bench import llama
from tests.devices import on_four
from tests.kernels.test_attention_fusion import KERNELS, LENGTH, _mask_added, _scaled_after, _scaled_before_and_hidden
from tests.kernels.test_attention_gradient import _gradients

FOUR = {"tpu-v5e:2x2": "tpu-v5e", "cuda:h100x4": "cuda:h100", "rocm:mi300x4": "rocm:mi300x"}


def _spec(target, *axes, shape=(4, 8, LENGTH, 64)):
    mesh = kpx.Target(target).mesh(data=2, model=2)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("target", FOUR)
@pytest.mark.parametrize("function", [_scaled_after, _mask_added], ids=lambda f: f.__name__)
def test_a_kernel_computes_each_devices_part(function, target):
    spec = _spec(target, "data", "model")
    compiled = kpx.compile(_gradients(function), spec, spec, spec, target=target)
    assert compiled.fusions == {"kpx.attention and its gradient": 1}
    assert compiled.hlo.count(f'custom_call_target="{KERNELS[FOUR[target]][1]}"') == 3
    assert not compiled.collectives
    assert f"{LENGTH},{LENGTH}" not in compiled.hlo


@pytest.mark.parametrize("target", FOUR)
def test_without_a_gradient_too(target):
    spec = _spec(target, "data", None, "model", shape=(4, LENGTH, 8, 64))
    compiled = kpx.compile(_scaled_before_and_hidden, spec, spec, spec, target=target)
    assert compiled.fusions == {"kpx.attention": 1}
    assert not compiled.collectives
    assert compiled.cost.product_flops == 4 * 4 * 8 * LENGTH * LENGTH * 64 / 4  # of one device


@pytest.mark.parametrize("target", FOUR)
def test_a_mask_over_keys_is_split_with_its_batch(target):
    spec, seen = _spec(target, "data", "model"), _spec(target, "data", shape=(4, LENGTH))
    seen = jax.ShapeDtypeStruct(seen.shape, bool, sharding=seen.sharding)

    def step(q, k, v, seen):
        function = functools.partial(kpx.ops.attention, mask=seen[:, None, None])
        return _gradients(function)(q, k, v)

    compiled = kpx.compile(step, spec, spec, spec, seen, target=target)
    assert compiled.fusions == {"kpx.attention and its gradient": 1}
    assert not compiled.collectives


LEFT_ALONE = {"over sizes": ("data", None, None, "model"), "nowhere": ()}


@pytest.mark.parametrize("split", LEFT_ALONE)
def test_what_is_split_otherwise_is_left_to_xla(split):
    spec = _spec("tpu-v5e:2x2", *LEFT_ALONE[split])
    compiled = kpx.compile(_scaled_after, spec, spec, spec, target="tpu-v5e:2x2")
    assert compiled.fusions == {}


def test_keys_that_all_heads_share_are_left_to_xla_where_heads_are_split():
    query, key = _spec("tpu-v5e:2x2", "data", "model"), _spec("tpu-v5e:2x2", "data", shape=(4, 1, LENGTH, 64))
    attention = _gradients(functools.partial(kpx.ops.attention, causal=True))
    assert kpx.compile(attention, query, key, key, target="tpu-v5e:2x2").fusions == {}
    query = _spec("tpu-v5e:2x2", ("data", "model"))
    key = _spec("tpu-v5e:2x2", ("data", "model"), shape=(4, 1, LENGTH, 64))
    compiled = kpx.compile(attention, query, key, key, target="tpu-v5e:2x2")
    assert compiled.fusions == {"kpx.attention and its gradient": 1}


@pytest.mark.parametrize("axes", [{"data", "model"}, {"model"}], ids=lambda axes: "+".join(sorted(axes)))
def test_what_is_one_devices_already_is_left_to_xla(axes):
    target = kpx.Target("tpu-v5e:2x2")
    split = P(None, "model") if axes == {"model"} else P("data", "model")

    def one(q, k, v):  # doubled, so that no operand is an argument
        return _scaled_after(2 * q, 2 * k, 2 * v)

    mapped = jax.shard_map(one, mesh=target.mesh(data=2, model=2), in_specs=split, out_specs=split, axis_names=axes)
    spec = _spec("tpu-v5e:2x2", "data", "model")
    assert kpx.compile(mapped, spec, spec, spec, target=target).fusions == {}


@pytest.mark.parametrize("target", ["tpu-v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in list(FOUR)[1:])])
def test_a_training_step_over_a_mesh_has_its_kernels_and_sends_no_more(target):
    sizes = llama.Sizes(width=256, hidden=512, layers=4, heads=8, kv_heads=2, vocabulary=1024)
    step, specs = llama.training_step(sizes, kpx.Target(target).mesh(fsdp=-1, model=2), 16, 256)
    sent = []
    for level, fusions in (
        ("conservative", {}),
        ("balanced", {"kpx.attention": 1, "kpx.attention and its gradient": 1}),
    ):
        compiled = kpx.compile(step, *specs, target=target, config=kpx.Config(level=level))
        assert compiled.fusions == fusions
        sent.append(collections.Counter())
        for collective in compiled.collectives:
            sent[-1][collective.kind] += collective.bytes * collective.count
    assert sum(sent[1].values()) <= 1.01 * sum(sent[0].values())


RUN = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import kpx
from kpx.kernels.attention import attention_kernel
from kpx.kernels.attention_tpu import interpreted
from tests.kernels.test_attention_fusion import _mask_added
from tests.kernels.test_attention_gradient import _gradients
from tests.reference import assert_closer

attention_kernel.on("cpu")(interpreted)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = NamedSharding(mesh, P("data", "model"))
rng = np.random.default_rng(0)
whole = [rng.standard_normal((4, 4, 128, 64)).astype(np.float32) for _ in "qkv"]
arrays = [jax.device_put(a, place) for a in whole]
compiled = kpx.compile(_gradients(_mask_added), *arrays)
assert compiled.fusions == {"kpx.attention and its gradient": 1}, compiled.fusions
plain = jax.jit(_gradients(_mask_added))(*whole)
with jax.enable_x64(True):
    exact = _gradients(_mask_added)(*(a.astype(np.float64) for a in whole))
for ours, theirs, reference in zip(compiled(*arrays), plain, exact, strict=True):
    assert_closer(ours, theirs, reference, relative=2e-6)
print("the same")
"""


def test_four_devices_give_what_one_gives():
    on_four(RUN)
