"""Threads and forks: models called, compiled, changed and copied from several threads at once."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kpx

WIDTH = 16


def _net(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)
    return torch.nn.Sequential(*layers).eval()


def _inputs(batches):
    return {n: torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in batches}


def _wanted(model, inputs):
    with torch.no_grad():
        return {n: model(x) for n, x in inputs.items()}


def _together(*works):
    """Run functions in threads that start at once; raise the first error."""
    barrier = threading.Barrier(len(works))

    def start(work):
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(start, work) for work in works]]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture(params=["no_grad", "grad"])
def mode(request):
    return torch.no_grad if request.param == "no_grad" else torch.enable_grad


def test_eight_threads_make_the_first_calls_of_five_shapes(mode):
    model, inputs = _net(), _inputs(range(1, 6))
    wanted, optimized = _wanted(model, inputs), kpx.optimize(model)

    def work(first):
        with mode():
            for n in (1 + (first + k) % 5 for k in range(5)):
                torch.testing.assert_close(optimized(inputs[n]).detach(), wanted[n])

    _together(*(lambda i=i: work(i) for i in range(8)))


def test_eight_threads_call_four_shapes_while_a_ninth_compiles_others(mode):
    model, inputs = _net(), _inputs(range(1, 13))
    wanted, optimized = _wanted(model, inputs), kpx.optimize(model)
    with mode():
        for n in range(1, 5):
            optimized(inputs[n])
    done = threading.Event()

    def call(first):
        with mode():
            calls = 0
            while not done.is_set() or calls < 20:
                n = 1 + (first + calls) % 4
                torch.testing.assert_close(optimized(inputs[n]).detach(), wanted[n])
                calls += 1

    def compile_others():
        try:
            with mode():
                for n in range(5, 13):
                    torch.testing.assert_close(optimized(inputs[n]).detach(), wanted[n])
        finally:
            done.set()

    _together(compile_others, *(lambda i=i: call(i) for i in range(8)))


def test_different_models_compile_at_once():
    models = [_net(seed) for seed in range(4)]
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        wanted = [model(x) for model in models]

    def work(i):
        with torch.no_grad():
            torch.testing.assert_close(kpx.optimize(models[i])(x), wanted[i])

    _together(*(lambda i=i: work(i) for i in range(4)))


def test_eager_threads_are_left_alone_while_a_model_is_captured():
    """Capture must not turn what other threads make into fake tensors, nor change their modes."""
    model, other, x = _net(0), _net(1), torch.randn(3, WIDTH)
    wanted = other(x).detach()
    done = threading.Event()

    def capture():
        try:
            for seed in range(3):
                torch.manual_seed(seed)
                kpx.optimize(_net(seed))(x)
        finally:
            done.set()

    def eager():
        calls = 0
        while not done.is_set() or calls < 100:
            calls += 1
            got = other(x)
            assert type(got) is torch.Tensor
            assert got.requires_grad
            torch.testing.assert_close(got.detach(), wanted)
            assert type(torch.zeros(2)) is torch.Tensor

    _together(capture, eager, eager)
    assert model(x).shape == (3, 4)


def test_gradients_are_computed_in_several_threads():
    models = [_net() for _ in range(4)]
    x = torch.randn(3, WIDTH)
    eager = _net()
    eager(x).sum().backward()

    def work(i):
        optimized = kpx.optimize(models[i])
        for _ in range(3):
            models[i].zero_grad()
            optimized(x).sum().backward()
        for mine, theirs in zip(models[i].parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)

    _together(*(lambda i=i: work(i) for i in range(4)))


def test_weights_replaced_meanwhile_are_seen_whole():
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64, 64))

        def forward(self, x):
            return x @ self.weight

    model, x = Constant(), torch.ones(2, 64)
    optimized, done = kpx.optimize(model), threading.Event()
    with torch.no_grad():
        optimized(x)

    def read():
        with torch.no_grad():
            while not done.is_set():
                assert {*optimized(x).flatten().tolist()} in ({64.0}, {128.0}, {192.0})

    def replace():
        try:
            for i in range(100):
                model.weight = torch.nn.Parameter(torch.full((64, 64), float(1 + i % 3)))
        finally:
            done.set()

    _together(replace, read, read, read)
    with torch.no_grad():
        assert torch.equal(optimized(x), model(x))


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def test_state_that_the_model_writes_loses_no_update():
    model = Counter()
    optimized = kpx.optimize(model)
    with torch.no_grad():
        optimized(torch.ones(1))

    def work():
        with torch.no_grad():
            return [optimized(torch.zeros(1)).item() for _ in range(50)]

    seen = _together(work, work, work, work)
    assert model.calls == 201
    assert sorted(number for numbers in seen for number in numbers) == list(range(2, 202))


def test_grad_mode_of_each_thread_is_its_own():
    model, x = _net(), torch.randn(3, WIDTH)
    optimized = kpx.optimize(model)

    def with_gradients():
        return [optimized(x).requires_grad for _ in range(20)]

    def without():
        with torch.no_grad():
            return [optimized(x).requires_grad for _ in range(20)]

    first, second = _together(with_gradients, without)
    assert all(first)
    assert not any(second)


def test_training_and_evaluation_alternate_between_threads():
    """Two optimized models of one class, one of them trained, share no mode."""
    train, evaluate = (torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.BatchNorm1d(8)) for _ in range(2))
    evaluate.eval()
    x = torch.randn(6, WIDTH)
    wanted = evaluate(x).detach()

    def training():
        optimized = kpx.optimize(train)
        for _ in range(5):
            optimized(x).sum().backward()

    def evaluation():
        optimized = kpx.optimize(evaluate)
        for _ in range(5):
            torch.testing.assert_close(optimized(x).detach(), wanted)

    _together(training, evaluation)
    assert train[1].num_batches_tracked == 5
    assert evaluate[1].num_batches_tracked == 0


# Processes -------------------------------------------------------------------------------------

_FORK = """
import faulthandler, os, sys, warnings
import torch, kpx
warnings.simplefilter("ignore")
model = torch.nn.Linear(8, 8).eval()
optimized = kpx.optimize(model)
with torch.no_grad():
    optimized(torch.ones(2, 8))
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock ends as exit code 1
    code = 1
    try:
        with torch.no_grad():
            x = torch.ones(int(sys.argv[1]), 8)
            code = 0 if torch.allclose(optimized(x), model(x), atol=1e-5) else 2
    except kpx.KpxError as error:
        code = 3 if "fork" in str(error) else 4
    finally:
        os._exit(code)
