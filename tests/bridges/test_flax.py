"""flax models: nnx modules, and linen modules, bound or not."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kpx

X = jax.random.normal(jax.random.key(1), (3, 8))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        hidden = self.dropout(self.norm(nnx.gelu(self.first(x))))
        return {"y": self.second(hidden) * scale}


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.relu(linen.Dense(16)(x)))


def _eval_model():
    model = Model()
    model.eval()
    return model


def test_an_nnx_model_gives_what_it_gave():
    model = _eval_model()
    optimized = kpx.optimize(model)
    np.testing.assert_allclose(optimized(X)["y"], model(X)["y"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(optimized(X, scale=2.0)["y"], model(X, scale=2.0)["y"], rtol=1e-5, atol=1e-6)


def test_a_later_change_of_an_nnx_weight_is_seen():
    model = _eval_model()
    optimized = kpx.optimize(model, example_inputs=(X,))
    before = optimized(X)["y"]
    model.first.kernel[...] = model.first.kernel[...] * 2
    assert not np.allclose(optimized(X)["y"], before)
    np.testing.assert_allclose(optimized(X)["y"], model(X)["y"], rtol=1e-5, atol=1e-6)


def test_an_nnx_model_in_training_mode_is_refused_because_its_state_would_be_lost():
    with pytest.raises(kpx.UnsupportedError, match=r"changes its state.*mean.*model\.eval\(\)"):
        kpx.optimize(Model())(X)


def test_under_a_transformation_an_nnx_model_is_itself():
    model = _eval_model()
    optimized = kpx.optimize(model)
    wanted = jax.grad(lambda x: model(x)["y"].sum())(X)
    np.testing.assert_allclose(jax.grad(lambda x: optimized(x)["y"].sum())(X), wanted, rtol=1e-5, atol=1e-6)


def test_weights_are_prepared_and_the_compiled_tells():
    compiled = kpx.compile(_eval_model(), jax.ShapeDtypeStruct((3, 8), jnp.float32))
    assert compiled.prepare_stablehlo is not None  # BatchNorm's factors
    assert compiled(X)["y"].shape == (3, 4)
    with pytest.raises(kpx.InputError, match="shapes or dtypes"):
        compiled(X[:2])


def test_a_linen_module_takes_its_variables():
    module = Dense()
    variables = module.init(jax.random.key(0), X)
    np.testing.assert_allclose(kpx.optimize(module)(variables, X), module.apply(variables, X), rtol=1e-5, atol=1e-6)


def test_a_bound_linen_module_brings_its_variables():
    module = Dense()
    variables = module.init(jax.random.key(0), X)
    optimized = kpx.optimize(module.bind(variables))
    np.testing.assert_allclose(optimized(X), module.apply(variables, X), rtol=1e-5, atol=1e-6)


def test_an_argument_that_is_no_array_is_refused():
    with pytest.raises(kpx.InputError, match="argument of type `str`"):
        kpx.optimize(_eval_model())("text")
