"""Prepare and run."""

import jax
import numpy as np
import pytest

from kpx.ir import module as m
from kpx.ir.call import call_module, signature
from kpx.ir.split import split
from tests.reference import random_arguments

LINEAR = """
func.func @main(%w: tensor<8x4xf32> {kpx.weight}, %x: tensor<2x4xf32>, %b: tensor<8xf32> {kpx.weight}) -> tensor<2x8xf32> {
  %t = stablehlo.transpose %w, dims = [1, 0] : (tensor<8x4xf32>) -> tensor<4x8xf32>
  %e = stablehlo.exponential %b : tensor<8xf32>
  %bb = stablehlo.broadcast_in_dim %e, dims = [1] : (tensor<8xf32>) -> tensor<2x8xf32>
  %d = stablehlo.dot_general %x, %t, contracting_dims = [1] x [0] : (tensor<2x4xf32>, tensor<4x8xf32>) -> tensor<2x8xf32>
  %s = stablehlo.add %d, %bb : tensor<2x8xf32>
  return %s : tensor<2x8xf32>
}"""


def _run(source):
    module = m.parse(source)
    arguments = random_arguments(module, seed=1)
    whole = jax.jit(call_module(module))(*arguments)
    halves = split(module)
    prepared = []
    if halves.prepare is not None:
        prepared = jax.jit(call_module(halves.prepare))(*(arguments[i] for i in halves.prepare_weights))
    kept = [arguments[i] for i in [*halves.kept_weights, *halves.inputs]]
    parts = jax.jit(call_module(halves.run))(*prepared, *kept)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    return halves


def test_what_depends_on_weights_alone_is_computed_at_load():
    halves = _run(LINEAR)
    run = m.text(halves.run)
    assert "transpose" not in run
    assert "exponential" not in run
    assert (halves.prepare_weights, halves.kept_weights, halves.inputs) == ([0, 2], [], [1])


def test_a_broadcast_stays_in_the_run_half_because_it_is_free_there():
    halves = _run(LINEAR)
    assert "broadcast_in_dim" in m.text(halves.run)
    assert [s.shape for s in signature(halves.prepare)[1]] in ([(4, 8), (8,)], [(8,), (4, 8)])


def test_a_weight_used_as_it_is_is_neither_copied_nor_prepared():
    halves = _run("""
    func.func @main(%x: tensor<2x4xf32>, %w: tensor<4x8xf32> {kpx.weight}) -> tensor<2x8xf32> {
      %d = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<2x4xf32>, tensor<4x8xf32>) -> tensor<2x8xf32>
      return %d : tensor<2x8xf32>
    }""")
    assert halves.prepare is None
    assert halves.kept_weights == [1]


def test_a_loop_over_weights_alone_is_left_where_it_is():
    halves = _run("""
    func.func @main(%w: tensor<4xf32> {kpx.weight}, %x: tensor<4xf32>) -> tensor<4xf32> {
      %c0 = stablehlo.constant dense<0> : tensor<i32>
      %r:2 = stablehlo.while(%i = %c0, %v = %w) : tensor<i32>, tensor<4xf32>
      cond {
        %n = stablehlo.constant dense<3> : tensor<i32>
        %p = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
        stablehlo.return %p : tensor<i1>
      } do {
        %one = stablehlo.constant dense<1> : tensor<i32>
        %j = stablehlo.add %i, %one : tensor<i32>
        %u = stablehlo.add %v, %w : tensor<4xf32>
        stablehlo.return %j, %u : tensor<i32>, tensor<4xf32>
      }
      %s = stablehlo.add %r#1, %x : tensor<4xf32>
      return %s : tensor<4xf32>
    }""")
    assert halves.prepare is None


def test_a_result_that_depends_on_weights_alone_is_still_returned():
    halves = _run("""
    func.func @main(%w: tensor<4xf32> {kpx.weight}, %x: tensor<4xf32>) -> (tensor<4xf32>, tensor<4xf32>) {
      %e = stablehlo.exponential %w : tensor<4xf32>
      return %e, %x : tensor<4xf32>, tensor<4xf32>
    }""")
    assert halves.prepare is not None


@pytest.mark.parametrize("seed", range(5))
def test_random_mixtures_of_weights_and_inputs_agree(seed):
    rng = np.random.default_rng(seed)
    marks = ["{kpx.weight}" if rng.random() < 0.6 else "" for _ in range(4)]
    arguments = ", ".join(f"%a{i}: tensor<3x3xf32> {mark}" for i, mark in enumerate(marks))
    names, lines = [f"%a{i}" for i in range(4)], []
    for k in range(12):
        a, b = rng.choice(names, 2)
        kind = rng.choice(["add", "multiply", "maximum", "transpose"])
        if kind == "transpose":
            lines.append(f"%v{k} = stablehlo.transpose {a}, dims = [1, 0] : (tensor<3x3xf32>) -> tensor<3x3xf32>")
        else:
            lines.append(f"%v{k} = stablehlo.{kind} {a}, {b} : tensor<3x3xf32>")
        names.append(f"%v{k}")
    body = "\n".join(lines)
    _run(
        f"func.func @main({arguments}) -> (tensor<3x3xf32>, tensor<3x3xf32>) {{\n{body}\n"
        "return %v10, %v11 : tensor<3x3xf32>, tensor<3x3xf32>\n}"
    )


def test_a_loop_left_over_from_the_other_half_is_not_prepared():
    """A loop has effects as far as `split` knows; it must not keep an input in the half that runs at load."""
    import jax.numpy as jnp

    def function(weights, inputs):
        table = jnp.sin(jnp.arange(8.0)) @ jnp.ones((8, 3))
        looped = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, inputs[0]))[1]
        return [looped + table]

    from kpx.config import Config
    from kpx.hardware.target import Target
    from kpx.runtime.build import ModelProgram

    program = ModelProgram(function, [], [jax.ShapeDtypeStruct((3,), jnp.float32)], Target.resolve("cpu"), Config())
    program.load([])
    (got,) = program.run(jnp.ones(3))
    np.testing.assert_allclose(got, 8 + np.sin(np.arange(8.0)) @ np.ones((8, 3)), rtol=1e-5)
