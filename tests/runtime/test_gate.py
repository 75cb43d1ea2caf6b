"""The gate: what is slower or wrong is taken back, what was measured is remembered, and a bad memory harms nothing."""

import json
import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from kpx.runtime import choices, gate
from tests.optional import torch
from tests.planting import plant


@pytest.fixture(autouse=True)
def _measuring(monkeypatch, tmp_path):
    monkeypatch.delenv("KPX_MEASURE_SECONDS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gate, "budget", lambda config, seconds: 600.0)  # the machine may be busy


def _slow(op):
    """A sine by a cosine, and a lot of work that changes nothing."""
    y = op.operand
    for _ in range(100):
        y = stablehlo.tanh(y)
    shifted = stablehlo.subtract(op.operand, m.like(y, np.pi / 2))
    return stablehlo.add(stablehlo.cosine(shifted), stablehlo.multiply(y, m.like(y, 0.0)))


def _wrong(op):
    return stablehlo.cosine(op.operand)


def _raising(op):
    raise RuntimeError("planted")


X = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)


def _function():
    return kpx.jit(lambda x: jnp.tanh(jnp.sin(x)) @ x.T)


def test_a_planted_slow_rewrite_is_taken_back_and_told(monkeypatch):
    plant(monkeypatch, _slow)
    fn = _function()
    np.testing.assert_allclose(fn(X), np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)
    compiled = kpx.compile(_function(), X)
    assert "planted" not in compiled.rewrites
    assert "of the time" in compiled.reverted["test_gate"]


def test_a_planted_wrong_rewrite_is_taken_back_with_a_warning(monkeypatch):
    plant(monkeypatch, _wrong)
    with pytest.warns(kpx.errors.RewriteWarning, match="test_gate.*wrong"):
        got = _function()(X)
    np.testing.assert_allclose(got, np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)
    compiled = kpx.compile(_function(), X)  # by memory
    assert "wrong" in compiled.reverted["test_gate"]


def test_a_planted_wrong_rewrite_of_a_pytorch_model_is_taken_back(monkeypatch):
    plant(monkeypatch, _wrong)

    class Sine(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x) @ x.T

    x = torch.randn(64, 64)
    optimized = kpx.optimize(Sine().eval())
    with torch.no_grad(), pytest.warns(kpx.errors.RewriteWarning, match="test_gate.*wrong"):
        torch.testing.assert_close(optimized(x), Sine()(x), rtol=1e-4, atol=1e-4)


def test_a_rewrite_that_raises_is_left_out(monkeypatch):
    plant(monkeypatch, _raising)
    with pytest.warns(kpx.errors.RewriteWarning, match="planted.*raised"):
        np.testing.assert_allclose(_function()(X), np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)


def test_what_helps_is_kept():
    linear = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)).eval()
    optimized, x = kpx.optimize(linear), torch.randn(256, 256)
    with torch.no_grad():
        optimized(x)
    compiled = optimized.compile_for([x], {})
    assert compiled.measured
    assert compiled.rewrites or compiled.reverted


def _memory() -> dict:
    (file,) = choices.folder().glob("*.json")
    return json.loads(file.read_text())


def test_a_choice_is_remembered_and_nothing_is_measured_again(monkeypatch):
    plant(monkeypatch, _slow)
    _function()(X)
    assert len(_memory()["choices"]) == 1
    monkeypatch.setattr(gate, "choose", lambda *a: pytest.fail("measured again"))
    np.testing.assert_allclose(_function()(X), np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)


def test_another_configs_or_another_modules_choice_is_not_used():
    plain = kpx.jit(lambda x: jnp.sum(x, 0) / 3 + jnp.mean(x, 0))
    plain(X)
    count = len(_memory()["choices"])
    kpx.jit(lambda x: jnp.sum(x, 0) / 4 + jnp.mean(x, 0))(X)
    assert len(_memory()["choices"]) == count + 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "of another version"),
        (lambda text: text.replace("kpx choices 1", "kpx choices 0"), "of another version"),
        (lambda text: text.replace(jax.__version__, "0.0.1"), "they are of jax 0.0.1"),
        (lambda text: json.dumps({**json.loads(text), "choices": []}), "not whole"),
    ],
    ids=["truncated", "empty", "another file", "another format", "another version", "no choices"],
)
def test_a_damaged_file_is_not_used_and_says_why(damage, says):
    fn = _function()
    fn(X)
    (file,) = choices.folder().glob("*.json")
    file.write_text(damage(file.read_text()))
    with pytest.warns(kpx.errors.KernelCacheWarning, match=says):
        got = _function()(X)
    np.testing.assert_allclose(got, np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)
    assert _memory()["format"] == "kpx choices 1"  # written anew


