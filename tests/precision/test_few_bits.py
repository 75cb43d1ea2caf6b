"""FP8 and block formats as a rewrite: what products become, in the backward pass too, and on targets that have units for them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.passes import lowered_precision
from kpx.precision import Policy, Rule, formats
from tests.optional import torch
from tests.reference import distance

SCHEMES = ("fp8", "mxfp8", "mxfp4", "nvfp4")
_FAR = {"fp8": 0.05, "mxfp8": 0.06, "mxfp4": 0.3, "nvfp4": 0.2}


def _run(model, x, precision, **config):
    optimized = kpx.optimize(model, config=kpx.Config(precision=precision, **config))
    with torch.no_grad():
        return optimized(x), optimized.compile_for([x], {})


def _held(x, scheme):
    """An array's rows as a scheme holds them, in f64."""
    return np.asarray(formats.quantize_dequantize(x, "e4m3" if scheme == "fp8" else scheme), np.float64)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_by_a_weight_is_that_of_the_numbers_that_are_held(scheme, rows):
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(96, 40, bias=False).eval(), torch.randn(rows, 96)
    given, compiled = _run(layer, x, scheme)
    wanted = _held(x.numpy(), scheme) @ _held(layer.weight.detach().numpy(), scheme).T
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert compiled.precisions == {scheme: 1}
    assert scheme in compiled.emulated  # the CPU has no units for it


@pytest.mark.parametrize("scheme", ["mxfp8", "nvfp4"])
def test_an_inner_size_that_blocks_do_not_divide_is_filled_up(scheme):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(50, 24, bias=False).eval(), torch.randn(8, 50)
    given, _ = _run(layer, x, scheme)
    padded = [np.pad(a, ((0, 0), (0, -50 % 32))) for a in (x.numpy(), layer.weight.detach().numpy())]
    wanted = _held(padded[0], scheme) @ _held(padded[1], scheme).T
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def _loss(weights, x):
    for up, down in weights:
        x = x + jnp.tanh(x @ up) @ down
    return (x**2).mean()


def _weights():
    keys = jax.random.split(jax.random.key(0), 6)
    up, down = (64, 128), (128, 64)
    return [
        (jax.random.normal(a, up) / 8, jax.random.normal(b, down) / 11)
        for a, b in zip(keys[::2], keys[1::2], strict=True)
    ]


X = jax.random.normal(jax.random.key(9), (4, 32, 64))


def _flat(tree):
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


def _gradient(precision):
    fn = kpx.jit(jax.grad(_loss), config=kpx.Config(precision=precision))
    return _flat(jax.block_until_ready(fn(_weights(), X))), kpx.compile(fn, _weights(), X)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_differentiated_modules_products_are_told_apart(scheme):
    given, compiled = _gradient(scheme)
    wanted = _flat(jax.grad(_loss)(_weights(), X))
    assert compiled.precisions == {scheme: 6, f"{scheme} dgrad": 5, f"{scheme} wgrad": 6}
    assert 1e-3 < distance(given, wanted) < 2.5 * _FAR[scheme]


def test_products_of_products_are_told_apart():
    def loss(weights, x):
        for w in weights:
            x = x @ w
        return (x**2).mean()

    weights = [jnp.eye(64) + 0.1 * jax.random.normal(jax.random.key(i), (64, 64)) for i in range(4)]
    compiled = kpx.compile(jax.grad(loss), weights, X, config=kpx.Config(precision="fp8"))
    assert compiled.precisions == {"fp8": 4, "fp8 dgrad": 3, "fp8 wgrad": 4}


def test_fp8_gradients_are_e5m2_and_all_else_e4m3():
    compiled = kpx.compile(jax.grad(_loss), _weights(), X, target="cuda:h100", config=kpx.Config(precision="fp8"))
    dots = [line for line in compiled.stablehlo.splitlines() if "dot_general" in line]
    assert sum("f8E5M2>" in line and "f8E4M3FN>" in line for line in dots) == 11
    assert sum("f8E5M2>" not in line and "f8E4M3FN>" in line for line in dots) == 6


