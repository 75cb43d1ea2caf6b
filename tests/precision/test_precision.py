"""Precision as a rewrite: what is computed in which, how near to f64 that is, what the report counts, and odd numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpx
from kpx.errors import ConfigError
from kpx.hardware import cpu
from kpx.ir import module as m
from kpx.ir.call import call_module
from kpx.kernels import onednn, weights_only
from kpx.passes.weights_only import quantized
from kpx.precision import PRECISIONS, Policy, Rule
from tests.optional import torch
from tests.reference import assert_closer, distance

HAS_INT8 = onednn.available() and cpu.has_int8_products()
WAYS = [
    "plain", pytest.param("onednn", marks=pytest.mark.skipif(not HAS_INT8, reason="oneDNN has no exact int8 products here"))
]  # fmt: skip


class Layer(torch.nn.Module):
    """A norm, attention, an MLP, and the residual stream: what a transformer's layer has."""

    def __init__(self, width=64, heads=4, activation="gelu"):
        super().__init__()
        self.norm, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.heads, self.activation = heads, getattr(torch.nn.functional, activation)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        found = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.activation(self.up(self.norm2(x))))


X = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))


def _model(*layers):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(layers or (Layer(), Layer()))).eval()


@pytest.fixture
def way(request, monkeypatch):
    """Whether oneDNN is used."""
    if request.param == "plain":
        monkeypatch.setattr(onednn, "_load", lambda: "it is switched off here")
    return request.param


def _run(model, x, precision, **config):
    optimized = kpx.optimize(model, config=kpx.Config(precision=precision, **config))
    with torch.no_grad():
        return optimized(x), optimized.compile_for([x], {})


def _wanted(model, x):
    with torch.no_grad():
        wanted = model.double()(x.double())
    model.float()
    return wanted


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_bf16_is_no_farther_from_f64_than_a_model_cast_to_bf16(way):
    model = _model()
    given, compiled = _run(model, X, "bf16")
    wanted = _wanted(model, X)
    with torch.no_grad():
        cast = model.bfloat16()(X.bfloat16())
    assert given.dtype == torch.float32
    assert_closer(given.double(), cast.double(), wanted)
    assert compiled.precisions == {"bf16": 12}  # attention is two products here, too short for a kernel


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_bf16_is_no_farther_from_f64_than_pytorchs_autocast(way):
    model = _model()
    given, _ = _run(model, X, "bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        autocast = model(X)
    assert_closer(given.double(), autocast.double(), _wanted(model, X))


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_f16_keeps_more_bits_than_bf16(way):
    model = _model()
    wanted = _wanted(model, X)
    near, compiled = _run(model, X, "f16")
    far, _ = _run(model, X, "bf16")
    assert compiled.precisions == {"f16": 12}
    assert distance(near.double(), wanted) < distance(far.double(), wanted) / 3


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_int8_is_near_f64_and_counted(way, activation):
    model = _model(Layer(activation=activation), Layer(activation=activation))
    given, compiled = _run(model, X, "int8")
    assert compiled.precisions == {"int8": 8, "bf16": 4}
    assert distance(given.double(), _wanted(model, X)) < 0.01
    assert ("kpx_onednn_quantized" in compiled.stablehlo) == (way == "onednn")


def _emulated(x, w):
    """A product in int8 as its definition has it, in f64."""

    def quantize(a):
        scale = np.abs(a).max(-1, keepdims=True) / np.float32(127)
        by = np.where(scale > 0, np.float32(127) / np.maximum(np.abs(a).max(-1, keepdims=True), 1e-38), 0)
        return np.rint(a * by.astype(np.float32)).astype(np.int64), scale.astype(np.float64)

    (a, row), (b, column) = quantize(x), quantize(w)
    return (a @ b.T) * row * column.T


@pytest.mark.parametrize("rows", [1, 3, 31, 32, 33, 70, 256])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_int8_products_are_the_definitions(way, rows):
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(96, 200, bias=False).eval(), torch.randn(rows, 96)
    given, compiled = _run(layer, x, "int8")
    wanted = _emulated(x.numpy(), layer.weight.detach().numpy())
    assert compiled.precisions == {"int8": 1}
    np.testing.assert_allclose(given.numpy(), wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("steps", ["bias", "gelu", "residual", "gate", "all"])
@pytest.mark.parametrize("rows", [2, 80])
@pytest.mark.parametrize("way", ["onednn"], indirect=True)
def test_what_follows_an_int8_product_is_computed_in_f32(way, rows, steps):
    if not HAS_INT8:
        pytest.skip("not run: oneDNN is not here")

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 96, bias=steps in ("bias", "all")).eval()
    gate, x, y = torch.randn(rows, 96), torch.randn(rows, 96), torch.randn(rows, 96)

    def finished(found, y):
        if steps in ("gelu", "all"):
            found = torch.nn.functional.gelu(found)
        if steps in ("gate", "all"):
            found = found * gate
        return found + y if steps in ("residual", "all") else found

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x, y):
            return finished(self.linear(x), y)

    optimized = kpx.optimize(Model(), config=kpx.Config(precision="int8"))
    with torch.no_grad():
        given = optimized(x, y)
        product = torch.tensor(_emulated(x.numpy(), linear.weight.numpy()))
        wanted = finished(product + (0 if linear.bias is None else linear.bias.double()), y.double())
    torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-5)


