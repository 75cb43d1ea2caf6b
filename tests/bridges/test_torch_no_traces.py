"""Capture leaves no trace in the user's model, caches and modes."""

import functools
import gc

import pytest
import torch

import kpx

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
MEMO: dict = {}


@functools.lru_cache
def _cached(n):
    return torch.arange(n).float() / n


class ByLruCache(torch.nn.Module):
    def forward(self, x):
        return x + _cached(x.shape[-1])


class ByGlobalDict(torch.nn.Module):
    def forward(self, x):
        if x.shape[-1] not in MEMO:
            MEMO[x.shape[-1]] = torch.arange(x.shape[-1]).float()
        return x + MEMO[x.shape[-1]]


class ByOwnDict(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        if "c" not in self.cache:
            self.cache["c"] = x.new_ones(4) * 2
        return x + self.cache["c"]


class ByAttribute(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cos = None

    def forward(self, x):
        if self.cos is None:
            self.cos = torch.arange(4.0).cos()
        return x + self.cos


class KeepsActivation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        self.last = self.linear(x)
        return self.last * 2


class KeepsLog(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(x.mean())
        return x + len(self.log)


MODELS = [ByLruCache, ByGlobalDict, ByOwnDict, ByAttribute, KeepsActivation, KeepsLog]


@pytest.fixture(autouse=True)
def _clear():
    MEMO.clear()
    _cached.cache_clear()
    torch._dynamo.reset()


def _tensors_kept_by(model):
    containers = [MEMO, vars(model), getattr(model, "cache", {}), dict(enumerate(getattr(model, "log", [])))]
    return [t for c in containers for t in c.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("make", MODELS)
def test_what_a_model_keeps_is_a_real_tensor(make, grad):
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    twin = make()
    optimized = kpx.optimize(model)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            torch.testing.assert_close(optimized(X), twin(X))
            assert [type(t) for t in _tensors_kept_by(model)] == [type(t) for t in _tensors_kept_by(twin)]
        torch.testing.assert_close(model(X), twin(X))  # eager PyTorch afterwards
        assert type(_cached(4)) is torch.Tensor


def test_python_counter_advances_at_each_call():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    model = Counts()
    optimized = kpx.optimize(model)
    with torch.no_grad():
        assert [optimized(torch.zeros(1)).item() for _ in range(12)] == list(range(1, 13))
    assert model.calls == 12


def test_capture_leaves_global_modes_as_they_were():
    model = torch.nn.Linear(4, 4)
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state()
    with torch.no_grad():
        kpx.optimize(model)(X)
    assert torch.is_grad_enabled() == before[0]
    assert torch.get_default_dtype() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])  # a model that draws nothing advances no generator


def test_capture_adds_nothing_to_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        kpx.optimize(model)(X)
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before


def test_an_error_in_forward_leaves_the_state_as_eager_does():
    class Fails(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.fail = False

        def forward(self, x):
            self.calls += 1
            if self.fail:
                raise KeyError("told to fail")
            return x + self.calls

    model = Fails()
    optimized = kpx.optimize(model)
    with torch.no_grad():
        optimized(X)
        model.fail = True
        with pytest.raises(KeyError, match="told to fail"):
            optimized(X)
        model.fail = False
        assert torch.equal(optimized(X), X + model.calls)


def test_models_that_are_dropped_are_freed():
    import weakref

    model = torch.nn.Linear(64, 64)
    optimized = kpx.optimize(model)
    with torch.no_grad():
        optimized(torch.ones(2, 64))
    weak, weight = weakref.ref(model), weakref.ref(model.weight)
    del model, optimized
    gc.collect()
    assert weak() is None
    assert weight() is None