@pytest.mark.parametrize("between", [torch.nn.Tanh, torch.nn.Identity])
def test_pytorchs_backward_pass_is_told_apart_too(monkeypatch, between):
    seen = {}

    def lower(*args, real=lowered_precision.lower, **kwargs):
        counts, emulated = real(*args, **kwargs)
        seen.update(counts)
        return counts, emulated

    monkeypatch.setattr(lowered_precision, "lower", lower)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), between(), torch.nn.Linear(64, 48), torch.nn.Linear(48, 16))
    x = torch.randn(8, 32)
    (kpx.optimize(model, config=kpx.Config.training(precision="fp8"))(x) ** 2).mean().backward()
    assert seen == {"fp8": 3, "fp8 dgrad": 2, "fp8 wgrad": 3}
    given = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model.zero_grad()
    (model(x) ** 2).mean().backward()
    wanted = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    assert 1e-3 < distance(given, wanted) < 0.1


def test_stochastic_rounding_is_of_gradients_alone():
    near, _ = _gradient("fp8")
    by_chance, _ = _gradient(Policy("fp8", stochastic=True))
    assert 0 < distance(by_chance, near) < 0.3
    fn = kpx.jit(lambda weights, x: x @ weights[0][0], config=kpx.Config(precision=Policy("fp8", stochastic=True)))
    plain = kpx.jit(lambda weights, x: x @ weights[0][0], config=kpx.Config(precision="fp8"))
    np.testing.assert_array_equal(fn(_weights(), X), plain(_weights(), X))


def test_products_in_f16_scale_gradients_that_are_too_small_for_it():
    def loss(w, x):
        return 1e-9 * jnp.sum(jnp.tanh(x @ w) ** 2)

    w, x = _weights()[0][0], X
    given = kpx.jit(jax.grad(loss, (0, 1)), config=kpx.Config(precision="f16"))(w, x)
    wanted = jax.grad(loss, (0, 1))(w, x)
    assert distance(_flat(given), _flat(wanted)) < 1e-2
    cast = jax.grad(lambda w, x: loss(w.astype(jnp.float16), x.astype(jnp.float16)).astype(jnp.float32), (0, 1))(w, x)
    assert distance(_flat(cast), _flat(wanted)) > 0.1


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_gradients_of_weights_over_two_dimensions_run(precision):
    given, compiled = _gradient(precision)
    assert compiled.precisions == {precision: 17}
    assert distance(given, _flat(jax.grad(_loss)(_weights(), X))) < 0.02


def test_stacks_of_products_are_bf16():
    fn = kpx.jit(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), config=kpx.Config(precision="fp8"))
    assert kpx.compile(fn, X, jnp.swapaxes(X, 1, 2)).precisions == {"bf16": 1}


def test_a_router_stays_in_f32():
    def routed(x, router, w):
        weights, places = jax.lax.top_k(jax.nn.softmax(x @ router), 2)
        return (x @ w) * weights.sum(-1, keepdims=True), places

    w = _weights()[0][0]
    fn = kpx.jit(routed, config=kpx.Config(precision="bf16"))
    assert kpx.compile(fn, X[0], w[:, :8], w).precisions == {"f32": 1, "bf16": 1}


def test_a_loss_over_its_last_layer_and_grouped_products_are_counted():
    w, labels = jnp.zeros((1000, 64)), jnp.zeros((128,), jnp.int32)
    loss = kpx.jit(lambda x, w: kpx.ops.linear_cross_entropy(x, w, labels), config=kpx.Config(precision="bf16"))
    compiled = kpx.compile(loss, X.reshape(128, 64), w)
    assert set(compiled.precisions) == {"bf16"}
    sizes = jnp.array([64, 64], jnp.int32)
    grouped = kpx.jit(lambda x, w: kpx.ops.grouped_matmul(x, w, sizes), config=kpx.Config(precision="bf16"))
    compiled = kpx.compile(grouped, X.reshape(128, 64), jnp.zeros((2, 64, 32)))
    assert set(compiled.precisions) == {"bf16"}