_, status = os.waitpid(child, 0)
with torch.no_grad():  # the parent goes on
    assert torch.allclose(optimized(torch.ones(5, 8)), model(torch.ones(5, 8)), atol=1e-5)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("batch", [2, 3], ids=["compiled shape", "new shape"])
def test_forked_child_works_or_says_why_not(batch):
    command = [sys.executable, "-c", _FORK, str(batch)]
    result = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=1200)
    assert result.returncode in (0, 3), f"{result.returncode}: {result.stderr.decode()[-2000:]}"


_SPAWN = """
import multiprocessing, torch, kpx

def work(model):
    with torch.no_grad():
        return kpx.optimize(model)(torch.ones(2, 8))

if __name__ == "__main__":
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).eval()
    with torch.no_grad():
        wanted = kpx.optimize(model)(torch.ones(2, 8))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.allclose(pool.apply(work, (model,)), wanted, atol=1e-5)
"""


@pytest.mark.slow
def test_spawned_child_optimizes_the_same_model(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(_SPAWN)
    subprocess.run([sys.executable, str(script)], env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=1200)


_EXIT = """
import faulthandler, os, sys
import torch, kpx
optimized = kpx.optimize(torch.nn.Linear(8, 8))
optimized(torch.ones(2, 8))
child = os.fork()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock ends as exit code 1
    sys.exit(5)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_forked_child_exits():
    """The destructor of JAX's client would wait for threads that the child does not have."""
    command = [sys.executable, "-c", _EXIT]
    result = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=1200)
    assert result.returncode == 5, result.stderr.decode()[-2000:]
