"""A budget of error: the cheapest assignment that keeps it, verified on the optimized model, told, saved and reused."""

import functools
import json

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.errors import BudgetError, ConfigError
from kpx.precision import Assignment, Budget, assign
from kpx.precision.budget import BITS, METRICS, STRATEGIES
from tests.optional import torch
from tests.precision.test_precision import Layer, X

DATA = [X, 1.1 * X]


def _model():
    """Two layers, two products of which read channels that are far larger than the others."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(Layer(), Layer()).eval()
    model[0].norm.weight.data[3] = 40
    model[1].norm2.weight.data[7] = 60
    return model


@functools.cache
def _found(strategy="output"):
    return assign(_model(), Budget("relative error", 0.012, DATA, strategy=strategy))


def _reached(model, policy):
    optimized = kpx.optimize(model, config=kpx.Config(precision=policy))
    with torch.no_grad():
        return max(float((optimized(x) - model(x)).norm() / model(x).norm()) for x in DATA)


def _cost(found):
    return sum(row.flops * BITS[row.precision] for row in found.rows)


_SLOW = ("local", "entropy", "gradient")


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=[pytest.mark.slow] * (s in _SLOW)) for s in STRATEGIES])
def test_every_strategy_keeps_the_limit_with_most_products_cheap(strategy):
    model = _model()
    found = _found(strategy)
    assert found.verified <= 0.012
    assert _reached(model, found.policy) <= 0.012
    assert found.shares["int8"] > 0.6
    assert _reached(model, "int8") > 0.012  # else there was nothing to find


@pytest.mark.slow
def test_measured_sensitivity_finds_as_cheap_an_assignment_as_trying_all():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
    ).eval()
    model[0].weight.data[3] = 40
    budget = Budget("relative error", 0.01, DATA, precisions=("int8", "bf16"))
    found = assign(model, budget)
    costs = []
    for first in budget.precisions:
        for second in budget.precisions:
            policy = kpx.precision.Policy(
                "bf16", (kpx.precision.Rule(first, path="1"), kpx.precision.Rule(second, path="3"))
            )
            if _reached(model, policy) <= 0.01:
                sizes = {"1": found.rows[0].flops, "3": found.rows[1].flops}
                costs.append(sizes["1"] * BITS[first] + sizes["3"] * BITS[second])
    assert _cost(found) == min(costs)


def test_a_loose_limit_leaves_all_cheap_and_a_strict_one_all_exact():
    model = _model()
    loose = assign(model, Budget("relative error", 0.5, DATA))
    assert set(loose.shares) == {"int8", "bf16"}
    assert all(row.precision == "int8" for row in loose.rows if row.nth is not None)
    strict = assign(model, Budget("relative error", 1e-5, DATA))
    assert strict.shares == {"f32": 1.0}


def test_a_limit_that_cannot_be_kept_says_what_was_reached():
    with pytest.raises(BudgetError, match=r"relative error ≤ 1e-09 was asked for, and 0\.00\d+ is reached with bf16"):
        assign(_model(), Budget("relative error", 1e-9, DATA, precisions=("int8", "bf16")))
    with pytest.raises(BudgetError, match=r"cosine ≥|cosine ≤"):
        assign(_model(), Budget("cosine", 0.99999999999, DATA, precisions=("int8", "bf16")))


def test_a_metric_of_ones_own_may_be_better_when_it_is_more():
    def agreement(outputs, reference):
        return float(
            np.mean([np.corrcoef(o[0].ravel(), r[0].ravel())[0, 1] for o, r in zip(outputs, reference, strict=True)])
        )

    found = assign(_model(), Budget(agreement, 0.9995, DATA))
    assert found.verified >= 0.9995
    assert found.metric == "agreement"


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_of_the_same_outputs_is_perfect(metric):
    outputs = [[np.random.default_rng(0).standard_normal((4, 8))]]
    assert METRICS[metric](outputs, outputs) == pytest.approx({"relative error": 0, "cosine": 1, "top-1": 1}[metric])


@pytest.mark.slow
def test_a_calibration_lets_more_products_be_cheap():
    model = _model()
    plain = _found()
    calibration = kpx.precision.calibrate(model, DATA)
    balanced = assign(model, Budget("relative error", 0.012, DATA, calibration=calibration))
    assert _cost(balanced) < _cost(plain)
    assert _reached(model, balanced.policy) <= 0.012


def test_a_config_takes_a_budget_and_reuses_what_was_saved(tmp_path, monkeypatch):
    model, file = _model(), tmp_path / "assignment.json"
    budget = Budget("relative error", 0.012, DATA, file=file)
    optimized = kpx.optimize(model, config=kpx.Config(precision=budget))
    with torch.no_grad():
        first = optimized(X)
    assert optimized.compile_for([X], {}).precisions["int8"] >= 5
    monkeypatch.setattr("kpx.precision.budget._Search", lambda *a: pytest.fail("searched again"))
    again = kpx.optimize(model, config=kpx.Config(precision=budget))
    with torch.no_grad():
        torch.testing.assert_close(again(X), first, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"limit": 0.02}, {"strategy": "local"}, {"precisions": ("int8", "f32")}])
def test_a_file_for_another_budget_is_made_anew(tmp_path, change):
    model, file = _model(), tmp_path / "assignment.json"
    given = {"metric": "relative error", "limit": 0.012, "data": DATA, "file": file}
    _found().save(file)
    found = assign(model, Budget(**{**given, **change}))
    saved = Assignment.load(file)
    assert saved.limit == found.limit == change.get("limit", 0.012)
    assert saved.strategy == change.get("strategy", "output")


def test_a_damaged_file_is_told(tmp_path):
    file = tmp_path / "assignment.json"
    for text in ("", "{}", json.dumps({"format": "kpx assignment 0"})):
        file.write_text(text)
        with pytest.raises(ConfigError, match="is not an assignment that can be read"):
            assign(_model(), Budget("relative error", 0.012, DATA, file=file))


def test_it_prints_what_was_kept_high_and_why_and_is_drawn(tmp_path):
    found = _found()
    text = found.to_markdown()
    assert "0/qkv" in text
    assert "raised as number 1 of" in text
    assert "no product by a weight" in text
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_flax_model_and_a_function_that_hold_their_weights_have_budgets_too():
    module = linen.Sequential([linen.Dense(64), linen.Dense(32)])
    x = jax.random.normal(jax.random.key(0), (16, 48))
    bound = module.bind(module.init(jax.random.key(1), x))
    assert assign(bound, Budget("relative error", 0.02, [x])).shares == {"int8": 1.0}
    w = jax.random.normal(jax.random.key(2), (48, 32)) / 7
    optimized = kpx.optimize(
        lambda x: jnp.tanh(x @ w), config=kpx.Config(precision=Budget("relative error", 0.02, [x]))
    )
    assert jnp.linalg.norm(optimized(x) - jnp.tanh(x @ w)) < 0.02 * jnp.linalg.norm(jnp.tanh(x @ w))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"metric": "perplexity"}, "is not known"),
        ({"metric": 3}, "neither a name nor a function"),
        ({"strategy": "luck"}, "is not known"),
        ({"precisions": ("int8", "int3")}, "has 'int3'"),
        ({"precisions": ("int8",)}, "needs one of"),
        ({"limit": "small"}, "is not a number"),
    ],
)
def test_what_is_no_budget_is_refused(given, says):
    with pytest.raises(ConfigError, match=says):
        Budget(**{"metric": "relative error", "limit": 0.1, "data": DATA, **given})


def test_jit_and_training_take_no_budget():
    budget = Budget("relative error", 0.1, DATA)
    with pytest.raises(ConfigError, match=r"kpx\.jit` takes no budget"):
        kpx.jit(lambda x: x, config=kpx.Config(precision=budget))
    with pytest.raises(ConfigError, match="for inference"):
        kpx.optimize(_model(), training=True, config=kpx.Config.training(precision=budget))


def test_products_in_loops_stay_exact():
    w = jax.random.normal(jax.random.key(0), (2, 32, 32)) / 6
    x = jax.random.normal(jax.random.key(1), (16, 32))

    def model(x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return x @ w[0]

    found = assign(model, Budget("relative error", 0.02, [x]))
    assert [row.precision for row in found.rows] == ["int8"]
    assert found.policy.default == "f32"
    assert 1e-4 < found.verified < 0.02


@pytest.mark.slow
@pytest.mark.models
def test_sentences_keep_their_order_with_most_of_the_products_in_int8():
    from bench import precision as bench

    (found,) = bench.budget([0.999]).values()
    assert found["reached"] >= 0.999
    assert found["shares"]["int8"] >= 0.8
