"""Compilers in processes of their own: what they give, and what becomes of those that abort, hang or will not stop talking."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

import kpx
from kpx.hardware import plugins, worker, xpu
from kpx.hardware.worker import Worker
from tests import intel


def f(x, w):
    return jnp.tanh(x @ w)


X, W = jax.ShapeDtypeStruct((128, 256), jnp.float32), jax.ShapeDtypeStruct((256, 512), jnp.float32)
AVX2 = kpx.Target("cpu:avx2")


def _module() -> str:
    return jax.jit(f).lower(X, W).as_text()


def _request(**changes):
    request = {"do": "compile", "module": _module(), "topology": "", "topology_options": {}, "mesh": (), "slices": 1}
    return request | {"options": {}} | changes


def _program(worker):
    return worker.ask({"do": "hlo", "id": worker.ask(_request(), 60)["id"]}, 60)["hlo"]


@pytest.fixture
def cpu_worker():
    made = Worker("cpu", {}, [], [])
    yield made
    made.close()


def test_a_worker_is_used_again(cpu_worker):
    first = cpu_worker.ask(_request(), 60)
    process = cpu_worker._running[0].pid
    second = cpu_worker.ask(_request(), 60)
    assert cpu_worker._running[0].pid == process
    assert first["id"] != second["id"]


def test_a_compiler_that_is_killed_is_a_compile_error_and_the_next_compile_works(cpu_worker):
    cpu_worker.ask(_request(), 60)
    os.kill(cpu_worker._running[0].pid, signal.SIGSTOP)  # so that it cannot answer before it is ended
    pid = cpu_worker._running[0].pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGABRT)).start()
    threading.Timer(0.4, os.kill, (pid, signal.SIGCONT)).start()
    with pytest.raises(kpx.CompileError, match=r"aborted: its process was ended by SIGABRT.*the next compile"):
        cpu_worker.ask(_request(), 60)
    assert _program(cpu_worker).startswith("HloModule")


def test_a_compiler_that_hangs_is_stopped_at_the_limit(cpu_worker):
    cpu_worker.ask(_request(), 60)
    os.kill(cpu_worker._running[0].pid, signal.SIGSTOP)
    with pytest.raises(kpx.CompileError, match=r"had not ended after 0\.5 seconds.*compile_seconds"):
        cpu_worker.ask(_request(), 0.5)
    assert _program(cpu_worker).startswith("HloModule")


def test_an_executable_of_a_worker_that_ended_is_not_taken_for_another(cpu_worker):
    first = cpu_worker.ask(_request(), 60)
    cpu_worker.stop()
    cpu_worker.ask(_request(), 60)
    assert cpu_worker.ask({"do": "serialize", "id": first["id"]}, 60) == {"serialize": None}
    assert cpu_worker.ask({"do": "hlo", "id": first["id"]}, 60) == {"hlo": None}


def test_an_error_carries_the_compilers_words(cpu_worker):
    with pytest.raises(kpx.CompileError, match="KpxError: This is not a valid StableHLO module"):
        cpu_worker.ask(_request(module="nonsense"), 60)
    assert _program(cpu_worker).startswith("HloModule")


def test_a_compiler_that_prints_a_megabyte_compiles_all_the_same():
    talkative = Worker("cpu", {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_MAX_VLOG_LEVEL": "3"}, [], [])
    try:
        while os.path.getsize(talkative._log) < 1 << 20:
            talkative.ask(_request(), 60)
        assert _program(talkative).startswith("HloModule")
        os.kill(talkative._running[0].pid, signal.SIGSTOP)
        with pytest.raises(kpx.CompileError) as caught:
            talkative.ask(_request(), 0.5)
        assert 200 < len(str(caught.value)) < 8000  # its last words, and no more
    finally:
        talkative.close()


def test_progress_is_told_while_a_compiler_works(cpu_worker):
    cpu_worker.ask(_request(), 60)
    told = []
    os.kill(cpu_worker._running[0].pid, signal.SIGSTOP)
    threading.Timer(0.7, os.kill, (cpu_worker._running[0].pid, signal.SIGCONT)).start()
    cpu_worker.ask(_request(), 60, lambda seconds, held: told.append((seconds, held)))
    assert len(told) >= 2
    assert told[-1][0] > told[0][0]
    assert told[0][1] > 1 << 20


def test_threads_that_compile_at_once_all_get_their_own():
    sizes = [64, 128, 192]
    found = {}

    def compile_one(n):
        x = jax.ShapeDtypeStruct((n, n), jnp.float32)
        found[n] = kpx.compile(lambda x: x + 1, x, target=AVX2).memory.argument_bytes

    threads = [threading.Thread(target=compile_one, args=(n,)) for n in sizes]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {n: 4 * n * n for n in sizes}


def test_a_process_ends_with_its_parent():
    code = (
        "import kpx, jax\n"
        "from kpx.hardware import worker\n"
        "w = worker.worker(kpx.Target('cpu:avx2'))\n"
        "print(w._process()[0].pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(done.stdout.split()[-1])
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_a_missing_compiler_names_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("KPX_PLUGINS", str(tmp_path))
    monkeypatch.setattr(worker, "_WORKERS", {})
    with pytest.raises(kpx.TargetError, match="`python -m kpx doctor --install tpu`"):
        kpx.compile(f, X, W, target="tpu-v5e:2x2")


def test_a_plugin_whose_python_is_not_here_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("KPX_PLUGINS", str(tmp_path))
    monkeypatch.setattr(xpu, "PYTHON", (3, 99))
    with pytest.raises(kpx.TargetError, match=r"wheels for Python 3\.99 and later; this is Python 3"):
        plugins.install("xpu", print)
    assert not list(tmp_path.iterdir())


@intel.needed
def test_a_compiler_of_another_python_and_jax_compiles():
    compiled = kpx.compile(f, X, W, target="xpu:pvc")
    assert compiled.memory.argument_bytes == 4 * (128 * 256 + 256 * 512)
    assert compiled.cost.product_flops == 2 * 128 * 256 * 512
    assert "own loops" in " ".join(compiled.remarks)


@intel.needed
def test_a_compiler_that_cannot_serialize_says_so(tmp_path):
    with pytest.raises(kpx.CompileError, match="for xpu:pvc cannot be saved: its plugin does not serialize"):
        kpx.compile(f, X, W, target="xpu:pvc").save(tmp_path / "executable")