@pytest.mark.parametrize(
    "entry",
    [
        {"dropped": {"no such group": "x"}, "options": {}},
        {"dropped": {"canonicalize": "x", "kernels": "x", "packed": "x"}, "options": {}},
        {"dropped": [], "options": {}},
        {"dropped": {}, "options": {"xla_no_such_option": "1"}},
        {"dropped": {}, "options": {"xla_cpu_prefer_vector_width": "7"}},
        "nonsense",
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::kpx.errors.KernelCacheWarning")
def test_a_poisoned_choice_gives_right_results(entry):
    _function()(X)
    (file,) = choices.folder().glob("*.json")
    found = json.loads(file.read_text())
    found["choices"] = dict.fromkeys(found["choices"], entry)
    file.write_text(json.dumps(found))
    np.testing.assert_allclose(_function()(X), np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)


def test_a_folder_that_cannot_be_written_is_told_and_everything_runs(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(kpx.errors.KernelCacheWarning, match="cannot be written"):
        _function()(X)


def test_a_shipped_file_is_used_and_another_machines_is_not(monkeypatch, tmp_path):
    plant(monkeypatch, _slow)
    _function()(X)
    (file,) = choices.folder().glob("*.json")
    shipped = tmp_path / "shipped.json"
    shipped.write_text(file.read_text())
    file.unlink()
    config = kpx.Config(choices=str(shipped), measure_seconds=0)
    assert "test_gate" in kpx.compile(lambda x: jnp.tanh(jnp.sin(x)) @ x.T, X, config=config).reverted
    found = json.loads(shipped.read_text())
    found["environment"]["device"] = "another"
    shipped.write_text(json.dumps(found))
    with pytest.warns(kpx.errors.KernelCacheWarning, match="they are of device another, and here is"):
        compiled = kpx.compile(lambda x: jnp.tanh(jnp.sin(x)) @ x.T, X, config=config)
    assert not compiled.reverted


def test_a_clock_that_jumps_changes_no_result(monkeypatch):
    ticks = iter(np.random.default_rng(0).standard_normal(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda clock=time.perf_counter: clock() + 3600 * next(ticks))
    np.testing.assert_allclose(_function()(X), np.tanh(np.sin(X)) @ X.T, rtol=1e-4, atol=1e-3)


def test_kernels_that_were_dropped_are_dropped_by_memory_too():
    config = gate.without(kpx.Config(), {"kernels": "slower"}, {})
    assert ("kpx.attention", "xla") in config.kernels


def test_what_there_was_no_time_for_is_not_remembered(monkeypatch):
    monkeypatch.setattr(gate, "budget", lambda config, seconds: 0.0)
    fn = kpx.jit(lambda x: jnp.sum(x, 0) / 3 + jnp.mean(x, 0) @ x.T @ x)
    fn(X)
    assert not list(choices.folder().glob("*.json"))


def test_nothing_is_measured_where_it_is_off_or_everything_is_exact(monkeypatch):
    monkeypatch.setattr(gate, "choose", lambda *a: pytest.fail("measured"))
    for config in (kpx.Config(measure_seconds=0), kpx.Config(level="conservative"), kpx.Config(level="none")):
        kpx.jit(lambda x: jnp.mean(x, 0), config=config)(X)


def test_a_function_with_effects_runs_once_a_call():
    seen = []

    @kpx.jit
    def fn(x):
        jax.debug.callback(lambda: seen.append(1))
        return jnp.mean(x, 0) @ x.T

    jax.block_until_ready(fn(X))
    jax.effects_barrier()
    assert len(seen) == 1


def test_donated_arguments_are_measured_on_copies():
    fn = kpx.jit(lambda x: jnp.tanh(jnp.mean(x, 0, keepdims=True) + x), donate_argnums=0)
    x = jnp.asarray(X)
    np.testing.assert_allclose(fn(x), np.tanh(X.mean(0, keepdims=True) + X), rtol=1e-5, atol=1e-6)


def test_random_numbers_are_drawn_as_often_as_without_measuring():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout()).train()
    x = torch.randn(8, 64)

    def draws(config):
        torch.manual_seed(7)
        optimized = kpx.optimize(model, config=config)
        with torch.no_grad():
            optimized(x)
        return torch.rand(3)

    assert torch.equal(draws(kpx.Config()), draws(kpx.Config(measure_seconds=0)))


_PROCESS = """
    import numpy as np
    import jax.numpy as jnp
    import kpx
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    for i in range(6):
        got = kpx.jit(lambda x: jnp.mean(x, 0) @ x.T / (1 + i))(x)
        np.testing.assert_allclose(got, x.mean(0) @ x.T / (1 + i), rtol=1e-4, atol=1e-4)
"""


def test_processes_that_measure_at_once_lose_and_damage_nothing(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(_PROCESS)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in running:
        assert process.wait(timeout=1200) == 0, process.stderr and process.stderr.read()
    assert len(_memory()["choices"]) == 6


def test_a_loop_of_layers_that_is_slower_is_taken_back(monkeypatch):
    from kpx.passes import rolled
    from tests.passes.test_layers import X as x
    from tests.passes.test_layers import _model, needs_onednn

    if needs_onednn.args[0]:
        pytest.skip(needs_onednn.kwargs["reason"])

    def slow(way):
        # The loop is slow, and what it needs (packed weights) helps for certain: what is found doesn't hang on noise.
        if rolled.LOOP in way.context.layers.values():
            way.run = lambda run=way.run: (time.sleep(0.2), run())[1]
        elif "packed" not in gate.groups(way.context):
            way.run = lambda run=way.run: (time.sleep(0.05), run())[1]
        return way

    monkeypatch.setattr(
        gate, "choose", lambda first, make, s, choose=gate.choose: choose(slow(first), lambda *a: slow(make(*a)), s)
    )
    model = _model(16)
    optimized = kpx.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)
    compiled = optimized.compile_for([x], {})
    assert "of the time" in compiled.reverted.get("layers", ""), compiled.measured
    assert compiled.layers == {}
