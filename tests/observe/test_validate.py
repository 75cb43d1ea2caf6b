"""kpx.validate and kpx.bisect: what is right passes, and a planted fault is found, named and placed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.cli import main
from kpx.ir import module as m
from kpx.ir.module import stablehlo
from tests.optional import torch
from tests.planting import plant


class _Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.second(torch.sin(torch.nn.functional.gelu(self.first(x))))


def _function(w, x):
    return jnp.sin(jax.nn.softmax(x @ w)) * 3, jnp.argmax(x @ w, -1)


W, X = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate([(32, 64), (16, 32)]))


def _wrong(op):
    return stablehlo.cosine(op.operand)


def _loses_nan(op):
    """A sine that is zero where it is not finite."""
    y = stablehlo.sine(op.operand)
    kind = stablehlo.ComparisonDirectionAttr.get("EQ")
    same = stablehlo.compare(op.operand, op.operand, kind)
    if isinstance(m.users(op.result)[0], stablehlo.SelectOp):
        return None
    return stablehlo.select(same, y, m.like(y, 0.0))


def test_a_pytorch_model_is_right():
    torch.manual_seed(0)
    model = _Model().eval()
    found = kpx.validate(model, kpx.optimize(model), torch.randn(16, 32))
    assert found
    assert found.bisection is None
    gradients = {f.what for f in found.findings if f.what.startswith("gradient")}
    assert "gradient by first.weight" in gradients
    assert "gradient by input 0" in gradients


def test_without_a_candidate_values_and_gradients_of_kpx_are_compared():
    found = kpx.validate(_Model().eval(), None, torch.randn(16, 32))
    assert found
    assert len([f for f in found.findings if f.what.startswith("gradient")]) == 5


def test_a_bf16_model_is_measured_by_its_own_distance():
    found = kpx.validate(_Model().eval().bfloat16(), None, torch.randn(16, 32, dtype=torch.bfloat16))
    assert found
    assert found.findings[0].dtype == "bfloat16"
    assert found.findings[0].reference_distance > 1e-4


def test_a_function_of_jax_is_right_with_its_gradients():
    found = kpx.validate(_function, kpx.jit(_function), W, X)
    assert found
    names = {f.what for f in found.findings}
    assert {"output 0", "output 1", "gradient by input 0", "gradient by input 1", "output 0, nan in input 1"} <= names


def test_structs_become_random_numbers():
    assert kpx.validate(lambda x: jnp.tanh(x).sum(0), None, jax.ShapeDtypeStruct((8, 4), jnp.float32))


def test_a_planted_fault_is_bisected_to_its_rewrite_and_op(monkeypatch):
    plant(monkeypatch, _wrong)
    found = kpx.validate(_function, kpx.jit(_function), W, X)
    assert not found
    assert [b.name for b in found.bisection.rewrites] == ["planted"]
    assert "stablehlo.sine" in found.bisection.rewrites[0].op
    assert found.bisection.count >= 1


def test_a_planted_fault_in_a_pytorch_model_is_bisected_to_its_rewrite_and_module(monkeypatch):
    plant(monkeypatch, _wrong)
    found = kpx.bisect(_Model().eval(), torch.randn(16, 32))
    assert [b.name for b in found.rewrites] == ["planted"]
    assert "output 0" in found.why


def test_a_fault_in_gradients_alone_is_bisected_in_the_backward_pass(monkeypatch):
    def wrong_cosine(op):
        return stablehlo.sine(op.operand)

    plant(monkeypatch, wrong_cosine, ops=(stablehlo.CosineOp,))  # which the derivative of the sine has
    model, x = _Model().eval(), torch.randn(16, 32)
    found = kpx.validate(model, None, x)
    wrong = {f.what for f in found.findings if f.why}
    assert "gradient by first.weight" in wrong
    assert "output 0" not in wrong
    assert "planted" in [b.name for b in found.bisection.rewrites]


def test_nan_that_is_lost_is_told_with_what_was_planted(monkeypatch):
    plant(monkeypatch, _loses_nan)
    found = kpx.validate(lambda x: jnp.sin(x) + 1, None, X, gradients=False, bisects=False)
    wrong = [f for f in found.findings if f.why]
    assert [f.what for f in wrong] == ["output 0, nan in input 0"]


def test_another_dtype_shape_or_integer_is_wrong():
    assert (
        "bfloat16"
        in kpx.validate(jnp.sin, lambda x: jnp.sin(x).astype(jnp.bfloat16), X, gradients=False).findings[0].why
    )
    assert "[32, 16]" in kpx.validate(jnp.sin, lambda x: jnp.sin(x).T, X, gradients=False).findings[0].why
    plus_one = kpx.validate(lambda x: jnp.argmax(x, -1), lambda x: jnp.argmax(x, -1) + 1, X, gradients=False)
    assert "16 of 16" in plus_one.findings[0].why


def test_nothing_is_bisected_where_kpx_made_no_candidate():
    found = kpx.validate(jnp.sin, jnp.cos, X)
    assert not found
    assert found.bisection is None


def test_what_is_right_is_bisected_to_nothing():
    assert kpx.bisect(_function, W, X) is None


def test_fuel_that_is_set_already_is_refused(monkeypatch):
    monkeypatch.setenv("KPX_FUEL", "3")
    with pytest.raises(kpx.ConfigError, match="KPX_FUEL is set"):
        kpx.validate(jnp.sin, None, X)


@pytest.mark.parametrize(("given", "says"), [((5,), "cannot be validated"), ((jnp.sin, None, "text"), "no array")])
def test_what_is_no_model_or_array_is_refused(given, says):
    with pytest.raises(kpx.InputError, match=says):
        kpx.validate(*given)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "validated.py").write_text("import jax.numpy as jnp\n\ndef fn(x):\n    return jnp.sin(x) @ x.T\n")
    monkeypatch.chdir(tmp_path)


def test_the_commands_tell_and_exit_with_what_they_found(module, capsys, monkeypatch):
    assert main(["validate", "validated:fn", "--input", "f32[8,16]"]) == 0
    assert "Everything is right." in capsys.readouterr().out
    assert main(["bisect", "validated:fn", "--input", "f32[8,16]"]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    plant(monkeypatch, _wrong)
    assert main(["bisect", "validated:fn", "--input", "f32[8,16]"]) == 1
    told = capsys.readouterr().out
    assert "`planted`" in told
    assert "stablehlo.sine" in told
    assert main(["validate", "validated:fn", "--input", "f32[8,16]", "--json", "--no-gradients"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["bisection"]["rewrites"][0]["name"] == "planted"
