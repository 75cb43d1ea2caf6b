"""Programs on disk: a second process neither captures nor compiles, and what is stale, damaged or unsure is made anew."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

import kpx
from kpx.bridges.torch import ahead as bridge
from kpx.bridges.torch.fingerprint import fingerprint
from kpx.runtime import programs
from tests.optional import torch


class Model(torch.nn.Module):
    def __init__(self, scale=2.0, function=torch.nn.functional.gelu):
        super().__init__()
        self.linear, self.scale, self.function = torch.nn.Linear(16, 16), scale, function
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, *, shift=0.0):
        self.calls.add_(1)
        return {"y": self.function(self.linear(x)) * self.scale + shift, "n": 3}


@pytest.fixture
def config(tmp_path, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    yield kpx.Config(cache_dir=str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", before)


X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def _run(model, config, **kwargs):
    with torch.no_grad():
        compiled = kpx.compile(model, X, config=config, **kwargs)
        got, wanted = compiled(X, **kwargs), model(X, **kwargs)
    torch.testing.assert_close(got["y"], wanted["y"], rtol=1e-5, atol=1e-5)
    assert got["n"] == 3


def _is_captured(monkeypatch, model, config, **kwargs) -> bool:
    captured = []
    with monkeypatch.context() as patch:
        patch.setattr(bridge, "capture", lambda *a, f=bridge.capture: captured.append(1) or f(*a))
        _run(model, config, **kwargs)
    return bool(captured)


def _saved(config):
    return list((programs.path(config.cache_dir, "x").parent).glob("*.kpx"))


def test_the_same_model_is_not_captured_again_and_its_state_and_weights_are_its_own(config, monkeypatch):
    torch.manual_seed(0)
    assert _is_captured(monkeypatch, Model(), config)
    torch.manual_seed(1)
    model = Model()
    assert not _is_captured(monkeypatch, model, config)
    assert model.calls == 2  # once by kpx, once by eager
    compiled = kpx.compile(model, X, config=config)
    with torch.no_grad():
        compiled(X)
        model.linear.weight.mul_(3)
        torch.testing.assert_close(compiled(X)["y"], model(X)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "kwargs", "changes"),
    [
        (lambda: Model(3.0), {}, {}),
        (lambda: Model(function=torch.nn.functional.relu), {}, {}),
        (lambda: Model().double().float().train(False), {"shift": 1.0}, {}),
        (lambda: Model().eval(), {}, {}),
        (Model, {}, {"level": "conservative"}),
    ],
    ids=["an attribute", "a function", "a constant", "the mode", "the config"],
)
def test_what_decides_what_is_compiled_has_its_own_program(model, kwargs, changes, config, monkeypatch):
    import dataclasses

    _run(Model(), config)
    assert _is_captured(monkeypatch, model(), dataclasses.replace(config, **changes), **kwargs)


def test_a_file_of_the_users_that_changed_makes_another_program(tmp_path, monkeypatch):
    (tmp_path / "helper_of_model.py").write_text("def scale(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import helper_of_model  # noqa: F401

    before = fingerprint(Model(), "key", {}, None)
    assert before == fingerprint(Model(), "key", {}, None)
    (tmp_path / "helper_of_model.py").write_text("def scale(x):\n    return x * 3.5\n")
    assert fingerprint(Model(), "key", {}, None) != before


def test_a_model_has_a_word_wherever_its_process_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint(Model(), "key", {}, None) is not None


@pytest.mark.parametrize(
    "what", [lambda x: x, object(), iter([]), torch.zeros(1 << 17)], ids=["closure", "object", "iterator", "large"]
)
def test_what_has_no_name_in_another_process_is_not_kept(what, config):
    model = Model()
    model.held = what
    assert fingerprint(model, "key", {}, None) is None
    _run(model, config)
    assert not _saved(config)


def test_a_module_that_is_held_and_is_no_submodule_is_not_kept():
    model = Model()
    model.hidden = [torch.nn.Linear(4, 4)]
    assert fingerprint(model, "key", {}, None) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"x" * 9, lambda b: b"else" + b]
)
def test_a_damaged_program_is_made_anew_and_told(damage, config, monkeypatch):
    _run(Model(), config)
    (file,) = _saved(config)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(kpx.KernelCacheWarning, match="damaged"):
        assert _is_captured(monkeypatch, Model(), config)
    assert not _is_captured(monkeypatch, Model(), config)


def test_a_program_of_other_parts_is_made_anew(config, monkeypatch):
    _run(Model(), config)
    (file,) = _saved(config)
    programs.save(config.cache_dir, file.stem, {"signature": None})
    with pytest.warns(kpx.KernelCacheWarning, match="compiled anew"):
        assert _is_captured(monkeypatch, Model(), config)


def test_a_full_disk_is_told_and_everything_runs(config, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(programs.os, "replace", full)
    with pytest.warns(kpx.KernelCacheWarning, match="No space left on device"):
        _run(Model(), config)
    assert not list(programs.path(config.cache_dir, "x").parent.iterdir())


def test_a_folder_that_is_a_file_is_told_and_everything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be (read|written)"):
        _run(Model(), kpx.Config(cache_dir=str(tmp_path / "file")))


# Graphs that calls compile ---------------------------------------------------------------------


def _called(model, config, *inputs):
    """Whether a call of the optimized model traced a program, and what the call returned."""
    optimized = kpx.optimize(model, config=config)
    outputs = optimized(*inputs)
    return any("trace" in compiled.seconds for compiled in optimized.compiled_programs()), outputs


def test_a_graph_that_was_compiled_before_is_not_traced_again(config):
    with torch.no_grad():
        assert _called(Model().eval(), config, X)[0]
        model = Model().eval()
        traced, outputs = _called(model, config, X)
        torch.testing.assert_close(outputs["y"], model(X)["y"], rtol=1e-5, atol=1e-5)
    assert not traced
    assert model.calls == 2  # once by kpx, once by eager


def test_a_graph_with_its_backward_pass_is_not_traced_again(config):
    kpx.optimize(Model(), config=config)(X)["y"].square().sum().backward()
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    optimized = kpx.optimize(model, config=config)
    for each in (optimized, twin):
        each(X)["y"].square().sum().backward()
    assert not any("trace" in compiled.seconds for compiled in optimized.compiled_programs())
    torch.testing.assert_close(model.linear.weight.grad, twin.linear.weight.grad, rtol=1e-4, atol=1e-4)


def test_what_decides_what_a_graph_computes_has_its_own_program(config):
    with torch.no_grad():
        _called(Model().eval(), config, X)
        for model in (Model(3.0), Model(function=torch.nn.functional.relu), Model().double()):
            x = X.double() if model.linear.weight.dtype == torch.float64 else X
            traced, outputs = _called(model, config, x)
            assert traced
            torch.testing.assert_close(outputs["y"], model(x)["y"], rtol=1e-5, atol=1e-5)


_PROCESS = """
    import sys, warnings
    warnings.simplefilter("error", UserWarning)
    import torch, kpx
    from kpx.bridges.torch import ahead as bridge
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8)).eval()
    x = torch.randn(32, 64)
    def refuse(*_):
        raise SystemExit("captured")
    if sys.argv[2] == "cached":
        bridge.capture = refuse
    import jax
    compiled = []
    jax.monitoring.register_event_listener(lambda name, **_: compiled.append(name))
    with torch.no_grad():
        optimized = kpx.compile(model, x, config=kpx.Config(cache_dir=sys.argv[1], measure_seconds=0))
        for _ in range(int(sys.argv[3])):
            torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-5)
    if sys.argv[2] == "cached":
        misses = [n for n in compiled if n.endswith("cache_misses")]
        assert not misses, misses
