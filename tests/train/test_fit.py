"""The largest batch that fits, without a device."""

import jax
import jax.numpy as jnp
import optax
import pytest

import kpx
from kpx.hardware import plugins
from kpx.train import Step, fit_batch

WIDTH, LAYERS = 2048, 8


def _loss(params, carried, batch, key):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["a"]) @ w["b"] + x, None), batch["x"], params)
    return jnp.mean(x**2), (carried, {})


def _given(width=WIDTH):
    params = {n: jax.ShapeDtypeStruct((LAYERS, width, width), jnp.float32) for n in "ab"}
    step = Step(_loss, optax.sgd(0.1), remat="full")
    return step, jax.eval_shape(step.start, params)


def _batch(rows, width=WIDTH):
    return {"x": jax.ShapeDtypeStruct((rows, 64, width), jnp.float32)}


def test_it_fits_and_more_would_not():
    step, state = _given()
    rows, plan = fit_batch(step, state, _batch, target="tpu-v5e:2x2", confirm=False)
    assert plan.fits
    assert rows % 4 == 0
    with pytest.raises(kpx.PlanError):
        kpx.plan(step, state, _batch(rows + 4), target="tpu-v5e:2x2", confirm=0)


@pytest.mark.slow
@pytest.mark.skipif(plugins.find("tpu") is None, reason="the TPU's compiler is not installed: not run")
def test_the_compiler_has_the_last_word():
    step, state = _given()
    _, plan = fit_batch(step, state, _batch, target="tpu-v5e:2x2")
    assert plan.confirmed
    assert plan.memory_per_device_bytes <= kpx.Target("tpu-v5e:2x2").spec.memory


def test_what_never_fits_is_an_error():
    step, state = _given(32768)
    with pytest.raises(kpx.PlanError, match="No plan fits"):
        fit_batch(step, state, lambda rows: _batch(rows, 32768), target="tpu-v5e:2x2", confirm=False)