ODD = {
    "zeros": lambda x: x.mul_(0),
    "a row of zeros": lambda x: x[1].mul_(0),
    "an infinity": lambda x: x[1].__setitem__(3, float("inf")),
    "a NaN": lambda x: x[1].__setitem__(3, float("nan")),
    "an outlier": lambda x: x[1].__setitem__(3, 1e30),
    "subnormal numbers": lambda x: x[1].mul_(1e-40),
    "the largest numbers": lambda x: x[1].mul_(1e38),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_int8_of_odd_numbers_harms_no_other_row(way, rows, odd):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, bias=False).eval(), torch.randn(rows, 64)
    ODD[odd](x)
    given, _ = _run(layer, x, "int8")
    with torch.no_grad():
        wanted = layer(x)
    others = [r for r in range(rows) if r != 1]
    torch.testing.assert_close(given[others], wanted[others], rtol=0.1, atol=0.05)
    if odd in ("an infinity", "a NaN"):
        assert given[1].isnan().all()
    elif odd in ("zeros", "a row of zeros", "subnormal numbers"):
        assert (given[1] == 0).all()
    else:
        assert distance(given[1].double(), wanted[1].double()) < 0.02


@pytest.mark.parametrize("odd", ["zeros", "an infinity", "a NaN", "an outlier"])
@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_int8_of_odd_weights_harms_no_other_column(way, odd):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, bias=False).eval(), torch.randn(16, 64)
    with torch.no_grad():
        ODD[odd](layer.weight.data)
        wanted = layer(x)
    given, _ = _run(layer, x, "int8")
    others = [c for c in range(64) if c != 1]
    torch.testing.assert_close(given[:, others], wanted[:, others], rtol=0.1, atol=0.05)
    assert given[:, 1].isnan().all() == (odd in ("an infinity", "a NaN"))


def test_f16_overflows_where_numbers_are_too_large_for_it():
    layer = torch.nn.Linear(64, 8, bias=False).eval()
    given, _ = _run(layer, torch.full((4, 64), 1e6), "f16")
    assert not given.isfinite().any()


@pytest.mark.parametrize("seed", range(8))
def test_quantizing_is_symmetric_and_rounds_to_nearest_even(seed):
    random = np.random.default_rng(seed)
    x = (random.standard_normal((5, 7, 33)) * 10.0 ** random.integers(-20, 20)).astype(np.float32)
    text = """func.func @main(%x: tensor<5x7x33xf32>) -> (tensor<5x7x33xf32>) { return %x : tensor<5x7x33xf32> }"""
    module = m.parse(text)
    from kpx.ir.module import func, ir

    block = m.entry_block(m.main(module))
    with module.context, ir.Location.unknown(), ir.InsertionPoint(block.operations[0]):
        q, scale = quantized(block.arguments[0], 1)
        func.ReturnOp([q, scale])
        block.operations[len(block.operations) - 1].operation.erase()
        m.main(module).attributes["function_type"] = ir.TypeAttr.get(
            ir.FunctionType.get([block.arguments[0].type], [q.type, scale.type])
        )
    q, scale = map(np.asarray, jax.jit(call_module(module))(x))
    most = np.abs(x).max(1, keepdims=True)
    assert q.dtype == np.int8
    assert np.abs(q).max() == 127
    np.testing.assert_allclose(scale, most[:, 0] / 127, rtol=1e-6)
    np.testing.assert_allclose(q * scale[:, None], x, atol=float(most.max()) / 127 * 0.5001, rtol=0)
    np.testing.assert_array_equal(q, np.rint(x * (np.float32(127) / most)))


