"""Modules: parsing, constants, copying, inlining, and a module as a JAX function."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kpx
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.ir.module import ir


def _empty():
    return m.parse("func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { return %a : tensor<2xf32> }")


def test_text_that_is_not_a_module_is_refused_with_mlirs_words():
    with pytest.raises(kpx.KpxError, match="not a valid StableHLO module"):
        m.parse("func.func @main( {")


def test_a_module_without_main_says_which_functions_it_has():
    module = m.parse("func.func @other() { return }")
    with pytest.raises(kpx.KpxError, match=r"no function `main` \(its functions: other\)"):
        m.main(module)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.array([-1, 0, 1], np.int8),
        np.array([0, 255], np.uint8),
        np.array([True, False, True]),
        np.array([1.5, -0.0, np.inf], np.float32),
        np.array(2.0),
        np.full((3, 2), 0.1, ml_dtypes.bfloat16),
        np.zeros((0, 3), np.float32),
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_a_constant_holds_its_array(array):
    module = _empty()
    block = m.entry_block(m.main(module))
    with module.context, ir.Location.unknown(), ir.InsertionPoint.at_block_begin(block):
        value = m.constant(array)
        known = m.constant_value(value)
    assert known.dtype == array.dtype
    np.testing.assert_array_equal(known.astype(np.float64), array.astype(np.float64))
    np.testing.assert_array_equal(np.signbit(known.astype(np.float64)), np.signbit(array.astype(np.float64)))


def test_a_copy_is_independent():
    module = _empty()
    copied = m.copy(module)
    with module.context, ir.Location.unknown(), ir.InsertionPoint.at_block_begin(m.entry_block(m.main(copied))):
        m.constant(np.ones(2))
    assert "constant" in m.text(copied)
    assert "constant" not in m.text(module)


def test_calls_are_inlined_through_every_level_and_into_loops():
    @jax.jit
    def inner(x):
        return jnp.tanh(x) * 2

    @jax.jit
    def outer(x):
        return jax.lax.fori_loop(0, 3, lambda i, c: inner(c) + i, x)

    module = jax.jit(lambda x: outer(x) + inner(x)).lower(jnp.ones(3)).compiler_ir("stablehlo")
    expected = jax.jit(call_module(module))(jnp.ones(3))
    assert len(m.functions(module)) > 1
    m.inline_calls(module)
    m.verify(module)
    assert list(m.functions(module)) == ["main"]
    np.testing.assert_array_equal(jax.jit(call_module(module))(jnp.ones(3))[0], expected[0])


def test_a_called_module_refuses_other_arguments():
    fn = call_module(_empty())
    with pytest.raises(kpx.InputError, match=r"takes \(float32\[2\]\), and was given \(float32\[3\]\)"):
        jax.jit(fn)(jnp.ones(3))


def test_negative_zero_and_zero_are_not_the_same_value():
    module = m.parse("""
    func.func @main() -> tensor<2xf32> {
      %0 = stablehlo.constant dense<0.0> : tensor<2xf32>
      %1 = stablehlo.constant dense<-0.0> : tensor<2xf32>
      %2 = stablehlo.constant dense<0.0> : tensor<2xf32>
      return %0 : tensor<2xf32>
    }""")
    a, b, c, _ = m.entry_block(m.main(module)).operations
    assert m.same_value(a.result, c.result)
    assert not m.same_value(a.result, b.result)


def test_a_complex_constant_has_no_number_and_no_array():
    module = m.parse(
        """func.func public @main(%a: tensor<2xcomplex<f32>>) -> tensor<2xcomplex<f32>> {
          %c = stablehlo.constant dense<(1.0, 0.0)> : tensor<2xcomplex<f32>>
          %0 = stablehlo.add %a, %c : tensor<2xcomplex<f32>>
          return %0 : tensor<2xcomplex<f32>>
        }"""
    )
    (add,) = [op for op in m.walk(module.operation) if op.operation.name == "stablehlo.add"]
    assert m.splat(add.operands[1]) is None
    assert m.constant_value(add.operands[1]) is None
