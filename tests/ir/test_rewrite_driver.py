"""The driver: fuel, counts, and rewrites that misbehave."""

import jax
import numpy as np
import pytest

import kpx
from kpx.ir import module as m
from kpx.ir import rewrite as r
from kpx.ir.call import call_module
from kpx.ir.module import ir, stablehlo
from kpx.passes import canonicalize

SOURCE = """
func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
  %0 = stablehlo.negate %a : tensor<4xf32>
  %1 = stablehlo.negate %0 : tensor<4xf32>
  %2 = stablehlo.constant dense<1.0> : tensor<4xf32>
  %3 = stablehlo.multiply %1, %2 : tensor<4xf32>
  %4 = stablehlo.exponential %3 : tensor<4xf32>
  return %4 : tensor<4xf32>
}
"""


def _rule(name, apply, *ops):
    return r.Rewrite(name, ops, apply, True, "", "")


def _result(module):
    return np.asarray(jax.jit(call_module(module))(np.arange(4, dtype=np.float32))[0])


def test_rules_apply_until_none_fires_and_are_counted():
    module, report = m.parse(SOURCE), r.Report()
    assert r.apply_rewrites(module, canonicalize.RULES, r.Fuel(None), report) == 2
    assert report.counts == {"negate_of_negate": 1, "multiply_by_one": 1}
    assert m.count_ops(module) == 3  # the function, exponential, return


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_fuel_stops_after_n_rewrites(limit):
    module = m.parse(SOURCE)
    assert r.apply_rewrites(module, canonicalize.RULES, r.Fuel(limit), r.Report()) == min(limit, 2)


@pytest.mark.parametrize("given", ["abc", "-1", "1.5"])
def test_fuel_that_is_not_a_count_is_refused(given, monkeypatch):
    monkeypatch.setenv("KPX_FUEL", given)
    with pytest.raises(kpx.ConfigError, match=f"KPX_FUEL='{given}' is not a count.*unset it"):
        kpx.compile(lambda x: x + 1, np.ones(3, np.float32))


def test_fuel_from_the_environment_limits_a_compilation(monkeypatch):
    def f(x):
        return x.T.T.reshape(9).reshape(3, 3)[:3] + x

    assert sum(kpx.compile(f, np.ones((3, 3), np.float32)).rewrites.values()) > 1
    monkeypatch.setenv("KPX_FUEL", "1")
    assert sum(kpx.compile(f, np.ones((3, 3), np.float32)).rewrites.values()) == 1


def test_a_rewrite_that_raises_is_named_and_the_module_stays_right():
    def apply(op):
        raise ZeroDivisionError("planted")

    module, report = m.parse(SOURCE), r.Report()
    with pytest.warns(kpx.RewriteWarning, match="`planted` was reverted.*ZeroDivisionError: planted"):
        r.apply_rewrites(module, [_rule("planted", apply, stablehlo.ExpOp)], r.Fuel(None), report)
    assert list(report.reverted) == ["planted"]
    np.testing.assert_allclose(_result(module), np.exp(np.arange(4)), rtol=1e-6)


def test_a_rewrite_that_changes_a_type_is_named_and_the_module_stays_right():
    def apply(op):
        return m.reshape(op.operand, (2, 2))

    module, report = m.parse(SOURCE), r.Report()
    with pytest.warns(kpx.RewriteWarning, match="`planted`.*tensor<2x2xf32> in place of tensor<4xf32>"):
        r.apply_rewrites(module, [_rule("planted", apply, stablehlo.ExpOp)], r.Fuel(None), report)
    np.testing.assert_allclose(_result(module), np.exp(np.arange(4)), rtol=1e-6)


def test_a_rewrite_that_breaks_verification_is_named_and_the_others_stay():
    def apply(op):
        # An addition of one operand: built unchecked, refused by the verifier.
        broken = ir.Operation.create("stablehlo.add", results=[op.result.type], operands=[op.operand])
        return broken.results[0]

    rules = [*canonicalize.RULES, _rule("planted", apply, stablehlo.ExpOp)]
    module, report = m.parse(SOURCE), r.Report()
    with pytest.warns(kpx.RewriteWarning, match="`planted` was reverted"):
        r.apply_rewrites(module, rules, r.Fuel(None), report)
    assert list(report.reverted) == ["planted"]
    assert report.counts == {"negate_of_negate": 1, "multiply_by_one": 1}
    np.testing.assert_allclose(_result(module), np.exp(np.arange(4)), rtol=1e-6)


