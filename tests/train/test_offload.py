"""The host's memory: an optimizer's state and layers' products held there change no number, and leave the device theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kpx
from bench import llama
from kpx.train import Step
from kpx.train.offload import updated
from tests.devices import needs_cuda, on_four
from tests.sharding.steps import specs

MEDIUM = llama.Sizes(width=512, hidden=2048, layers=6, heads=8, kv_heads=4, vocabulary=4096)


def _step(sizes=MEDIUM, dtype=jnp.bfloat16, optimizer=None, **options):
    def loss(weights, carried, tokens, key):
        weights = jax.tree.map(lambda w: w.astype(dtype), weights)
        x = weights["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (llama._layer(x, w, sizes), None), x, weights["layers"])
        logits = (llama._norm(x, weights["norm"]) @ weights["embedding"].T).astype(jnp.float32)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])), (carried, {})

    return Step(loss, optimizer or optax.adamw(1e-3), **options)


def _planned(target, batch=16, length=1024, **options):
    step = _step(**options)
    weights, _, tokens = specs(MEDIUM, batch, length)
    state = jax.eval_shape(step.start, weights)
    plan = kpx.plan(step, state, tokens, target=target, fixed={"fsdp": 4}, confirm=0)
    return plan, step


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-2), optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9))]
)
def test_a_streamed_update_is_the_update(optimizer):
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.standard_normal((4, 8)), jnp.float32) for n in "abc"}
    gradient = jax.tree.map(lambda a: a * 0.1 + 1, params)
    state = optimizer.init(params)

    def plain(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    ours, wanted = (jax.jit(f)(gradient, state, params) for f in (lambda *given: updated(optimizer, *given), plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, wanted)
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)


_TRAINS = """
import jax, jax.numpy as jnp, numpy as np
import kpx
from tests.sharding.steps import SMALL, batches, start
from tests.train.test_offload import _step
params, data = start()[0], batches(4)
def losses(**options):
    step = _step(SMALL, jnp.float32, **options)
    state = step.start(jax.tree.map(lambda a: a.copy(), params))
    plan = kpx.plan(step, state, data[0], target="cpu", fixed={"fsdp": 2, "tensor": 2})
    run, at, found = plan.apply(step), plan.placed(), []
    state = jax.device_put(state, at[0])
    for tokens in data:
        state, told = run(state, jax.device_put(tokens, at[1]))
        found.append(float(told["loss"]))
    return found, {a.sharding.memory_kind for a in jax.tree.leaves(state.optimizer) if a.ndim}
wanted, kinds = losses()
assert kinds == {"device"}, kinds
for options in ({"offload": True}, {"remat": "offload"}, {"offload": True, "remat": "offload", "microbatches": 2}):
    found, kinds = losses(**options)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert kinds == {"pinned_host" if "offload" in options else "device"}, (options, kinds)
print("the same")
"""


def test_it_trains_to_the_same_losses():
    on_four(_TRAINS)


_RESTORES = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from kpx.train import Trainer
def trainer():
    return Trainer(lambda p, b: jnp.mean((b @ p["w"]) ** 2), optax.adam(0.1), params={"w": jnp.ones((16, 8))},
                   plan={"fsdp": 4}, offload=True, checkpoints=sys.argv[1], log_every=1000)
def data():
    rng = np.random.default_rng(0)
    while True:
        yield rng.standard_normal((8, 16)).astype(np.float32)
first = trainer()
whole = first.fit(data(), 3).losses
first.close()
second = trainer()
further = second.fit(data(), 6).losses
second.close()
assert {a.sharding.memory_kind for a in jax.tree.leaves(second.state.optimizer) if a.ndim} == {"pinned_host"}
assert list(further) == [4, 5, 6]
third = Trainer(lambda p, b: jnp.mean((b @ p["w"]) ** 2), optax.adam(0.1), params={"w": jnp.ones((16, 8))}, log_every=1000)
np.testing.assert_allclose([*whole.values(), *further.values()], [*third.fit(data(), 6).losses.values()], rtol=1e-5)
print("the same")
"""


def test_a_checkpoint_goes_back_to_the_hosts_memory(tmp_path):
    on_four(_RESTORES, str(tmp_path))


@needs_cuda
@pytest.mark.parametrize(
    "options", [{"offload": True, "remat": "full"}, pytest.param({"remat": "offload"}, marks=pytest.mark.slow)]
)
def test_the_compiler_counts_less_memory_of_the_device(options):
    kept = {"remat": "full"} if "offload" in options else {"remat": "dots"}
    (plain, step), (plan, other) = (_planned("cuda:h100:1x4", **given) for given in (kept, options))
    before, after = (
        kpx.compile(p.apply(s), *p.specs, target=p.target).memory for p, s in ((plain, step), (plan, other))
    )
    assert before.host_bytes == 0
    assert after.host_bytes > 0
    foreseen = plain.memory_per_device_bytes - plan.memory_per_device_bytes
    assert before.peak_bytes - after.peak_bytes >= 0.7 * foreseen > 0
    assert plan.price.argument_bytes == pytest.approx(after.argument_bytes, rel=0.1)


@pytest.mark.slow
def test_a_plan_takes_the_hosts_memory_where_nothing_else_fits():
    large = llama.Sizes(width=4096, hidden=14336, layers=16, heads=32, kv_heads=8, vocabulary=32000)
    step = _step(large, remat=None, microbatches=4, offload=None)
    weights, _, tokens = specs(large, 16, 2048)
    state = jax.eval_shape(step.start, weights)
    small, ample = (kpx.plan(step, state, tokens, target=t, confirm=0) for t in ("tpu-v5e:2x2", "tpu-v5e:4x4"))
    assert small.variant["offload"]
    assert not ample.variant["offload"]
    kinds = {s.memory_kind for s in jax.tree.leaves(small.shardings[0].optimizer)}
    assert "pinned_host" in kinds
    assert {s.memory_kind for s in jax.tree.leaves(small.shardings[0].params)}.isdisjoint({"pinned_host"})