def test_rules_say_what_is_computed_in_which_precision_by_op_place_and_size():
    policy = Policy(
        "bf16",
        (
            Rule("f32", path="1/*"),  # the second layer
            Rule("int8", op="product", path="*/up", least_columns=256),
            Rule("f32", op="attention"),
        ),
    )
    _, compiled = _run(_model(), X, policy)
    assert compiled.precisions == {"f32": 6, "int8": 1, "bf16": 5}


def test_the_first_rule_that_holds_decides():
    policy = Policy("f32", (Rule("bf16", path="*/up"), Rule("int8")))
    assert policy.of("product", "encoder/3/up", (1, 1, 1)) == "bf16"
    assert policy.of("product", "encoder/3/down", (1, 1, 1)) == "int8"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_jax_function_is_computed_in_a_precision_too(precision):
    w, x = jax.random.normal(jax.random.key(0), (64, 64)), jax.random.normal(jax.random.key(1), (32, 64))
    fn = kpx.jit(lambda x, w: jnp.tanh(x @ w) @ w, config=kpx.Config(precision=precision))
    wanted = np.tanh(np.asarray(x, np.float64) @ np.asarray(w, np.float64)) @ np.asarray(w, np.float64)
    assert 1e-4 < distance(np.asarray(fn(x, w), np.float64), wanted) < 2e-2
    compiled = kpx.compile(fn, x, w)
    assert compiled.precisions == {"bf16": 2}  # what is not held as a weight is not quantized


def test_a_convolution_is_computed_in_bf16():
    torch.manual_seed(0)
    model, x = torch.nn.Conv2d(8, 16, 3, padding=1).eval(), torch.randn(2, 8, 12, 12)
    given, compiled = _run(model, x, "bf16")
    assert compiled.precisions == {"bf16": 1}
    with torch.no_grad():
        cast = model.bfloat16()(x.bfloat16())
    assert_closer(given.double(), cast.double(), _wanted(model, x))


def test_gradients_are_no_farther_from_f64_than_pytorchs_autocasts():
    model = _model().train()
    loss = lambda model, x: (model(x) ** 2).mean()  # noqa: E731

    def gradients(model, x):
        model.zero_grad()
        loss(model, x).backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    ours = gradients(kpx.optimize(model, config=kpx.Config.training(precision="bf16")), X)
    with torch.autocast("cpu", torch.bfloat16):
        model.zero_grad()
        found = loss(model, X)
    found.backward()
    theirs = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    wanted = gradients(model.double(), X.double())
    assert_closer(ours, theirs, wanted)


def test_parameters_stay_as_they_are():
    model = _model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    _run(model, X, "int8")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
        assert parameter.dtype == torch.float32


def test_without_being_asked_for_nothing_is_rounded():
    _, compiled = _run(_model(), X, None)
    assert compiled.precisions == {}
    assert "bf16" not in compiled.stablehlo


def test_no_fuel_means_f32(monkeypatch):
    monkeypatch.setenv("KPX_FUEL", "0")
    _, compiled = _run(_model(), X, "bf16")
    assert compiled.precisions == {"f32": 12}


def test_it_is_compiled_for_targets_that_are_not_here():
    for target in ("tpu-v5e:1x1", "cuda:h100"):
        try:
            compiled = kpx.compile(_model(), X, target=target, config=kpx.Config(precision="int8"))
        except kpx.errors.TargetError as error:
            pytest.skip(f"not run: {error}")
        assert compiled.precisions["int8"] == 8
        assert "s8[" in compiled.hlo