def test_a_broken_rewrite_in_the_pipeline_leaves_a_model_that_runs(monkeypatch):
    def apply(op):
        broken = ir.Operation.create("stablehlo.add", results=[op.result.type], operands=[op.operand])
        return broken.results[0]

    monkeypatch.setattr(canonicalize, "RULES", [*canonicalize.RULES, _rule("planted", apply, stablehlo.TanhOp)])
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    with pytest.warns(kpx.RewriteWarning, match="`planted`"):
        compiled = kpx.compile(jax.numpy.tanh, x)
    np.testing.assert_allclose(compiled(x), np.tanh(x), rtol=1e-6)
    assert "planted" in compiled.reverted


def test_verify_each_finds_the_same_culprit():
    def apply(op):
        return ir.Operation.create("stablehlo.add", results=[op.result.type], operands=[op.operand]).results[0]

    module, report = m.parse(SOURCE), r.Report()
    rules = [_rule("planted", apply, stablehlo.ExpOp), *canonicalize.RULES]
    with pytest.warns(kpx.RewriteWarning, match="`planted`"):
        r.apply_rewrites(module, rules, r.Fuel(None), report, verify_each=True)
    np.testing.assert_allclose(_result(module), np.exp(np.arange(4)), rtol=1e-6)


def test_an_inexact_rewrite_must_state_its_bound():
    with pytest.raises(kpx.KpxError, match="state its error `bound`"):
        r.rewrite(stablehlo.ExpOp, exact=False)(lambda op: None)


def test_a_second_rewrite_of_a_name_is_refused():
    def negate_of_negate(op):
        return None

    with pytest.raises(kpx.KpxError, match="`negate_of_negate` exists"):
        r.rewrite(stablehlo.NegOp, exact=True)(negate_of_negate)


def test_an_op_with_an_effect_is_never_erased():
    module = m.parse("""
    func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
      stablehlo.custom_call @note(%a) {has_side_effect = true} : (tensor<4xf32>) -> ()
      %0 = stablehlo.custom_call @counts(%a) {has_side_effect = true} : (tensor<4xf32>) -> tensor<4xf32>
      %1 = stablehlo.custom_call @pure(%a) : (tensor<4xf32>) -> tensor<4xf32>
      %2 = stablehlo.negate %a : tensor<4xf32>
      return %a : tensor<4xf32>
    }""")
    r.erase_dead(module)
    text = m.text(module)
    assert "@note" in text
    assert "@counts" in text
    assert "@pure" not in text
    assert "negate" not in text


def test_a_run_around_some_rules_begins_at_their_ops_and_follows_what_changes():
    module = m.parse("""
    func.func @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>) {
      %0 = stablehlo.exponential %a : tensor<4xf32>
      %1 = stablehlo.negate %0 : tensor<4xf32>
      %2 = stablehlo.negate %b : tensor<4xf32>
      return %1, %2 : tensor<4xf32>, tensor<4xf32>
    }""")
    to_tanh = _rule("exp_to_tanh", lambda op: stablehlo.tanh(op.operand), stablehlo.ExpOp)
    drop = _rule("drop_negate", lambda op: op.operand, stablehlo.NegOp)
    report = r.Report()
    r.apply_rewrites(module, [to_tanh, drop], r.Fuel(None), report, around=[to_tanh])
    assert report.counts == {"exp_to_tanh": 1, "drop_negate": 1}
    assert m.text(module).count("negate") == 1


def test_a_run_over_callees_leaves_main_alone():
    module = m.parse("""
    func.func @main(%a: tensor<4xf32>) -> tensor<4xf32> {
      %0 = stablehlo.negate %a : tensor<4xf32>
      %1 = func.call @inner(%0) : (tensor<4xf32>) -> tensor<4xf32>
      return %1 : tensor<4xf32>
    }
    func.func private @inner(%a: tensor<4xf32>) -> tensor<4xf32> {
      %0 = stablehlo.negate %a : tensor<4xf32>
      return %0 : tensor<4xf32>
    }""")
    drop = _rule("drop_negate", lambda op: op.operand, stablehlo.NegOp)
    assert r.apply_rewrites(module, [drop], r.Fuel(None), r.Report(), callees=True) == 1
    assert m.text(module).count("negate") == 1