def test_rules_by_place_hold_in_the_backward_pass():
    def loss(w, x):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("second"):
            return jnp.sum((x @ w.T) ** 2)

    policy = Policy("f32", (Rule("fp8", path="first"),))
    fn = kpx.jit(jax.grad(loss), config=kpx.Config(precision=policy))
    assert kpx.compile(fn, _weights()[0][0], X).precisions == {"fp8": 1, "fp8 wgrad": 1, "f32": 3}


@pytest.mark.parametrize(
    ("target", "scheme", "element"),
    [
        ("cuda:h100", "fp8", "f8e4m3fn"),
        ("rocm:mi300", "fp8", "f8e4m3fnuz"),
        ("rocm:mi355", "fp8", "f8e4m3fn"),
        ("tpu-v7x:2x2x1", "fp8", "f8e4m3fn"),
        ("cuda:b200", "mxfp8", "f8e8m0fnu"),
        ("cuda:b200", "nvfp4", "f4e2m1fn"),
    ],
)
def test_targets_with_units_have_such_products_and_none_widened(target, scheme, element):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).eval()
    try:
        compiled = kpx.compile(model, torch.zeros(128, 256), target=target, config=kpx.Config(precision=scheme))
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    assert compiled.precisions == {scheme: 2}
    assert compiled.emulated == {}
    assert f"{element}[" in compiled.hlo
    assert "bf16[" not in compiled.hlo
    kinds = _factors(compiled.hlo)
    assert bool(kinds) == (scheme != "nvfp4")  # which cuDNN computes
    assert all(kind.startswith("f8e") for kind in kinds)


_MORE = [pytest.param(t, marks=pytest.mark.slow) for t in ("rocm:mi355", "cuda:b200", "tpu-v7x:2x2x1")]


@pytest.mark.parametrize("target", ["cuda:h100", "rocm:mi300", *_MORE])
def test_training_steps_have_fp8_products_there_and_none_widened(target):
    try:
        compiled = kpx.compile(jax.grad(_loss), _weights(), X, target=target, config=kpx.Config(precision="fp8"))
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    kinds = _factors(compiled.hlo)
    assert len(kinds) == 2 * 17
    assert all(kind.startswith("f8e") for kind in kinds)
    assert sum(kind.startswith("f8e5m2") for kind in kinds) == 11


def _factors(hlo):
    """The element types of the factors of a program's products."""
    kinds = dict(re.findall(r"%([\w.-]+)(?:\.clone\S*)? = (\w+)\[", hlo))
    products = re.findall(r" (?:dot|convolution|scaled-dot)\(%([\w.-]+), %([\w.-]+)[,)]", hlo)
    return [kinds[name] for pair in products for name in pair]


@pytest.mark.parametrize("target", ["cuda:a100", "tpu-v6e:1x1"])
def test_targets_without_units_say_so(target):
    try:
        compiled = kpx.compile(
            torch.nn.Linear(64, 64), torch.zeros(32, 64), target=target, config=kpx.Config(precision="fp8")
        )
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    assert compiled.precisions == {"fp8": 1}
    assert "XLA has no fp8 products" in compiled.emulated["fp8"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_odd_rows_harm_no_other_row(scheme):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, bias=False).eval(), torch.randn(6, 64)
    x[1], x[2, 3], x[3, 3] = 0, float("nan"), float("inf")
    with torch.no_grad():
        wanted = layer(x)
    given, _ = _run(layer, x, scheme)
    assert (given[1] == 0).all() or scheme == "nvfp4"  # its second scale is the whole array's: NaN spreads
    assert given[2].isnan().any()
    assert given[3].isnan().any()
    if scheme != "nvfp4":
        torch.testing.assert_close(given[4:], wanted[4:], rtol=0.5, atol=0.5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bf16_model_is_computed_in_few_bits_too(scheme):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 96).eval().bfloat16(), torch.randn(40, 64).bfloat16()
    given, compiled = _run(model, x, scheme)
    assert given.dtype == torch.bfloat16
    assert compiled.precisions == {scheme: 1}
    with torch.no_grad():
        assert distance(given.double(), model(x).double()) < _FAR[scheme]
