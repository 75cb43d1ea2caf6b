"""Pipelines: the schedule, gradients that are those of one device, and what cannot be cut."""

import jax
import jax.numpy as jnp
import pytest

import kpx
from kpx.train.pipeline import Pipelined, Schedule
from tests.devices import on_four

CASES = [(1, 1, 4), (2, 1, 2), (4, 1, 4), (4, 1, 9), (2, 2, 4), (4, 2, 8), (2, 4, 6), (3, 3, 9)]


@pytest.mark.parametrize(("stages", "parts", "microbatches"), CASES)
def test_every_part_computes_every_microbatch_once_forward_and_backward(stages, parts, microbatches):
    schedule = Schedule(stages, parts, microbatches)
    wanted = {(s, p, m) for s in range(stages) for p in range(parts) for m in range(microbatches)}
    for way in (schedule.forward, schedule.backward):
        done = [(s, p, m) for t in range(schedule.ticks) for s in range(stages) for v, p, m in [way(t, s)] if v]
        assert len(done) == len(wanted)
        assert set(done) == wanted


@pytest.mark.parametrize(("stages", "parts", "microbatches"), CASES)
def test_what_a_part_needs_was_computed_a_tick_before_by_its_neighbour(stages, parts, microbatches):
    schedule = Schedule(stages, parts, microbatches)
    forward, backward = (
        {(p * stages + s, m): t for t in range(schedule.ticks) for s in range(stages) for v, p, m in [way(t, s)] if v}
        for way in (schedule.forward, schedule.backward)
    )
    last = stages * parts - 1
    for (place, microbatch), tick in forward.items():
        assert place == 0 or forward[place - 1, microbatch] == tick - 1
    for (place, microbatch), tick in backward.items():
        assert tick == (forward[last, microbatch] if place == last else backward[place + 1, microbatch]) + 1


@pytest.mark.parametrize(("stages", "parts", "microbatches"), [*CASES, (4, 1, 64), (2, 2, 64)])
def test_slots_are_not_taken_by_two_microbatches_at_once(stages, parts, microbatches):
    schedule = Schedule(stages, parts, microbatches)
    for s in range(stages):
        held: dict[tuple[int, int], int] = {}
        for t in range(schedule.ticks):
            valid, part, microbatch = schedule.forward(t, s)
            if valid:
                assert (part, microbatch % schedule.slots) not in held
                held[part, microbatch % schedule.slots] = microbatch
            valid, part, microbatch = schedule.backward(t, s)
            if valid:
                assert held.pop((part, microbatch % schedule.slots)) == microbatch
    if microbatches == 64:
        assert schedule.slots < microbatches  # memory does not grow with them


_SAME = """
import jax, jax.numpy as jnp, numpy as np
from kpx.train.pipeline import Pipelined
from tests.sharding.steps import batches, llama_loss, start
loss, (weights, _), (tokens,) = llama_loss(), start(), batches(1)
def told(weights, tokens):
    return loss(weights, tokens), {"size": jnp.mean(tokens.astype(jnp.float32))}
wanted = jax.jit(jax.value_and_grad(told, has_aux=True))(weights, tokens)
for stages, data, microbatches, parts in ((4, 1, 4, 1), (2, 2, 4, 1), (2, 2, 4, 2)):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((stages, data), ("pipeline", "data"), axis_types=kinds)
    found = jax.jit(Pipelined(told, mesh, microbatches, parts))(weights, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
print("the same")
"""


def test_its_gradients_are_those_of_one_device():
    on_four(_SAME)


def _pipelined(loss, params, batch, **options):
    mesh = jax.make_mesh((1,), ("pipeline",), axis_types=(jax.sharding.AxisType.Auto,))
    return Pipelined(loss, mesh, **{"microbatches": 2, **options})(params, batch)


def test_a_loss_without_a_scan_over_layers_is_an_error():
    with pytest.raises(kpx.ConfigError, match="no scan over layers"):
        _pipelined(lambda p, b: (jnp.sum(b @ p), {}), jnp.ones((4, 4)), jnp.ones((4, 4)))


def test_layers_that_stages_do_not_divide_are_an_error():
    def loss(params, batch):
        return jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), batch, params)[0]), {}

    with pytest.raises(kpx.ConfigError, match="3 layers cannot be divided into 1 stages of 2 parts"):
        _pipelined(loss, jnp.ones((3, 4, 4)), jnp.ones((4, 4)), parts=2)


def test_axes_beside_pipeline_and_data_are_an_error():
    mesh = jax.sharding.AbstractMesh((2, 2), ("pipeline", "tensor"))
    with pytest.raises(kpx.ConfigError, match="has 'tensor' too"):
        Pipelined(lambda p, b: p, mesh, 2)