@pytest.mark.parametrize(
    "make",
    [
        lambda: kpx.Config(precision="fp7"),
        lambda: kpx.Config(precision=8),
        lambda: Policy("low"),
        lambda: Rule("int7"),
        lambda: Rule("bf16", op="norm"),
        lambda: Policy("bf16", ("int8",)),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(make):
    with pytest.raises(ConfigError, match=r"Use one of|are not kpx"):
        make()


def test_a_variable_of_the_environment_sets_it(monkeypatch):
    monkeypatch.setenv("KPX_PRECISION", "bf16")
    _, compiled = _run(_model(), X, None)
    assert set(compiled.precisions) == {"bf16"}


def test_every_name_is_described():
    assert all(len(text) > 10 for text in PRECISIONS.values())


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize(
    ("precision", "least"),
    [("bf16", 0.9995), ("int8", 0.999), ("int8-weights", 0.999), ("int4-weights", 0.99)],
)
def test_similarities_of_real_sentences_keep_their_order(precision, least):
    from bench import precision as bench
    from kpx.observe import minilm

    model, tokenizer = minilm.load()
    wanted = bench.similarities(model, tokenizer)
    optimized = kpx.optimize(model, config=kpx.Config(precision=precision))
    assert bench.spearman(bench.similarities(optimized, tokenizer), wanted) >= least
    graded = np.array([score for score, _, _ in bench.pairs()])
    same, other = (wanted[graded == score] for score in (5, 0))
    assert np.median(same) > 0.7 > 0.2 > np.median(other)  # the pairs are what they are said to be


def _kept(w, bits, group):
    """Weights as they are kept, widened again, in f64."""
    parts = w.reshape(w.shape[0], -1, group)
    most, limit = np.abs(parts).max(-1, keepdims=True), np.float32(2 ** (bits - 1) - 1)
    q = np.rint(parts * np.where(most > 0, limit / np.where(most > 0, most, 1), 0).astype(np.float32))
    return (q.astype(np.float64) * (most / limit).astype(np.float64)).reshape(w.shape)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 50])
@pytest.mark.parametrize(("precision", "bits", "group"), [("int8-weights", 8, 96), ("int4-weights", 4, 32)])
@pytest.mark.parametrize("without", [False, True], ids=["with the call", "without"])
def test_weights_kept_in_few_bits_are_the_definitions(precision, bits, group, rows, without, monkeypatch):
    if without:
        monkeypatch.setattr(weights_only, "available", lambda: False)
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(96, 200).eval(), torch.randn(rows, 96)
    given, compiled = _run(layer, x, precision)
    wanted = x.double().numpy() @ _kept(layer.weight.detach().numpy(), bits, group).T + layer.bias.detach().numpy()
    assert compiled.precisions == {precision: 1}
    assert ("kpx_weights_only" in compiled.stablehlo) == (rows <= 8 and not without and weights_only.available())
    np.testing.assert_allclose(given.numpy(), wanted, rtol=2e-6, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(("precision", "most"), [("int8-weights", 0.27), ("int4-weights", 0.17)])
@pytest.mark.parametrize("rows", [1, 64])
def test_what_is_held_of_weights_is_as_small_as_it_should_be(precision, most, rows):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).eval()
    optimized = kpx.optimize(model, config=kpx.Config(precision=precision))
    with torch.no_grad():
        optimized(torch.randn(rows, 256))
    (entry,) = optimized._entries.values()
    held = sum(a.nbytes for a in entry.program.held)
    assert held < most * sum(p.numel() * 4 for p in model.parameters())


def test_an_embeddings_rows_are_taken_in_int8():
    torch.manual_seed(0)
    table = torch.nn.Embedding(500, 64).eval()
    ids = torch.randint(0, 500, (4, 9))
    given, compiled = _run(table, ids, "int8-weights")
    assert compiled.precisions == {"int8-weights": 1}
    wanted = torch.tensor(_kept(table.weight.detach().numpy(), 8, 64))[ids]
    torch.testing.assert_close(given.double(), wanted, rtol=1e-6, atol=1e-6)
    assert "tensor<500x64xi8>" in compiled.stablehlo


