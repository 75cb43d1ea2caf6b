"""kpx.jit, kpx.compile and kpx.optimize over JAX functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import kpx
from kpx.ir import module as m


def f(x, w):
    return jnp.tanh((x.T.T @ w) * 1.0)


X, W = jnp.linspace(-1, 1, 12).reshape(3, 4), jnp.linspace(0, 1, 20).reshape(4, 5)


def test_a_jitted_function_gives_what_jax_gives():
    np.testing.assert_allclose(kpx.jit(f)(X, W), jax.jit(f)(X, W), rtol=1e-6)


def test_jit_leaves_jaxs_own_jit_of_the_function_alone():
    kpx.jit(f)(X, W)
    kpx.compile(f, X, W)
    assert "transpose" in jax.jit(f).lower(X, W).as_text()


def test_compiling_twice_reports_the_same_rewrites():
    assert kpx.compile(f, X, W).rewrites == kpx.compile(f, X, W).rewrites != {}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_dtypes_and_shapes_compile_anew(dtype):
    double = kpx.jit(lambda x: x * 2)
    for shape in ((3,), (2, 2), ()):
        y = double(jnp.ones(shape, dtype))
        assert (y.shape, y.dtype) == (shape, dtype)


def test_python_numbers_stay_weakly_typed():
    double = kpx.jit(lambda x, y: x * y)
    assert double(jnp.bfloat16(2), 3.0).dtype == jnp.bfloat16
    assert double(jnp.bfloat16(2), np.float32(3)).dtype == jnp.float32
    assert double(jnp.bfloat16(2), 3.0).dtype == jnp.bfloat16


def test_a_changed_jax_setting_is_seen():
    zeros = kpx.jit(lambda: jnp.zeros(3))
    assert zeros().dtype == jnp.float32
    with jax.enable_x64(True):
        assert zeros().dtype == jnp.float64
    assert zeros().dtype == jnp.float32


def test_static_arguments_by_position_and_by_name():
    by_position = kpx.jit(lambda x, n: x * n, static_argnums=1)
    by_name = kpx.jit(lambda x, *, n: x * n, static_argnames="n")
    for n in (2, 3, 2):
        assert by_position(X, n)[0, 0] == by_name(X, n=n)[0, 0] == X[0, 0] * n


def test_donated_arguments_are_given_up():
    x = jnp.ones(1000)
    kpx.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()


def test_shardings_are_kept():
    sharding = NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec("d"))
    y = kpx.jit(lambda x: x * 2, in_shardings=sharding, out_shardings=sharding)(jnp.ones(4))
    assert y.sharding == sharding


def test_pytrees_in_and_out():
    out = kpx.jit(lambda p: {"a": p["b"][0] + 1, "c": (p["b"][1],)})({"b": [X, W]})
    np.testing.assert_array_equal(out["a"], X + 1)
    np.testing.assert_array_equal(out["c"][0], W)


def test_a_decorator_with_and_without_options():
    @kpx.jit
    def plain(x):
        return x + 1

    @kpx.jit(static_argnames="n")
    def with_options(x, n):
        return x + n

    assert plain(X)[0, 0] == X[0, 0] + 1
    assert with_options(X, n=2)[0, 0] == X[0, 0] + 2
    assert plain.__name__ == "plain"


def test_a_method_can_be_jitted():
    class Scale:
        factor = 3.0

        @functools.partial(kpx.jit, static_argnums=0)
        def __call__(self, x):
            return x * self.factor

    np.testing.assert_array_equal(Scale()(X), X * 3)


# Transformations -------------------------------------------------------------------------------

g = kpx.jit(f)


@pytest.mark.parametrize(
    "transform",
    [
        lambda fn: jax.grad(lambda x, w: fn(x, w).sum(), (0, 1)),
        lambda fn: jax.jit(fn),
        lambda fn: lambda x, w: jax.vmap(fn, (None, 0))(x, jnp.stack([w, -w])),
        lambda fn: lambda x, w: jax.jvp(fn, (x, w), (x, w)),
        lambda fn: jax.checkpoint(fn),
        lambda fn: jax.jacfwd(fn),
        lambda fn: lambda x, w: jax.lax.scan(lambda c, _: (fn(c, jnp.eye(4)), fn(c, w)), x, None, length=3),
        lambda fn: lambda x, w: jax.lax.cond(x[0, 0] < 0, fn, lambda x, w: fn(-x, w), x, w),
        lambda fn: jax.jit(jax.grad(jax.checkpoint(lambda x, w: fn(x, w).sum()))),
    ],
    ids=["grad", "jit", "vmap", "jvp", "remat", "jacfwd", "scan", "cond", "jit of grad of remat"],
)
def test_a_transformation_of_a_jitted_function_is_that_of_the_function(transform):
    pairs = zip(*(jax.tree.leaves(transform(fn)(X, W)) for fn in (f, g)), strict=True)
    for wanted, got in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_shard_map_takes_a_jitted_function():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("d")
    mapped = jax.shard_map(lambda x, w: g(x, w), mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    np.testing.assert_allclose(mapped(X, W), f(X, W), rtol=1e-6)


def test_the_outermost_jit_optimizes_what_it_contains_backward_pass_included():
    def loss(x, w):
        return (g(x, w) ** 2).sum()

    module = m.parse(kpx.jit(jax.grad(loss)).lower(X, W).as_text())
    text = m.text(module)
    assert "call" not in text  # the inner function was inlined
    assert kpx.compile(jax.grad(loss), X, W).rewrites["transpose_of_transpose"] >= 1


def test_a_jitted_function_called_on_constants_inside_a_trace_is_recorded_not_run():
    @jax.jit
    def outer(x):
        return x + g(X, W).sum()

    assert "dot_general" in outer.lower(1.0).as_text()


# compile ---------------------------------------------------------------------------------------


def test_compiled_knows_itself():
    compiled = kpx.compile(f, X, jax.ShapeDtypeStruct(W.shape, W.dtype))
    np.testing.assert_allclose(compiled(X, W), f(X, W), rtol=1e-6)
    assert "dot_general" in compiled.stablehlo
    assert "HloModule" in compiled.hlo
    assert compiled.memory.argument_bytes == 4 * (X.size + W.size)
    assert compiled.memory.output_bytes == 4 * 15
    assert compiled.memory.peak_bytes >= compiled.memory.argument_bytes
    assert compiled.cost.flops >= 2 * 3 * 4 * 5
    assert compiled.cost.bytes >= 4 * (X.size + W.size + 15)
    assert 0 < compiled.cost.predicted_seconds < 1e-3
    assert compiled.rewrites["multiply_by_one"] == 1


def test_calling_compiled_with_another_shape_says_so():
    with pytest.raises(kpx.InputError, match="not those this was compiled for"):
        kpx.compile(f, X, W)(X[:2], W)


def test_lower_gives_jaxs_lowered_with_the_rewritten_module():
    lowered = kpx.jit(f).lower(X, W)
    assert "transpose" not in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(X, W), f(X, W), rtol=1e-6)


def test_level_none_rewrites_nothing_and_conservative_only_exactly():
    def h(x, w):
        return (x @ w.T) * 1.0

    assert kpx.compile(h, X, X, config=kpx.Config(level="none")).rewrites == {}
    conservative = kpx.compile(h, X, X, config=kpx.Config(level="conservative")).rewrites
    assert "multiply_by_one" in conservative
    assert "transpose_into_dot" not in conservative
    assert "transpose_into_dot" in kpx.compile(h, X, X).rewrites


def test_a_disabled_rewrite_does_not_fire():
    config = kpx.Config(disable=("multiply_by_one",))
    assert "multiply_by_one" not in kpx.compile(f, X, W, config=config).rewrites


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["text", object(), None.__class__, np.array(["a"]), np.array([object()])])
def test_an_argument_that_is_no_array_is_named(argument):
    with pytest.raises(kpx.InputError, match=r"Argument \[1\] is a .*takes arrays and numbers"):
        kpx.jit(lambda x, y: x)(X, argument)


@pytest.mark.parametrize("entry", [kpx.optimize, kpx.compile])
def test_something_that_is_no_model_is_refused(entry):
    with pytest.raises(kpx.InputError, match=r"`builtins\.int` is not a model\. Pass a torch\.nn\.Module"):
        entry(3)


def test_jit_of_something_not_callable_is_refused():
    with pytest.raises(kpx.InputError, match="takes a function"):
        kpx.jit(3)


def test_an_absent_target_says_what_is_here_and_how_to_install_it():
    with pytest.raises(kpx.TargetError, match=r"target='cuda'` is not on this machine.*finds: cpu.*jax\[cuda13\]"):
        kpx.jit(f, target="cuda")


def test_an_unknown_target_gives_the_nearest_name():
    with pytest.raises(kpx.TargetError, match="`target='gpu:h100'` is not known"):
        kpx.jit(f, target="gpu:h100")
    with pytest.raises(kpx.TargetError, match="Did you mean `cpu`"):
        kpx.compile(f, X, W, target="cpuu")


def test_example_inputs_are_compiled_at_once_and_not_again(monkeypatch):
    traced = []

    def counted(x, n):
        traced.append(x.shape)
        return x * n

    optimized = kpx.optimize(counted, example_inputs=(jax.ShapeDtypeStruct((3, 4), jnp.float32), 2))
    assert traced == [(3, 4)]
    np.testing.assert_array_equal(optimized(X, 2), X * 2)
    assert traced == [(3, 4)]
    optimized(X[:2], 2)
    assert traced == [(3, 4), (2, 4)]


def test_optimize_of_a_function_is_jit_of_it():
    np.testing.assert_allclose(kpx.optimize(f)(X, W), f(X, W), rtol=1e-6)
