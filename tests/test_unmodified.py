"""Programs that never heard of kpx: what JAX compiles is rewritten, and nothing else changes."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx import jax_internals, unmodified
from kpx.errors import RewriteWarning
from kpx.precision import Budget

X = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)


def _function():
    def layer(x):
        return (x - jnp.mean(x, 1, keepdims=True)) / jnp.sqrt(jnp.var(x, 1, keepdims=True) + 1e-5)

    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.tanh(layer(x)) @ x.T / 4)))


def test_what_jax_compiles_inside_is_rewritten_and_gives_the_same():
    wanted = _function()(X)
    with kpx.everywhere() as told:
        found = _function()(X)
    assert told.modules == 1
    assert sum(told.rewrites.values()) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_outside_nothing_is():
    with kpx.everywhere() as told:
        pass
    _function()(X)
    assert told.modules == 0


def test_a_config_holds_for_all():
    with kpx.everywhere(kpx.Config(level="none")) as told:
        _function()(X)
    assert told.rewrites == {}


def test_several_devices_are_left_partitioned():
    from tests.devices import on_four

    on_four(
        "import jax, jax.numpy as jnp, numpy as np, kpx\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "x = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh, P('data')))\n"
        "with kpx.everywhere() as told:\n"
        "    y = jax.jit(lambda x: jnp.tanh(x - x.mean(1, keepdims=True)) / 4 + (x / 2).sum())(x)\n"
        "assert told.modules == 1 and len(y.sharding.device_set) == 4, (told, y.sharding)\n"
        "np.testing.assert_allclose(y, 64.0)\n"
        "print('the same')\n"
    )


def test_a_module_that_cannot_be_rewritten_is_compiled_as_it_was(monkeypatch):
    def failing(module, context):
        raise kpx.RewriteError("planted")

    monkeypatch.setattr(unmodified, "optimize_module", failing)
    with kpx.everywhere() as told, pytest.warns(RewriteWarning, match="planted"):
        found = _function()(X)
    assert told.modules == 0
    np.testing.assert_allclose(found[0], _function()(X)[0], rtol=1e-5)


def test_a_jax_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(jax_internals._compiler, "compile_or_get_cached", lambda module, options: None)
    with pytest.raises(kpx.UnsupportedError, match=r"does not know.*takes module, options"), kpx.everywhere():
        pass


def test_a_budget_is_refused():
    budget = Budget(lambda outputs, wanted: 1.0, 0.9, [X])
    with pytest.raises(kpx.ConfigError, match="takes no budget"), kpx.everywhere(kpx.Config(precision=budget)):
        pass


def test_a_program_runs_as_main_with_its_arguments(tmp_path):
    (tmp_path / "helper.py").write_text("NUMBER = 4.0\n")
    (tmp_path / "train.py").write_text(
        "import sys, jax, jax.numpy as jnp\nfrom helper import NUMBER\n"
        "f = jax.jit(jax.grad(lambda x: jnp.sum(jnp.tanh(x - x.mean()) / NUMBER + (x * 2).sum() / 8)))\n"
        "if __name__ == '__main__':\n    f(jnp.ones(8)).block_until_ready()\n    print(sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "kpx", "run", str(tmp_path / "train.py"), "--rate", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    assert "['--rate', '3']" in done.stdout
    assert "kpx: 1 modules rewritten" in done.stderr