def test_an_inner_size_that_no_groups_fit_stays_in_f32():
    _, compiled = _run(torch.nn.Linear(50, 64).eval(), torch.randn(3, 50), "int4-weights")
    assert compiled.precisions == {"f32": 1}


@pytest.mark.parametrize("odd", ["zeros", "an infinity", "a NaN", "an outlier"])
@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
@pytest.mark.parametrize("rows", [2, 20])
def test_odd_weights_kept_in_few_bits_harm_no_other_column(rows, precision, odd):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 64, bias=False).eval(), torch.randn(rows, 64)
    with torch.no_grad():
        ODD[odd](layer.weight.data)
        wanted = layer(x)
    given, _ = _run(layer, x, precision)
    others = [c for c in range(64) if c != 1]
    torch.testing.assert_close(given[:, others], wanted[:, others], rtol=0.3, atol=0.3)
    assert given[:, 1].isnan().all() == (odd in ("an infinity", "a NaN"))


def test_int4_weights_are_an_accelerators_own_type():
    try:
        compiled = kpx.compile(_model(), X, target="tpu-v5e:1x1", config=kpx.Config(precision="int4-weights"))
    except kpx.errors.TargetError as error:
        pytest.skip(f"not run: {error}")
    assert compiled.precisions["int4-weights"] == 8
    assert "s4[" in compiled.hlo


@pytest.mark.parametrize("precision", ["int8", "int8-weights", "int4-weights"])
@pytest.mark.parametrize("rows", [2, 40])
def test_a_bf16_models_weights_are_quantized_too(precision, rows):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(64, 96).eval().bfloat16(), torch.randn(rows, 64).bfloat16()
    given, compiled = _run(model, x, precision)
    assert given.dtype == torch.bfloat16
    assert compiled.precisions == {precision: 1}
    with torch.no_grad():
        torch.testing.assert_close(given, model(x), rtol=0.2, atol=0.2 if precision == "int4-weights" else 0.03)


def test_a_bf16_model_is_not_widened():
    model = _model().bfloat16()
    given, compiled = _run(model, X.bfloat16(), "f32")
    assert given.dtype == torch.bfloat16
    assert compiled.precisions == {"bf16": 12}


def test_layers_that_rules_tell_apart_are_no_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer() for _ in range(16))).eval()
    _, compiled = _run(model, X, Policy("bf16", (Rule("f32", path="3/*"),)))
    assert compiled.precisions == {"bf16": 90, "f32": 6}
    assert compiled.layers == {}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_loop_of_layers_is_computed_in_a_precision_and_counted(precision):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer() for _ in range(16))).eval()
    looped, compiled = _run(model, X, precision)
    assert sum(compiled.precisions.values()) == 96
    unrolled, _ = _run(model, X, precision, layers="unrolled")
    torch.testing.assert_close(looped, unrolled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_bf16_models_few_rows_are_no_farther_from_f64_than_eagers(rows):
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(512, 768).eval().bfloat16(), torch.randn(rows, 512).bfloat16()
    given, compiled = _run(layer, x, None)
    if onednn.available() and weights_only.available():
        assert "kpx_weights_only" in compiled.stablehlo
    with torch.no_grad():
        eager, wanted = layer(x), layer.double()(x.double())
    assert given.dtype == torch.bfloat16
    assert_closer(given.double(), eager.double(), wanted)


class Tied(torch.nn.Module):
    """A table of embeddings that is the last layer's weight too."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(512, 64)
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, numbers):
        return self.layer(self.tokens(numbers)) @ self.tokens.weight.T


def test_a_table_that_is_the_last_layer_too_is_held_once():
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.arange(4)
    optimized = kpx.optimize(model, config=kpx.Config(precision="int4-weights"))
    with torch.no_grad():
        given, wanted = optimized(x), model(x)
    assert optimized.compile_for([x], {}).precisions == {"int8-weights": 2, "int4-weights": 1}
    assert distance(given.double(), wanted.double()) < 0.12
    (entry,) = optimized._entries.values()
    table, scales = 512 * 64, 512 * 4
    layer = 64 * 64 // 2 + 64 * 2 * 4 + 64 * 4  # halves of bytes, scales of groups, the bias
    assert sum(a.nbytes for a in entry.program.held) == table + scales + layer
