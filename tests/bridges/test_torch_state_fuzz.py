"""Sequences of mutations and calls: after each, the optimized model is what eager PyTorch's twin is."""

import os

import pytest
import torch

import kpx
from tests.bridges.state import hooks, session
from tests.bridges.state.models import KINDS
from tests.bridges.state.registry import MUTATIONS

QUICK = 10
ALL = 300
# A sequence takes seconds. `KPX_STATE_SEQUENCES=300` runs them all; `bench.state_fuzz` runs any number.
SLOW = int(os.environ.get("KPX_STATE_SEQUENCES", "20"))


UNGUARDED = sorted(name for name, mutation in MUTATIONS.items() if not mutation.is_guarded)


def test_sequences_draw_from_forty_kinds_of_mutations_over_twelve_models():
    drawn = [session.sequence(seed) for seed in range(ALL)]
    assert len({step.name for script in drawn for step in script.steps}) == len(MUTATIONS) >= 40
    assert len({script.kind for script in drawn}) == len(KINDS) >= 12


def test_a_difference_is_found_and_shrunk_to_the_step_that_makes_it(monkeypatch):
    class Stale:
        """Goes on with the attribute that it saw first."""

        def __init__(self, model):
            self.model, self.first = model, model.scale

        def __call__(self, *args, **kwargs):
            scale, self.model.scale = self.model.scale, self.first
            try:
                return self.model(*args, **kwargs)
            finally:
                self.model.scale = scale

    monkeypatch.setitem(session.DOORS, "none", Stale)
    steps = (session.Step("new_batch", 1), session.Step("float_attribute", 2), session.Step("keyword_arguments", 2))
    drawn = session.Script(0, "container", "none", False, False, steps)
    failure = session.run(drawn)
    assert failure is not None
    assert failure.step == 1
    keep, smallest = session.shrink(drawn, failure)
    assert keep == [1]
    assert smallest.message.startswith("output: differs")


@pytest.mark.parametrize("door", ["optimize", "inplace"])
@pytest.mark.parametrize("name", UNGUARDED)
def test_changed_classes_are_seen(name, door):
    script = session.Script(0, "container", door, False, False, (session.Step(name, 1),))
    assert session.run(script) is None


@pytest.mark.xfail(strict=True, reason="Dynamo guards neither methods of classes nor attributes that shadow a base's")
@pytest.mark.parametrize("name", UNGUARDED)
def test_changed_classes_are_not_seen_by_dynamo(name):
    script = session.Script(0, "container", "compile", False, False, (session.Step(name, 1),))
    assert session.run(script) is None


def test_a_class_attribute_that_counts_does_not_capture_again():
    class Counts(torch.nn.Module):
        calls = 0

        def forward(self, x):
            return x + 1

    model = Counts()
    optimized = kpx.optimize(model)
    settings = type(optimized)._kpx_engine.settings
    for _ in range(4):
        optimized(torch.ones(2))
        Counts.calls += 1
    assert settings.captures == 1


def test_hook_of_all_modules_is_seen_when_added_and_when_removed():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    optimized = kpx.optimize(model)
    x = torch.ones(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
        handle = torch.nn.modules.module.register_module_forward_hook(hooks.ScaleLinear(3.0))
        try:
            torch.testing.assert_close(optimized(x), model(x))
        finally:
            handle.remove()
        torch.testing.assert_close(optimized(x), model(x))


@pytest.mark.parametrize("seed", range(QUICK))
def test_optimized_model_follows_its_eager_twin(seed):
    report = session.check(seed)
    assert report is None, report


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, SLOW, 10))
def test_optimized_models_follow_their_eager_twins_in_more_sequences(first):
    reports = [session.check(seed) for seed in range(first, min(first + 10, SLOW))]
    assert not any(reports), "\n\n".join(filter(None, reports))