"""


def _process(folder, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(_PROCESS), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_thousand_runs_of_a_cached_model_from_four_processes_compile_nothing(tmp_path):
    first = _process(tmp_path, "new", 1)
    assert first.wait(timeout=1200) == 0, first.stderr and first.stderr.read()
    running = [_process(tmp_path, "cached", 250) for _ in range(4)]
    for process in running:
        assert process.wait(timeout=1200) == 0, process.stderr and process.stderr.read()


def test_four_processes_that_compile_at_once_agree(tmp_path):
    running = [_process(tmp_path, "new", 10) for _ in range(4)]
    for process in running:
        assert process.wait(timeout=1200) == 0, process.stderr and process.stderr.read()
    (file,) = (tmp_path / "programs").glob("*.kpx")
    assert file.stat().st_size


def test_a_program_that_calls_our_own_kernels_runs_in_another_process(config):
    """What makes the calls is registered there too."""
    code = textwrap.dedent(f"""
        import torch, kpx
        from kpx.bridges.torch import ahead as bridge
        def refuse(*a): raise AssertionError("captured")
        bridge.capture = refuse if {{again}} else bridge.capture
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256)).eval()
        x = torch.randn(1, 64)
        config = kpx.Config(cache_dir={config.cache_dir!r}, precision="int8-weights")
        with torch.no_grad():
            given = kpx.compile(model, x, config=config)(x)
            torch.testing.assert_close(given, model(x), rtol=0.1, atol=0.05)
    """)
    for again in (False, True):
        run = subprocess.run(
            [sys.executable, "-c", code.replace("{again}", str(again))], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr[-2000:]
