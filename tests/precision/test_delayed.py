"""Delayed scaling: scales of the calls before, a state that goes through the function, products in FP8 units where there are any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.errors import ConfigError, InputError
from kpx.precision.delayed import delayed
from tests.precision.test_few_bits import X, _flat, _loss, _weights
from tests.reference import distance


def _step(weights, x):
    return jax.value_and_grad(_loss)(weights, x)


def test_the_first_call_scales_by_its_own_numbers():
    step = delayed(_step)
    state = step.init(_weights(), X)
    assert state.shape == (17, 2, 16)
    (value, gradients), state = step(state, _weights(), X)
    wanted = _step(_weights(), X)
    assert abs(value - wanted[0]) / wanted[0] < 0.02
    assert 1e-3 < distance(_flat(gradients), _flat(wanted[1])) < 0.15
    assert (state[..., 0] > 0).all()
    assert (state[..., 1:] == 0).all()


def test_the_state_holds_the_largest_of_the_last_calls():
    step = delayed(lambda x, w: x @ w, history=3)
    w = _weights()[0][0]
    state = step.init(X, w)
    for scale in (1.0, 4.0, 2.0, 0.5):
        _, state = step(state, scale * X, w)
    largest = float(jnp.abs(X).max())
    np.testing.assert_allclose(state[0, 0], np.float32([0.5, 2.0, 4.0]) * largest, rtol=1e-6)
    np.testing.assert_allclose(state[0, 1], np.full(3, float(jnp.abs(w).max())), rtol=1e-6)


def test_numbers_beyond_what_was_seen_become_the_largest():
    step = delayed(lambda x, w: x @ w, history=1)
    w = jnp.eye(64)
    state = step.init(X, w)
    _, state = step(state, jnp.ones_like(X), w)
    y, state = step(state, jnp.full_like(X, 8.0), w)
    np.testing.assert_allclose(y, 1.0, rtol=1e-5)
    y, state = step(state, jnp.full_like(X, 8.0), w)
    np.testing.assert_allclose(y, 8.0, rtol=1e-5)


def test_odd_numbers_give_nan_and_do_not_stay_in_the_state():
    step = delayed(lambda x, w: x @ w, history=2)
    w = _weights()[0][0]
    state = step.init(X, w)
    _, state = step(state, X, w)
    y, state = step(state, X.at[0, 0, 0].set(jnp.nan), w)
    assert jnp.isnan(y).all()
    y, state = step(state, X, w)
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(state).all()


def test_zeros_are_zeros():
    step = delayed(lambda x, w: x @ w)
    w = _weights()[0][0]
    y, _ = step(step.init(X, w), jnp.zeros_like(X), w)
    assert (y == 0).all()


def test_training_with_it_reaches_the_loss_of_f32():
    x, target = X.reshape(128, 64), jnp.sin(X.reshape(128, 64) @ _weights()[0][0])[:, :32]

    def step(params, x, target):
        def loss(params):
            return jnp.mean((jnp.tanh(x @ params[0]) @ params[1] - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        return [p - 0.5 * g for p, g in zip(params, gradients, strict=True)], value

    first = [_weights()[1][0], _weights()[1][1][:, :32]]
    fp8 = delayed(step)
    exact, rounded, state = first, first, fp8.init(first, x, target)
    for _ in range(100):
        exact, wanted = jax.jit(step)(exact, x, target)
        (rounded, given), state = fp8(state, rounded, x, target)
    assert wanted < 0.5 * float(jnp.mean(target**2))
    assert abs(given - wanted) / wanted < 0.03


def test_an_h100s_program_has_fp8_products_and_no_maximum_before_them():
    try:
        compiled = delayed(_step, target="cuda:h100").compile(_weights(), X)
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    dots = [line for line in compiled.stablehlo.splitlines() if "dot_general" in line]
    assert len(dots) == 17
    assert all("f8E4M3FN>" in line for line in dots)
    assert sum("f8E5M2>" in line for line in dots) == 11
    assert "f8e4m3fn[" in compiled.hlo


def test_what_is_no_state_or_history_is_refused():
    step = delayed(lambda x, w: x @ w)
    with pytest.raises(InputError, match=r"Begin with `\.init"):
        step(jnp.zeros((2, 2, 16)), X, _weights()[0][0])
    for history in (0, 1.5, True):
        with pytest.raises(ConfigError, match="is not a number of calls"):
            delayed(_step, history=history)
